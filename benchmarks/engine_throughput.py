"""Tokens per second of the one pass against its parts, in one run: `python -m benchmarks.engine_throughput`.

Teacher alone, student alone, mixture with recording, scoring by prefill: same engine settings, same prompts, 64 new tokens.
The baseline is the two models one after the other, 1 / (1 / teacher + 1 / student). Writes benchmarks/results/.
"""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from actors.serving.engine import TeacherEngine
from actors.serving.spec import EngineSpec, Role
from benchmarks import measured
from benchmarks.tiny_pair import VOCAB, engine_spec
from kdray.types import Rollout, SampleRequest

IN_FLIGHT = 128
NEW_TOKENS = 64
ROUNDS = 5
ALPHAS: dict[Role, float] = {"teacher": 1.0, "student": 0.0, "mixture": 0.2}


def _requests(alpha: float, round_: int) -> list[SampleRequest]:
    rng = np.random.default_rng(round_)
    return [
        SampleRequest(
            index, index, rng.integers(3, VOCAB, size=24).astype(np.int32), alpha, int(rng.integers(2**62)), NEW_TOKENS
        )
        for index in range(IN_FLIGHT)
    ]


async def _measure(spec: EngineSpec) -> dict[str, float]:
    """Median tokens per second over the rounds after a warm-up one: sampling, and scoring where the engine can."""
    engine = TeacherEngine(spec)
    await engine.start()
    rates: dict[str, list[float]] = {"sample": [], "score": []}
    for round_ in range(ROUNDS + 1):
        started = time.perf_counter()
        rollouts: list[Rollout] = []
        async for part in engine.sample(_requests(ALPHAS[spec.role], round_)):
            rollouts += part
        rates["sample"].append(sum(len(rollout.token_ids) for rollout in rollouts) / (time.perf_counter() - started))
        if spec.role == "student":
            continue
        started = time.perf_counter()
        async for _ in engine.score(rollouts):
            pass
        rates["score"].append(sum(len(rollout.token_ids) for rollout in rollouts) / (time.perf_counter() - started))
    await engine.close()
    return {name: float(np.median(values[1:])) for name, values in rates.items() if values}


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with TemporaryDirectory() as root:
        rates = {}
        for role in ALPHAS:
            rates[role] = asyncio.run(_measure(engine_spec(Path(root), IN_FLIGHT, role)))
            print(role, {name: round(rate) for name, rate in rates[role].items()}, flush=True)
    after_another = 1 / (1 / rates["teacher"]["sample"] + 1 / rates["student"]["sample"])
    ratio = rates["mixture"]["sample"] / after_another
    figures = {
        "in_flight": IN_FLIGHT,
        "new_tokens": NEW_TOKENS,
        "tokens_per_s": rates,
        "one_after_another": after_another,
        "one_pass_over_one_after_another": ratio,
    }
    name = f"engine_throughput_{datetime.now(UTC).date().isoformat()}"
    path = measured.write(name, ("torch", "transformers"), figures)
    print(f"one pass / one after another: {ratio:.2f}  ({path})")


if __name__ == "__main__":
    main()
