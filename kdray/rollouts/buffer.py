"""The rollout buffer: slots plus admission order make `max_staleness` a guarantee.

Samples are numbered in the order they are admitted, and step s trains exactly samples [s * batch_size, (s + 1) * batch_size).
Sample i may be admitted once version i // batch_size - max_staleness is published, and must be drawn by that version or a
newer one; so whatever the replicas' speeds, no token of step s is older than version s - max_staleness. Nothing waits in
completion order, where a slow rollout could come out any number of steps late. At most (max_staleness + 1) batches are in
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
    """The rollouts of one step in admission order, and what the trainer waited for, in seconds."""

    rollouts: list[Rollout]
    wait_rollout_s: float
    """Waiting for samples to be drawn."""
    wait_teacher_s: float
    """Waiting for scores by prefill, after the last sample was drawn."""


class RolloutBuffer:
    """Slots of rollouts between one producer and one trainer, on one asyncio loop."""

    def __init__(self, batch_size: int, max_staleness: int, steps: int, start_step: int = 0) -> None:
        """Args: steps: total steps of the run; start_step: steps already done, which is also the version published now."""
        self._batch_size = batch_size
        self._max_staleness = max_staleness
        self._end = steps * batch_size
        self._next = start_step * batch_size
        self._version = start_step
        self._ready: dict[int, Rollout] = {}
        self._taken = self._next
        self._missing: set[int] = set()
        """Samples that the trainer waits for."""
        self._sampled_at: dict[int, float] = {}
        self._changed = asyncio.Condition()

    def min_version(self, sample_id: int) -> int:
        """Oldest student version that may draw this sample."""
        return max(0, sample_id // self._batch_size - self._max_staleness)

    async def admit(self) -> range:
        """The next sample ids that may be drawn, as soon as there are any; an empty range after the last one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._next < self._limit() or self._next >= self._end)
            admitted = range(self._next, self._limit())
            self._next = admitted.stop
            return admitted

    def _limit(self) -> int:
        return max(self._next, min(self._end, (self._version + self._max_staleness + 1) * self._batch_size))

    async def sampled(self, sample_ids: list[int]) -> None:
        """Note that these were drawn and now wait for scores."""
        async with self._changed:
            now = time.perf_counter()
            for sample_id in sample_ids:
                self._sampled_at.setdefault(sample_id, now)

    async def put(self, rollouts: list[Rollout]) -> None:
        """Store finished rollouts. Raises: EngineError on one that was not admitted, or that came twice."""
        async with self._changed:
            for rollout in rollouts:
                sample_id = rollout.sample_id
                if sample_id in self._ready or not self._taken <= sample_id < self._next:
                    raise EngineError(f"sample {sample_id} arrived that was not asked for, or arrived twice")
                # A black-box teacher may answer with nothing, which no version drew.
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
        """The rollouts of a step, once the last of them is there; their slots are free again from then on.

        Args: on_wait: called with the sample ids that are missing, if any, and with none once they are there or the wait is
              given up.
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
            rollouts = [self._ready.pop(sample_id) for sample_id in wanted]
            self._taken = wanted.stop
        drawn = min(max(last_sampled, started), ended)
        return ReadyBatch(rollouts, wait_rollout_s=drawn - started, wait_teacher_s=ended - drawn)

    async def published(self, version: int) -> None:
        """Replicas can pull `version` from now on: what had to wait for it may be admitted."""
        async with self._changed:
            self._version = version
            self._changed.notify_all()

    def __len__(self) -> int:
        """Finished rollouts that wait to be trained."""
        return len(self._ready)
