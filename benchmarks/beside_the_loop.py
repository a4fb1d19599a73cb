"""Evaluations and checkpoints beside the training steps: `python -m benchmarks.beside_the_loop`.

The true loop, buffer, batching and ledger over stub engines in virtual time: nothing computes, and the figures are the same on
every machine. A replica holds `slots` sequences, each of which takes the same time; an evaluation asks it for as many as two
batches have. A checkpoint is written by the ranks, which stops them, and stored (hashed, moved or uploaded). Measured is the
share of a run's time that evaluations and checkpoints add to it, as they are and as they were when training waited for both.
Writes benchmarks/results/.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import measured, virtual_time
from benchmarks.loop_scale import Quiet, StubReplicas, stub_settings
from kdray.data.dataset import PromptStream
from kdray.loop import Distillation, Hooks
from kdray.runs.ledger import Ledger
from kdray.types import Prompt, Rollout, SampleRequest, StepReport, TrainBatch

BATCH, STEPS, EVERY = 8, 40, 5
SETTINGS = stub_settings(STEPS, BATCH)


@dataclass(frozen=True)
class Case:
    """Seconds of a run's parts, all by a common unit."""

    name: str
    draw_s: float = 1.0
    train_s: float = 1.0
    slots: int = BATCH
    """Sequences that the replicas hold; what an evaluation asks for waits for them, and takes them from the samples."""
    max_staleness: int = 1
    heldout: int = 2 * BATCH
    """Responses of an evaluation; 0 leaves evaluations out."""
    checkpoints: bool = True
    """False leaves out all but the one at the end, which a run waits for."""
    write_s: float = 0.2
    """Seconds in which the ranks write a checkpoint to their own disks."""
    store_s: float = 1.0
    """Seconds until those files are hashed and where they belong."""


CASES = [
    replace(case, name=f"{case.name}, max_staleness {staleness}", max_staleness=staleness)
    for case in (
        Case("equal stages, replicas full"),
        Case("equal stages, replicas with room", slots=4 * BATCH),
        Case("training twice as long", draw_s=0.5, slots=2 * BATCH),
        Case("drawing twice as long", train_s=0.5, slots=2 * BATCH),
        Case("equal stages, evaluations alone", checkpoints=False, slots=4 * BATCH),
        Case("equal stages, checkpoints alone", heldout=0),
    )
    for staleness in (0, 1)
]


class Replicas(StubReplicas):
    """Slots that samples and evaluations share, in the order in which they ask."""

    def __init__(self, case: Case) -> None:
        super().__init__(1)
        self._slots = asyncio.Semaphore(case.slots)
        self._seconds = case.draw_s

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        for next_one in asyncio.as_completed([self._draw(request) for request in requests]):
            yield [await next_one]

    async def _draw(self, request: SampleRequest) -> Rollout:
        await self.hold()
        return self._rollout(request)

    async def hold(self) -> None:
        """Take a slot for as long as a sequence takes."""
        async with self._slots:
            await asyncio.sleep(self._seconds)

    async def evaluate(self, number: int) -> dict[str, float]:
        await asyncio.gather(*(self.hold() for _ in range(number)))
        return {}


class Ranks:
    """Train, write and store in given times; one after the other where `serial`, as they once did."""

    def __init__(self, case: Case, serial: bool) -> None:
        self._case = case
        self._serial = serial
        self.evaluating: asyncio.Future[Any] | None = None

    async def train_step(self, batch: TrainBatch, text: Any = None, scheduled: Mapping[str, float] | None = None) -> StepReport:
        if self._serial and self.evaluating is not None:
            await asyncio.wait({self.evaluating})
        await asyncio.sleep(self._case.train_s)
        targets = batch.num_target_tokens
        return StepReport(step=batch.step, loss=0.0, num_target_tokens=targets, grad_norm=0.0, learning_rate=0.0, seconds=0.0)

    async def publish(self, version: int) -> None: ...

    async def save_checkpoint(self, step: int) -> None:
        await asyncio.sleep(self._case.write_s + self._case.store_s)

    async def open_checkpoint(self, step: int) -> Ranks:
        if self._serial and self.evaluating is not None:
            await asyncio.wait({self.evaluating})
        await asyncio.sleep(self._case.write_s + (self._case.store_s if self._serial else 0.0))
        return self

    async def keep_files(self) -> None: ...

    async def commit(self) -> None:
        await asyncio.sleep(0.0 if self._serial else self._case.store_s)


async def seconds(case: Case, serial: bool, folder: Path) -> float:
    """Virtual seconds of a run."""
    replicas, ranks = Replicas(case), Ranks(case, serial)

    async def evaluate(version: int) -> dict[str, float]:
        ranks.evaluating = asyncio.ensure_future(replicas.evaluate(case.heldout))
        return await ranks.evaluating

    settings = replace(
        SETTINGS,
        max_staleness=case.max_staleness,
        evaluate_every=EVERY if case.heldout else 0,
        checkpoint_every=EVERY if case.checkpoints else 0,
    )
    await Distillation(
        settings,
        PromptStream([Prompt(index, np.arange(32, dtype=np.int32)) for index in range(100)], 0),
        replicas,
        None,
        ranks,  # type: ignore[arg-type]
        Quiet(),  # type: ignore[arg-type]
        Ledger(folder / "ledger.jsonl"),
        hooks=Hooks(evaluate=evaluate),
    ).run()
    return asyncio.get_running_loop().time()


def shares(case: Case) -> dict[str, Any]:
    """Share of a run's time that evaluations and checkpoints add, in both orders."""
    found = {}
    neither = replace(case, heldout=0, checkpoints=False)
    for name, each, serial in (("neither", neither, False), ("waited for", case, True), ("beside", case, False)):
        with TemporaryDirectory() as folder:
            found[name] = virtual_time.run(seconds(each, serial, Path(folder)))
    added = {name: 1.0 - found["neither"] / found[name] for name in ("waited for", "beside")}
    return {"case": case.name, "seconds": found, "share_of_time_added": added}


def main() -> None:
    results = [shares(case) for case in CASES]
    for each in results:
        before, after = each["share_of_time_added"].values()
        print(f"{each['case']:55s} {before:6.1%} {after:6.1%}")
    measured.write("beside_the_loop", [], {"steps": STEPS, "every": EVERY, "cases": results})


if __name__ == "__main__":
    main()
