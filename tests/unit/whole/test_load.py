"""Ten thousand rollouts in flight on the true loop and buffer, the trainer far slower than the sampler, for minutes.

Time is the event loop's, and jumps to the next timer as soon as nothing is left to do.
"""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.virtual_time import JumpingLoop
from kdray.data.dataset import PromptStream
from kdray.interfaces import OpenCheckpoint
from kdray.loop import Distillation
from kdray.rollouts.draw import LoopSettings
from kdray.rollouts.seeds import unit
from kdray.runs.ledger import Ledger
from kdray.types import Rollout, SampleRequest, StepReport, TrainBatch
from tests.support.fakes import FakeReporter, make_prompts

BATCH, STALENESS, STEPS = 1000, 9, 14
SLOTS = BATCH * (STALENESS + 1)
STEP_S = 60.0
"""What a training step takes; the sampler needs a second for most rollouts."""


@dataclass
class World:
    """What happens, on the loop's clock."""

    published: int = 0
    asked: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Sample id -> (version that was published then, when)."""
    drawn: int = 0
    trained: int = 0
    waits: list[float] = field(default_factory=list)
    """Seconds from asking for a sample to its training, by sample id."""
    most_in_flight: int = 0
    full_s: float = 0.0
    """How long the slots, but for the slowest few, held finished rollouts that waited to be trained."""
    rollouts_alive: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


TEACHER = "of-this-test"
"""Tells its rollouts from those that other tests of this process left."""


class FastSampler:
    """Draws everything at once; one in five hundred takes several steps of training, and the others end in any order."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        now = asyncio.get_running_loop().time()
        for request in requests:
            self._world.asked[request.sample_id] = (self._world.published, now)
        self._world.most_in_flight = max(self._world.most_in_flight, len(self._world.asked) - self._world.trained)
        ended: asyncio.Queue[Rollout] = asyncio.Queue()
        tasks = [asyncio.create_task(self._one(request, ended)) for request in requests]
        try:
            missing = len(requests)
            while missing:
                part = [await ended.get()]
                while not ended.empty():
                    part.append(ended.get_nowait())
                missing -= len(part)
                self._world.drawn += len(part)
                yield part
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, request: SampleRequest, ended: asyncio.Queue[Rollout]) -> None:
        chance = unit(1, "delay", request.sample_id)
        await asyncio.sleep(3.0 * STEP_S if chance < 0.002 else chance)
        version = self._world.published
        length = 1 + request.sample_id % 8
        column = np.full(length, -1.0, np.float32)
        ended.put_nowait(
            Rollout(
                request.sample_id,
                request.prompt_id,
                request.prompt_ids,
                np.full(length, 2, np.int32),
                column,
                column.copy(),
                np.full(length, max(request.min_version, version - request.sample_id % 3), np.int32),
                request.alpha,
                "stop",
                TEACHER,
                column.copy(),
            )
        )


class SlowStudent:
    """Trains for a minute a step, and looks around meanwhile."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def train_step(
        self, batch: TrainBatch, text: TrainBatch | None = None, scheduled: Mapping[str, float] | None = None
    ) -> StepReport:
        world, clock = self._world, asyncio.get_running_loop()
        for sample_id in batch.sample_ids.tolist():
            version, asked = world.asked[sample_id]
            assert batch.step - 1 - version <= STALENESS, "admitted longer ago than the bound allows"
            world.waits.append(clock.time() - asked)
        world.trained += BATCH
        for _ in range(6):
            await asyncio.sleep(STEP_S / 6)
            if world.drawn - world.trained >= 0.99 * (SLOTS - BATCH):
                world.full_s += STEP_S / 6
        gc.collect()
        world.rollouts_alive.append(sum(type(each) is Rollout and each.teacher == TEACHER for each in gc.get_objects()))
        world.memory.append(tracemalloc.get_traced_memory()[0])
        return StepReport(batch.step, 0.5, batch.num_target_tokens, 1.0, 1e-3, STEP_S)

    async def publish(self, version: int) -> None:
        self._world.published = version

    async def save_checkpoint(self, step: int) -> None:
        pass

    async def open_checkpoint(self, step: int) -> OpenCheckpoint:
        raise AssertionError("no checkpoint is due")


class QuietReporter(FakeReporter):
    """Keeps no rollouts: a run does not, either."""

    def samples(self, rollouts: Sequence[Rollout], step: int) -> None:
        pass


def test_ten_thousand_rollouts_in_flight(tmp_path: Path) -> None:
    world, reporter, ledger = World(), QuietReporter(), Ledger(tmp_path / "ledger.jsonl")
    settings = LoopSettings(3, STEPS, BATCH, 0.3, 8, 2, STALENESS, checkpoint_every=0, evaluate_every=0)
    tracemalloc.start()
    runner = asyncio.Runner(loop_factory=JumpingLoop)
    try:
        prompts = PromptStream(make_prompts(), 3)
        runner.run(Distillation(settings, prompts, FastSampler(world), None, SlowStudent(world), reporter, ledger).run())
        minutes = runner.get_loop().time() / 60.0
    finally:
        runner.close()
        tracemalloc.stop()
    assert minutes >= STEPS, "the clock did not run"
    assert world.most_in_flight == SLOTS
    assert world.full_s >= 3 * 60.0, "the buffer was to be full for minutes"
    # Slots, and the batch that is being trained; not what was trained before.
    assert max(world.rollouts_alive) <= SLOTS
    # Flat once the slots are full: what grows is this test's own notes and a step's line of metrics.
    assert max(world.memory[5:]) < 1.1 * max(world.memory[2:5])
    # Every sample in its own step and once, so the oldest admitted one is always the next; none waits longer than the bound.
    assert ledger.check(STEPS, BATCH) == (0, 0)
    assert len(world.waits) == STEPS * BATCH
    slack = 3.0 * STEP_S
    assert max(world.waits) <= (STALENESS + 1) * STEP_S + slack
    assert max(metrics["staleness_max"] for metrics in reporter.metrics.values()) == STALENESS


def test_a_clock_that_jumps_keeps_its_order() -> None:
    seen: list[tuple[float, str]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((asyncio.get_running_loop().time(), name))

    async def both() -> None:
        await asyncio.gather(sleeper("late", 600.0), sleeper("early", 60.0))

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(both())
    assert seen == [(60.0, "early"), (600.0, "late")]
