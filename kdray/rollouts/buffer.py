"""Rollout buffer, whose slots and admission order guarantee `max_staleness`.

Samples are numbered in order of admission, and step s trains exactly samples [s * batch_size, (s + 1) * batch_size).
Sample i may be admitted once version i // batch_size - max_staleness is published, and must be sampled by that version or a
newer one; so at any replica speed, no token of step s is older than version s - max_staleness. Rollouts are not consumed in
completion order, under which a slow one could be any number of steps late. At most (max_staleness + 1) batches are in
flight or waiting, which bounds memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdray.errors import EngineError
from kdray.types import Rollout


@dataclass(frozen=True, slots=True)
class ReadyBatch:
    """Rollouts of one step in admission order, with the trainer's waiting times in seconds."""

    rollouts: list[Rollout]
    wait_rollout_s: float
    """Time spent waiting for samples."""
    wait_teacher_s: float
    """Time spent waiting for scores by prefill, after the last sample was drawn."""
    queue_age_s: float
    """Age of the oldest rollout in flight or waiting when the batch was taken, since its admission. It is in this batch."""


class RolloutBuffer:
    """Buffer of rollouts between one producer and one trainer, on one asyncio loop."""

    def __init__(self, batch_size: int, max_staleness: int, steps: int, start_step: int = 0) -> None:
        """Args: steps: total steps of the run; start_step: steps already done, which is also the published version."""
        self._batch_size = batch_size
        self._max_staleness = max_staleness
        self._end = steps * batch_size
        self._next = start_step * batch_size
        self._version = start_step
        self._ready: dict[int, Rollout] = {}
        self._taken = self._next
        self._missing: set[int] = set()
        """Samples that the trainer waits for."""
        self._admitted_at: dict[int, float] = {}
        self._sampled_at: dict[int, float] = {}
        self._changed = asyncio.Condition()

    def min_version(self, sample_id: int) -> int:
        """Oldest student version that may draw this sample."""
        return max(0, sample_id // self._batch_size - self._max_staleness)

    async def admit(self) -> range:
        """Wait for sample ids that may be drawn, and return them; an empty range after the last one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._next < self._limit() or self._next >= self._end)
            admitted = range(self._next, self._limit())
            self._next = admitted.stop
            self._admitted_at |= dict.fromkeys(admitted, time.perf_counter())
            return admitted

    def _limit(self) -> int:
        return max(self._next, min(self._end, (self._version + self._max_staleness + 1) * self._batch_size))

    async def sampled(self, sample_ids: list[int]) -> None:
        """Record that these samples were drawn and now wait for scores."""
        async with self._changed:
            now = time.perf_counter()
            for sample_id in sample_ids:
                self._sampled_at.setdefault(sample_id, now)

    async def put(self, rollouts: list[Rollout]) -> None:
        """Store finished rollouts. Raises: EngineError if one was not admitted, is too old, or arrives twice."""
        async with self._changed:
            for rollout in rollouts:
                sample_id = rollout.sample_id
                if sample_id in self._ready or not self._taken <= sample_id < self._next:
                    raise EngineError(f"sample {sample_id} arrived that was not asked for, or arrived twice")
                # A black-box teacher may return an empty response, which has no version.
                if rollout.num_targets and rollout.oldest_version < self.min_version(sample_id):
                    raise EngineError(
                        f"sample {sample_id} was drawn by student version {rollout.oldest_version}, "
                        f"but needs {self.min_version(sample_id)} or newer"
                    )
                self._ready[sample_id] = rollout
                self._missing.discard(sample_id)
                self._sampled_at.setdefault(sample_id, time.perf_counter())
            self._changed.notify_all()

    async def batch(self, step: int, on_wait: Callable[[Sequence[int]], None] = lambda missing: None) -> ReadyBatch:
        """Wait for all rollouts of a step and return them, which frees their slots.

        Args: on_wait: called with the missing sample ids, if any, and with none once they have arrived or the wait is
              cancelled.
        """
        wanted = range(step * self._batch_size, (step + 1) * self._batch_size)
        started = time.perf_counter()
        async with self._changed:
            if missing := [sample_id for sample_id in wanted if sample_id not in self._ready]:
                self._missing = set(missing)
                on_wait(missing)
                try:
                    await self._changed.wait_for(lambda: not self._missing)
                finally:
                    on_wait(())
            ended = time.perf_counter()
            last_sampled = max(self._sampled_at.pop(sample_id) for sample_id in wanted)
            first_admitted = min(self._admitted_at.pop(sample_id) for sample_id in wanted)
            rollouts = [self._ready.pop(sample_id) for sample_id in wanted]
            self._taken = wanted.stop
        drawn = min(max(last_sampled, started), ended)
        return ReadyBatch(
            rollouts, wait_rollout_s=drawn - started, wait_teacher_s=ended - drawn, queue_age_s=ended - first_admitted
        )

    async def published(self, version: int) -> None:
        """Record that replicas can now pull `version`, and admit the samples that waited for it."""
        async with self._changed:
            self._version = version
            self._changed.notify_all()

    def __len__(self) -> int:
        """Number of finished rollouts waiting to be trained on."""
        return len(self._ready)
