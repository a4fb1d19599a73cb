"""Sampling and training at the same time, over stub engines: `python -m benchmarks.loop_overlap`.

The true loop, buffer, batching and ledger. Replicas hold a batch and draw each of its sequences in the same time; the ranks
train a batch in a given time. Measured: with both equally long, the rate at `max_staleness` 1 over that at 0, which could be 2
at most; and with replicas that take twice as long as the ranks, the share of the time in which they have nothing to do. Nothing
here computes, so that a busy machine changes little. Writes benchmarks/results/.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.loop_scale import Quiet, StubReplicas, stub_settings
from kdray.data.dataset import PromptStream
from kdray.loop import Distillation
from kdray.runs.ledger import Ledger
from kdray.types import Prompt, Rollout, SampleRequest, StepReport, TrainBatch

BATCH, STEPS, STAGE_S = 32, 24, 0.5
SETTINGS = stub_settings(STEPS, BATCH)


class EvenReplicas(StubReplicas):
    """Slots for one batch; a sequence takes `seconds`, whatever else is drawn. Counts the time of slots in use."""

    def __init__(self, seconds: float) -> None:
        super().__init__(1)
        self._slots = asyncio.Semaphore(BATCH)
        self._seconds = seconds
        self.used_s = 0.0

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        for next_one in asyncio.as_completed([self._draw(request) for request in requests]):
            yield [await next_one]

    async def _draw(self, request: SampleRequest) -> Rollout:
        async with self._slots:
            await asyncio.sleep(self._seconds)
            self.used_s += self._seconds
        return self._rollout(request)


class EvenStudent:
    """Trains a batch in a given time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def train_step(self, batch: TrainBatch, text: Any = None, scheduled: Mapping[str, float] | None = None) -> StepReport:
        await asyncio.sleep(self._seconds)
        targets = batch.num_target_tokens
        return StepReport(step=batch.step, loss=0.0, num_target_tokens=targets, grad_norm=0.0, learning_rate=0.0, seconds=0.0)

    async def publish(self, version: int) -> None: ...

    async def save_checkpoint(self, step: int) -> None: ...


async def measure(max_staleness: int, draw_s: float, train_s: float, folder: Path) -> dict[str, float]:
    """Seconds of a run, and the share of its time in which the replicas' slots were empty."""
    replicas = EvenReplicas(draw_s)
    prompts = PromptStream([Prompt(index, np.arange(32, dtype=np.int32)) for index in range(1000)], 0)
    started = time.perf_counter()
    await Distillation(
        replace(SETTINGS, max_staleness=max_staleness),
        prompts,
        replicas,
        None,
        EvenStudent(train_s),  # type: ignore[arg-type]
        Quiet(),  # type: ignore[arg-type]
        Ledger(folder / f"{max_staleness}-{draw_s}.jsonl"),
    ).run()
    seconds = time.perf_counter() - started
    # The last batch is trained while nothing is left to draw.
    return {"seconds": seconds, "replicas_idle": 1 - replicas.used_s / BATCH / (seconds - train_s)}


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        strict = asyncio.run(measure(0, STAGE_S, STAGE_S, folder))
        overlapped = asyncio.run(measure(1, STAGE_S, STAGE_S, folder))
        slow = asyncio.run(measure(1, 2 * STAGE_S, STAGE_S, folder))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "steps": STEPS,
        "stage_s": STAGE_S,
        "equal_stages": {"max_staleness_0": strict, "max_staleness_1": overlapped},
        "staleness_1_over_0": strict["seconds"] / overlapped["seconds"],
        "slow_replicas": slow,
    }
    target = Path("benchmarks/results/loop_overlap.json")
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
