"""Peak memory and time of a divergence over hidden states: all logits at once against a chunk at a time.

    python -m benchmarks.chunked_loss_memory                      # 2,048 tokens x 151,936 ids, under a minute on a core
    python -m benchmarks.chunked_loss_memory --loss jsd --rows 512

Each way runs in a process of its own. Memory is the process's peak resident set less what was resident just before, with
inputs and libraries in place; gradients are included. Linux only. The result goes to benchmarks/results/ as JSON; at the
default size the naive way needs some 6 GiB of RAM.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn.functional import linear

from kdray.config.losses import LOSSES
from kdray.config.registry import name_of
from kdray.losses import chunked_divergence, divergence_of
from kdray.losses.support import full_rows

RESULTS = Path(__file__).parent / "results"
WAYS = ("naive", "chunked")


def main() -> None:
    options = parse()
    if options.way:
        print(json.dumps(measure(options)))
        return
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "commit": subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip(),
        "settings": {name: item for name, item in vars(options).items() if name != "way"},
        "ways": {way: in_own_process(way, options) for way in WAYS},
    }
    naive, chunked = (result["ways"][way] for way in WAYS)
    result["memory_ratio"] = naive["peak_gib"] / chunked["peak_gib"]
    result["value_relative_difference"] = abs(chunked["value"] / naive["value"] - 1.0)
    result["gradient_norm_relative_difference"] = {
        name: abs(chunked["gradient_norms"][name] / norm - 1.0) for name, norm in naive["gradient_norms"].items()
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"chunked_loss_memory_{options.loss}_{result['date'][:10]}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    divergences = sorted(name_of(kind) for kind in LOSSES.known() if kind.divergence)
    parser.add_argument("--loss", default="forward_kl", choices=divergences)
    parser.add_argument("--rows", type=int, default=2048, help="tokens")
    parser.add_argument("--vocab", type=int, default=151_936, help="ids")
    parser.add_argument("--width", type=int, default=64, help="hidden size of both models")
    parser.add_argument("--chunk-rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    return parser.parse_args()


def in_own_process(way: str, options: argparse.Namespace) -> dict[str, object]:
    flags = [f"--{name.replace('_', '-')}={item}" for name, item in vars(options).items() if name != "way"]
    command = [sys.executable, "-m", "benchmarks.chunked_loss_memory", *flags, f"--way={way}"]
    root = Path(__file__).resolve().parents[1]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Value, gradient norms, seconds and peak growth of one forward and backward pass."""
    torch.set_num_threads(options.threads)
    # A first small pass loads every kernel, so that the baseline holds them.
    run(options.way, inputs(8, 1000, options.width), options)
    tensors = inputs(options.rows, options.vocab, options.width)
    baseline = resident_gib()
    started = time.perf_counter()
    total = run(options.way, tensors, options)
    seconds = time.perf_counter() - started
    return {
        "peak_gib": round(peak_gib() - baseline, 4),
        "seconds": round(seconds, 2),
        "value": total,
        "gradient_norms": {name: float(tensors[name].grad.double().norm()) for name in ("student_hidden", "student_head")},
    }


def inputs(rows: int, vocab: int, width: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"student_hidden": (rows, width), "student_head": (vocab, width)}
    shapes |= {name.replace("student", "teacher"): shape for name, shape in shapes.items()}
    tensors = {name: torch.randn(shape, generator=random) * (1.0 if rows in shape else 0.3) for name, shape in shapes.items()}
    for name in ("student_hidden", "student_head"):
        tensors[name].requires_grad_()
    return tensors


def run(way: str, tensors: dict[str, torch.Tensor], options: argparse.Namespace) -> float:
    divergence = divergence_of(LOSSES.parse({"type": options.loss} | soft_only(options.loss)))
    vocab = len(tensors["student_head"])
    if way == "chunked":
        total = chunked_divergence(**tensors, divergence=divergence, vocab_size=vocab, chunk_rows=options.chunk_rows)
    else:
        with torch.no_grad():
            teacher = linear(tensors["teacher_hidden"], tensors["teacher_head"]).log_softmax(-1)
        student = linear(tensors["student_hidden"], tensors["student_head"]).log_softmax(-1)
        total = divergence(full_rows(teacher, student)).sum()
    total.backward()
    return float(total.detach())


def soft_only(loss: str) -> dict[str, float]:
    return {"soft_share": 1.0} if loss == "hinton" else {}


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB


def resident_gib() -> float:
    """What is resident now. The peak so far would be too high a baseline: making the inputs took more for a moment."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**30


if __name__ == "__main__":
    main()
