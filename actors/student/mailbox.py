"""Commands to the student's ranks, the actor that distributes them, and the restarts that the ranks may still use up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray

from actors.student.kept_batches import KeptBatches
from actors.student.trainer import Phase
from actors.weights.scratch import release, temporary_folder
from kdray.types import TrainBatch

_REFILLING_STEPS = 100
"""Steps without a loss after which the restarts are as good as unused, if no checkpoint is written before."""
_REASON_CHARACTERS = 1000
_COMMITS = ("save", "commit")
"""Commands after which there is a new checkpoint."""


@dataclass(frozen=True)
class Command:
    """Command executed by every rank. Fields that a command does not use are None."""

    kind: Literal["phase", "train", "publish", "renew", "save", "open", "commit", "export", "stop"]
    phase: Phase | None = None
    checkpoint: str | None = None
    """phase: checkpoint to continue from. save: folder to write. open: folder that the next commit completes."""
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
    """save, open: contents of the commit marker written with the weights."""
    kept: int | None = None
    """train: index under which the mailbox has the shards on disk, instead of `shards` and `text_shards` (`Mailbox.shards`)."""


class RestartBudget:
    """Restarts of the ranks without progress in between, of which there may be `training.max_restarts`.

    A failure that every replay repeats uses them up; ranks that are lost now and then do not, however long the run is.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        """Losses since the last progress."""
        self._steps = 0

    def lose(self) -> bool:
        """Count a loss. Returns: False if it is one too many."""
        self._steps = 0
        self.used += 1
        return self.used <= self.limit

    def advance(self, command: Command) -> dict[str, Any] | None:
        """Count a command that all ranks have finished for the first time.

        Returns: how many losses are forgotten and by what, if that is progress and there were any.
        """
        self._steps += command.kind == "train"
        saved = command.kind in _COMMITS
        if not self.used or not (saved or self._steps >= _REFILLING_STEPS):
            return None
        forgotten, self.used = self.used, 0
        return {"losses": forgotten, "by": "checkpoint" if saved else f"{_REFILLING_STEPS} steps"}


