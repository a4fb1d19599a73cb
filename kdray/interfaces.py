"""Protocols of everything that the training loop is given. None of them mentions Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from kdray.errors import TeacherGone
from kdray.types import Rollout, SampleRequest, StepReport, TrainBatch


class Availability:
    """State of a teacher: available, or lost with a reason while no replica can answer.

    A final loss is not transient: a replica that came back was rejected, and so would be the next.
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
        """Stream each request's rollout exactly once, in completion order; rollouts that finish together form one item.

        Raises: EngineError if a request could not be served within the pool's retries.
        """
        ...


class Scorer(Protocol):
    """A teacher that scores sequences sampled elsewhere, by prefill."""

    name: str

    def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """Stream each rollout exactly once with this teacher's columns filled in.

        The new support starts with the rollout's `support_ids`, if any; with `top_k`, the teacher's own top ids follow.
        """
        ...


class Teacher(Sampler, Scorer, Protocol):
    """A named pool that samples together with the student and scores rollouts sampled elsewhere."""

    availability: Availability
    """Availability of the teacher, and the reason while it is lost."""


class OpenCheckpoint(Protocol):
    """A checkpoint whose state is set aside, and which no resume uses yet."""

    async def keep_files(self) -> None:
        """Store what a resume needs of the run's own files. Lines of steps are not added to them meanwhile."""
        ...

    async def commit(self) -> None:
        """Complete the checkpoint; training goes on meanwhile."""
        ...


class Student(Protocol):
    """All ranks of the student as a unit: a call reaches every rank, and a failure of one rank fails the call."""

    async def train_step(
        self, batch: TrainBatch, text: TrainBatch | None = None, scheduled: Mapping[str, float] | None = None
    ) -> StepReport:
        """Run one optimizer step on a batch, together with a batch of pretraining text if given.

        Args: scheduled: settings whose values differ in this step, by full name, such as loss.beta.
        If a loss or gradient is not finite, the weights stay as they are: the report says that the batch was left out, if the
        settings allow that. Raises: TrainingError naming the samples if not.
        """
        ...

    async def publish(self, version: int) -> None:
        """Offer the current weights to all replicas as `version`. Returns once they are copied: requests that need the version
        wait for it."""
        ...

    async def save_checkpoint(self, step: int) -> None:
        """Write a checkpoint that a later run can resume from. Returns once it is committed."""
        ...

    async def open_checkpoint(self, step: int) -> OpenCheckpoint:
        """Set the present state aside, to become a checkpoint beside the next steps. Returns once training may change it.

        One at a time: the one before is complete, or given up.
        """
        ...


class Reporter(Protocol):
    """Sink for numbers and events: files, terminal, trackers."""

    def step(self, report: StepReport, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...

    def samples(self, rollouts: Sequence[Rollout], step: int) -> None: ...
