"""Commands to the student's ranks, and the actor that distributes them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from actors.student.trainer import Phase


@dataclass(frozen=True)
class Command:
    """Command executed by every rank. Fields that a command does not use are None."""

    kind: Literal["phase", "train", "publish", "renew", "save", "export", "stop"]
    phase: Phase | None = None
    checkpoint: str | None = None
    """phase: checkpoint to continue from. save: folder to write."""
    shards: Sequence[ray.ObjectRef] | None = None
    """train: one TrainBatch per rank."""
    text_shards: Sequence[ray.ObjectRef] | None = None
    """train: windows of pretraining text for each rank, if any."""
    scheduled: dict[str, float] | None = None
    """train: settings that differ in this step, by full name."""
    version: int | None = None
    """publish, renew: version number under which the weights, or their average, are published."""
    decay: float | None = None
    """renew: share of the average that is kept."""
    folder: str | None = None
    """export: folder to write."""
    progress: dict[str, Any] | None = None
    """save: contents of the commit marker written with the weights."""


class Mailbox:
    """Log of commands and their results; an actor with async methods. The driver writes, ranks read."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._commands: dict[int, Command] = {}
        self._answers: dict[int, dict[int, Any]] = {}
        self._next = 0
        self._start: tuple[int, int | None, str | None] = (0, None, None)
        self._starts = 0
        self._ranks: dict[int, Any] = {}
        self._killed_at = 0.0
        self._heard_at = time.monotonic()
        self._changed = asyncio.Condition()

    async def post(self, command: Command) -> int:
        """Append a command; returns its index."""
        async with self._changed:
            index = self._next
            self._commands[index] = command
            self._next += 1
            self._changed.notify_all()
            return index

    async def command(self, index: int) -> Command:
        """The command at `index`, once there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: index in self._commands)
            return self._commands[index]

    async def answer(self, index: int, rank: int, result: Any) -> None:
        """Record a rank's result of a command. A rank's first result counts; those of a replay are identical and dropped."""
        async with self._changed:
            self._heard_at = time.monotonic()
            if index not in self._commands:
                return
            self._answers.setdefault(index, {}).setdefault(rank, result)
            command = self._commands[index]
            if command.kind == "save" and len(self._answers[index]) == self._world_size and not self._failure(index):
                self._commit(index, command)
            self._changed.notify_all()

    def _commit(self, index: int, command: Command) -> None:
        """Make restarts begin after this command; earlier ones are no longer needed."""
        phase_index = max(i for i in self._commands if i <= index and self._commands[i].kind == "phase")
        self._start = (index + 1, phase_index, command.checkpoint)
        for old in [i for i in self._commands if i < index and i != phase_index]:
            del self._commands[old]
            self._answers.pop(old, None)

    async def result(self, index: int) -> Any:
        """Rank 0's result of a command, once every rank has finished; or the first error, after which others may never
        finish."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure(index) or len(self._answers.get(index, ())) == self._world_size)
            return self._failure(index) or self._answers[index][0]

    def _failure(self, index: int) -> Exception | None:
        return next((each for each in self._answers.get(index, {}).values() if isinstance(each, Exception)), None)

    async def start(self, rank: int) -> tuple[int, Phase | None, str | None]:
        """Starting point of a new or restarted rank: next command, phase to restore, checkpoint to load."""
        if rank == 0:
            self._starts += 1
        index, phase_index, checkpoint = self._start
        phase = self._commands[phase_index].phase if phase_index is not None else None
        return index, phase, checkpoint

    async def silent_s(self) -> float:
        """Seconds since the last call from any rank."""
        return time.monotonic() - self._heard_at

    async def enter(self, rank: int, actor: Any) -> None:
        """Register a rank's actor, for `kill_ranks`."""
        self._ranks[rank] = actor
        self._heard_at = time.monotonic()

    async def num_entered(self) -> int:
        """Number of ranks that have ever called."""
        return len(self._ranks)

    async def kill_ranks(self) -> None:
        """Kill every rank at once; Ray Train restarts the group."""
        self._heard_at = self._killed_at = time.monotonic()
        for actor in self._ranks.values():
            ray.kill(actor)

    async def heard_since_kill(self) -> bool:
        """True if any rank has called since `kill_ranks`."""
        return self._heard_at > self._killed_at

    async def restarts(self) -> int:
        """Number of times that the whole group was restarted after its first start."""
        return max(0, self._starts - 1)