class Mailbox:
    """Log of commands and their results; an actor with async methods. The driver writes, ranks read."""

    def __init__(self, world_size: int, max_restarts: int = 0, on_disk: bool = False) -> None:
        """Args: on_disk: move batches that all ranks have trained from Ray's object store to a folder for temporary files."""
        self._world_size = world_size
        self._kept = KeptBatches(temporary_folder()) if on_disk else None
        self._keeping: asyncio.Task[None] | None = None
        self._budget = RestartBudget(max_restarts)
        self._news: list[tuple[str, dict[str, Any]]] = []
        self._commands: dict[int, Command] = {}
        self._answers: dict[int, dict[int, Any]] = {}
        self._next = 0
        self._start: tuple[int, int | None, str | None] = (0, None, None)
        self._starts = 0
        self._ranks: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._killed_at = 0.0
        self._heard_at = time.monotonic()
        self._stored: set[int] = set()
        """Ranks whose files of the open checkpoint are where they belong."""
        self._changed = asyncio.Condition()

    async def post(self, command: Command) -> int:
        """Append a command; returns its index."""
        if command.kind == "train" and self._keeping is not None:
            # So that a disk that is slower than the training slows it down, and the object store holds two batches at most.
            await asyncio.wait({self._keeping})
        async with self._changed:
            index = self._next
            self._commands[index] = command
            if command.kind == "open":
                self._stored = set()
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
            answers, command = self._answers.setdefault(index, {}), self._commands[index]
            is_new = rank not in answers
            answers.setdefault(rank, result)
            if is_new and len(answers) == self._world_size and not self._failure(index):
                if command.kind in _COMMITS:
                    self._commit(index)
                if command.kind == "train" and self._kept is not None:
                    self._keeping = asyncio.create_task(self._keep(index, command))
                if forgotten := self._budget.advance(command):
                    self._news.append(("restarts_refilled", forgotten))
            self._changed.notify_all()

    async def _keep(self, index: int, command: Command) -> None:
        """Move the shards of a command that all ranks have finished from the object store to the disk."""
        assert self._kept is not None
        assert command.shards is not None
        try:
            shards = await asyncio.gather(*map(_value, command.shards))
            text = None if command.text_shards is None else await asyncio.gather(*map(_value, command.text_shards))
            await asyncio.to_thread(self._kept.put, index, shards, text)
        except OSError as error:
            # They stay where they are, which Ray moves to disk when its store is full.
            self._news.append(("batches_not_kept", {"reason": str(error)[:_REASON_CHARACTERS]}))
            return
        if index in self._commands:
            self._commands[index] = replace(command, shards=None, text_shards=None, kept=index)
        else:
            # A checkpoint came first.
            self._kept.drop(index)

    async def shards(self, index: int, rank: int) -> tuple[TrainBatch, TrainBatch | None]:
        """Shard of a command whose shards are on disk, and its text. Raises: TrainingError if they cannot be read."""
        assert self._kept is not None
        return await asyncio.to_thread(self._kept.get, index, rank)

    async def kept_bytes(self) -> int:
        """Size of the batches on disk."""
        return 0 if self._kept is None else self._kept.bytes

    async def note_stored(self, rank: int) -> None:
        """Register that a rank's files of the open checkpoint are stored, or cannot be, as its commit will say."""
        async with self._changed:
            self._stored.add(rank)
            self._changed.notify_all()

    async def stored(self) -> None:
        """Wait until a commit of the open checkpoint would wait for no rank's files."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._stored) == self._world_size)

    def _commit(self, index: int) -> None:
        """Make restarts begin after the command whose state is now a checkpoint; earlier ones are no longer needed.

        Those since then stay, if it was opened and steps were trained before its commit: ranks that restart repeat them.
        """
        at = max(i for i in self._commands if i <= index and self._commands[i].kind in ("save", "open"))
        phase_index = max(i for i in self._commands if i <= at and self._commands[i].kind == "phase")
        self._start = (at + 1, phase_index, self._commands[at].checkpoint)
        for old in [i for i in self._commands if i < at and i != phase_index]:
            del self._commands[old]
            self._answers.pop(old, None)
            if self._kept is not None:
                self._kept.drop(old)

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

    async def lost(self, reason: str, counts: bool) -> str | None:
        """Register the loss of a rank. Args: counts: it is not the cluster that announced it.

        Returns: None if the ranks may be restarted; otherwise the reason of the end of the run.
        """
        async with self._changed:
            may_restart = self._budget.lose() if counts else True
            used, limit = self._budget.used, self._budget.limit
            told = {"reason": reason[:_REASON_CHARACTERS], "counted": counts, "losses": used, "max_restarts": limit}
            self._news.append(("ranks_lost", told))
            self._changed.notify_all()
        if may_restart:
            return None
        since = f"{used} times without a checkpoint or {_REFILLING_STEPS} steps in between" if used > 1 else "once"
        return f"{reason}. The ranks were lost {since} (training.max_restarts={limit})"

    async def tell(self, kind: str, fields: dict[str, Any]) -> None:
        """Add an event of a rank, which waits for something and is not stuck."""
        async with self._changed:
            self._heard_at = time.monotonic()
            self._news.append((kind, fields))
            self._changed.notify_all()

    async def news(self, seen: int) -> list[tuple[str, dict[str, Any]]]:
        """Events of the ranks after the first `seen`, kind and fields, once there are any."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._news) > seen)
            return self._news[seen:]

    async def silent_s(self) -> float:
        """Seconds since the last call from any rank."""
        return time.monotonic() - self._heard_at

    async def enter(self, rank: int, actor: Any, node: str = "") -> None:
        """Register a rank's actor, for `kill_ranks`, and the id of its node."""
        self._ranks[rank] = actor
        self._nodes[rank] = node
        self._heard_at = time.monotonic()

    async def nodes(self) -> dict[int, str]:
        """Id of the node of every rank that has entered."""
        return self._nodes

    async def num_entered(self) -> int:
        """Number of ranks that have ever called."""
        return len(self._ranks)

    async def kill_ranks(self) -> None:
        """Kill every rank at once; Ray Train restarts the group."""
        self._heard_at = self._killed_at = time.monotonic()
        for actor in self._ranks.values():
            ray.kill(actor)

    async def close(self) -> None:
        """Delete the batches on disk."""
        if self._kept is not None:
            await asyncio.to_thread(self._kept.close)
            release()

    async def heard_since_kill(self) -> bool:
        """True if any rank has called since `kill_ranks`."""
        return self._heard_at > self._killed_at

    async def restarts(self) -> int:
        """Number of times that the whole group was restarted after its first start."""
        return max(0, self._starts - 1)


async def _value(reference: Any) -> Any:
    return await reference
