"""Rounding of half precision: log q of one student by the engine, by the trainer, and by exact arithmetic on the same weights.

    python -m benchmarks.half_precision [--out FILE]

Random Qwen 2 students whose largest logits are about 20, as those of real models are, in bfloat16 on both sides; with
`training.logits` model and float32. Gaps are of |log q - log q'| over the same tokens, nats a token. The parity check's share
in half precision (`kdray.checks.parity.HALF_SHARE`) has to lie above every mean gap of engine and trainer over the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from actors.serving.engine import TeacherEngine
from actors.serving.spec import EngineSpec
from actors.student.trainer import Phase, StudentTrainer
from kdray.config import ReverseKLLoss, TrainingSettings
from kdray.models.random_models import EOS, VOCAB, RandomModel

SIZES = {"2 layers of 64": (64, 2), "8 layers of 256": (256, 8), "24 layers of 512": (512, 24)}
TOKENS = 400
SHARPNESS = 4.0
"""Factor on the random output head, whose logits would otherwise be at most 5."""
_MARK = "RESULT "


def write_student(folder: Path, width: int, layers: int) -> None:
    """A student in bfloat16 with a sharp output head."""
    RandomModel("qwen2", width, layers, seed=2).write(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] *= SHARPNESS
    save_file({name: each.bfloat16() for name, each in tensors.items()}, path, {"format": "pt"})


def gaps(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    apart = np.abs(first - second)
    return {"mean": float(apart.mean()), "p99": float(np.quantile(apart, 0.99)), "max": float(apart.max())}


async def measure(size: str, logits: str, folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    write_student(folder, *SIZES[size])
    ids = np.random.default_rng(0).integers(3, VOCAB, size=TOKENS).tolist()
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        rows = exact(torch.tensor([ids])).logits[0]
    largest = float(rows.amax(-1).mean())
    of_exact = rows[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    training = TrainingSettings.model_validate({"backend": {"type": "torch"}, "precision": "bf16", "logits": logits})
    trainer = StudentTrainer(training, VOCAB, 0)
    trainer.start_phase(Phase("measure", str(folder), None, ReverseKLLoss(type="reverse_kl"), 1e-5, steps=1))
    of_trainer = trainer.log_probabilities(ids)
    engine = TeacherEngine(
        EngineSpec(
            "student",
            str(folder),
            None,
            VOCAB,
            (EOS,),
            TOKENS + 8,
            dtype="bfloat16",
            logits=logits,
            kv_cache_gib=0.2,
            max_num_seqs=8,
        )
    )
    try:
        await engine.start()
        of_engine = await engine.log_probabilities(ids)
    finally:
        await engine.close()
    return {
        "size": size,
        "logits": logits,
        "largest_logit": largest,
        "spread": of_trainer.spread,
        "engine_trainer": gaps(of_engine, of_trainer.logprobs),
        "engine_exact": gaps(of_engine, of_exact),
        "trainer_exact": gaps(of_trainer.logprobs, of_exact),
    }


def measured_apart(size: str, logits: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", size, logits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    raise RuntimeError(done.stderr[-4000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "half_precision.json")
    parser.add_argument("--child", nargs=2)
    given = parser.parse_args()
    if given.child:
        with tempfile.TemporaryDirectory() as scratch:
            print(_MARK + json.dumps(asyncio.run(measure(*given.child, Path(scratch)))))
        return
    rows = []
    for size in SIZES:
        for logits in ("model", "float32"):
            rows.append(measured_apart(size, logits))
            print(json.dumps(rows[-1]), flush=True)
    found = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "tokens": TOKENS,
        "rows": rows,
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
