"""The verbs that the loop may use. Everything the loop is given implements one of these; none of them mentions Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from kdray.errors import TeacherGone
from kdray.types import Rollout, SampleRequest, StepReport, TrainBatch


class Availability:
    """State of a teacher: available, or lost with a reason while it has no replica that could answer.

    A final loss does not pass by itself: a replica that came back was refused, and the next one will be too.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._lost = asyncio.Event()
        self._final = asyncio.Event()

    def lose(self, reason: str, final: bool = False) -> None:
        self.reason = reason
        self._lost.set()
        if final:
            self._final.set()

    def restore(self) -> None:
        self.reason = None
        self._lost.clear()
        self._final.clear()

    async def lost(self, only_final: bool = False) -> None:
        """Wait until the teacher is lost, then raise. Raises: TeacherGone with the reason."""
        await (self._final if only_final else self._lost).wait()
        raise TeacherGone(self.reason or "the teacher cannot be asked")


class Sampler(Protocol):
    """Draws rollouts: a teacher pool that co-samples with the student, or a student-only rollout pool."""

    def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """Stream every request's rollout exactly once, in the order they end, those that ended together as one item.

        Raises: EngineError when a request could not be served within the pool's retries.
        """
        ...


class Scorer(Protocol):
    """A teacher that scores sequences sampled elsewhere, by prefill."""

    name: str

    def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """Stream each rollout exactly once with this teacher's columns filled in.

        The new support begins with the rollout's `support_ids`, where it has some; with `top_k` the teacher's own top ids
        follow.
        """
        ...


class Teacher(Sampler, Scorer, Protocol):
    """A named pool that samples beside the student and scores what others sampled."""

    availability: Availability
    """Whether the teacher can be asked now, and the reason where it cannot."""


class Student(Protocol):
    """All ranks of the student as one thing: a call reaches every rank, and one rank's failure fails the call."""

    async def train_step(
        self, batch: TrainBatch, text: TrainBatch | None = None, scheduled: Mapping[str, float] | None = None
    ) -> StepReport:
        """One step, with the pretraining text that joins it.

        Args: scheduled: settings that differ in this step, by full name, such as loss.beta.
        Raises: TrainingError naming the samples, before the optimizer makes the update, if a loss is not finite.
        """
        ...

    async def publish(self, version: int) -> None:
        """Give the current weights to every replica that asks, as `version`. Returns once they can be pulled."""
        ...

    async def save_checkpoint(self, step: int) -> None:
        """Write a checkpoint that a later run can resume from; returns once it is committed."""
        ...


class Reporter(Protocol):
    """Where numbers and events go: files, terminal, TensorBoard."""

    def step(self, report: StepReport, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...

    def samples(self, rollouts: Sequence[Rollout], step: int) -> None: ...
