"""Checkpoints of a run: their numbering, and the student group that writes the resume state with each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.background_call import in_daemon_thread
from actors.student.checkpoints.rank_files import Saved
from actors.student.group import StudentGroup
from kdray.runs.checkpoints import PHASE_STEP, drop_checkpoints, prune_checkpoints
from kdray.runs.folder import RunFolder
from kdray.runs.remote_copy import StoredRun
from kdray.runs.storage import Storage
from kdray.types import Early, StepReport, TrainBatch


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint and the progress in its marker."""

    folder: Path
    """In the run folder; with `run.storage` the same path below the run's URL, not a local one."""
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.progress["step"])

    @property
    def stage(self) -> str:
        """Stage of the run that it is in: sft, distill, finetune, control."""
        return str(self.progress.get("stage", "distill"))

    @property
    def phase_step(self) -> int:
        """Steps done of a supervised phase that it is in the middle of."""
        return int(self.progress[PHASE_STEP])

    @property
    def within(self) -> dict[str, Any]:
        """Place in such a phase, as events name it; empty if it is in none."""
        return {"phase": self.stage, PHASE_STEP: self.phase_step} if PHASE_STEP in self.progress else {}


@dataclass(frozen=True)
class Numbering:
    """Numbers of checkpoints and student versions beyond those of distillation, which are its steps."""

    steps: int
    """Steps of distillation."""
    finetune_steps: int
    """Steps of fine-tuning; 0 is none."""

    def finetune_checkpoint(self, done: int) -> int:
        """Checkpoint of fine-tuning after `done` of its own steps: distillation's last checkpoint has the number `steps`."""
        return self.steps + 1 + done

    def finetune_done(self, checkpoint: int) -> int:
        """Number of fine-tuning steps done at such a checkpoint."""
        return checkpoint - self.steps - 1

    @property
    def last_checkpoint(self) -> int:
        """The last checkpoint before the control."""
        return self.finetune_checkpoint(self.finetune_steps) if self.finetune_steps else self.steps

    @property
    def last_version(self) -> int:
        """Version of the student that is the run's result."""
        return self.finetuned_version if self.finetune_steps else self.steps

    @property
    def finetuned_version(self) -> int:
        """Version of the student produced by fine-tuning."""
        return self.steps + 1

    @property
    def control_version(self) -> int:
        """Version of the SFT control, after fine-tuning's, whether there was fine-tuning or not."""
        return self.steps + 2


@dataclass(frozen=True)
class Renewal:
    """Periodic update of a teacher that is the student's average."""

    every: int
    """Steps between renewals."""
    decay: float
    """Share of the average that is kept."""


class Pace:
    """How long the latest training step and the latest checkpoint took, by which a stop is planned; seconds."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.save_s = 0.0
        self._began: float | None = None
        self._commits = False

    @contextlib.contextmanager
    def commit(self) -> Iterator[None]:
        """Note that a checkpoint is being completed, which a stop waits for."""
        self._commits = True
        try:
            yield
        finally:
            self._commits = False

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time a training step."""
        self._began = time.monotonic()
        try:
            yield
            self.step_s = time.monotonic() - self._began
        finally:
            self._began = None

    def time_to_stop(self) -> float:
        """Time that the rest of the running step, a checkpoint that is being completed and one more are likely to take."""
        rest = 0.0 if self._began is None else max(0.0, self.step_s - (time.monotonic() - self._began))
        return rest + self.save_s * (2 if self._commits else 1)


@dataclass(frozen=True)
class CheckpointedStudent:
    """A StudentGroup (`kdray.interfaces`) over the ranks, which writes the run's progress with every checkpoint."""

    ranks: StudentGroup
    folder: RunFolder
    stored: StoredRun | None
    keep: int
    """Number of newest checkpoints to keep."""
    progress: dict[str, Any]
    """Entries of every checkpoint's marker, with their values at the time of writing."""
    live: Mapping[str, Callable[[], Any]]
    """Entries computed at the time of writing."""
    renewal: Renewal | None
    on_event: Callable[..., None]
    guard: Callable[[], None]
    """Called before anything is committed or deleted; raises if another driver has taken over the run. It may block."""
    pace: Pace = field(default_factory=Pace)

    async def train_step(
        self, batch: TrainBatch, text: TrainBatch | None = None, scheduled: Mapping[str, float] | None = None
    ) -> StepReport:
        with self.pace.step():
            return await self.ranks.train_step(batch, text, scheduled)

    async def publish(self, version: int) -> None:
        if self.renewal is not None and version % self.renewal.every == 0:
            # Before the student's: a replica that has this version of the student finds the matching teacher.
            await self.ranks.renew(version, self.renewal.decay)
        await self.ranks.publish(version)

    async def save_checkpoint(self, step: int) -> None:
        await self._save(step, None, {})

    async def should_save_early(self) -> Early | None:
        """Return `now`, and say why, if a node with ranks is about to be taken away, `soon` if the batches since the last
        checkpoint take all the disk that they may."""
        if leaving := await self.ranks.leaving():
            self.on_event("checkpoint_early", reason="preemption", ranks=leaving)
            return "now"
        if not await self.ranks.holds_too_much():
            return None
        self.on_event("checkpoint_early", reason="training.replay_gib")
        return "soon"

    async def save_in_phase(self, phase: str, done: int, step: int) -> None:
        """Write a checkpoint in the middle of a supervised phase. Args: done: its steps; step: number of the checkpoint before
        the phase."""
        await self._save(step, f"{phase}-{done:06d}", {PHASE_STEP: done})
        self.on_event("checkpoint", step=step, phase=phase, phase_step=done)

    async def drop(self, phase: str) -> None:
        """Delete the checkpoints of a supervised phase that has ended."""
        await in_daemon_thread(drop_checkpoints, self._storage, phase, self.guard)

    @property
    def _storage(self) -> Storage:
        return Storage.local(self.folder.path) if self.stored is None else self.stored.storage

    async def open_checkpoint(self, step: int) -> OpenedCheckpoint:
        started = time.monotonic()
        await in_daemon_thread(self.guard)
        await self.ranks.open_checkpoint(step, self._progress_now())
        return OpenedCheckpoint(self, step, time.monotonic() - started)

    def _progress_now(self) -> dict[str, Any]:
        return self.progress | {key: entry() for key, entry in self.live.items()}

    async def keep_files(self) -> tuple[int, float]:
        """Send the run's files to its storage, if it has one. Returns: bytes that were sent, and seconds."""
        started = time.monotonic()
        sent = 0 if self.stored is None else await in_daemon_thread(self.stored.send)
        return sent, time.monotonic() - started

    async def _save(self, step: int, name: str | None, place: dict[str, Any]) -> None:
        started = time.monotonic()
        await in_daemon_thread(self.guard)
        # First: once the checkpoint is committed, the files have everything that a resume from it needs.
        files = await self.keep_files()
        saved = await self.ranks.save_checkpoint(step, self._progress_now() | place, name)
        await self.note_saved(step, saved, *files)
        self.pace.save_s = time.monotonic() - started

    async def note_saved(self, step: int, saved: Saved, files_bytes: int, files_s: float) -> None:
        """Report what a committed checkpoint cost, and delete the oldest ones."""
        if self.stored is not None:
            costs = {"bytes": saved.bytes, "write_s": saved.write_s, "store_s": saved.store_s}
            self.on_event("stored", step=step, **costs, files_bytes=files_bytes, files_s=files_s)
        await in_daemon_thread(prune_checkpoints, self._storage, self.keep, self.guard)


class OpenedCheckpoint:
    """An open checkpoint of the ranks (`kdray.interfaces.OpenCheckpoint`)."""

    def __init__(self, student: CheckpointedStudent, step: int, opened_s: float) -> None:
        """Args: opened_s: time that its opening took, seconds."""
        self._student = student
        self._step = step
        self._opened_s = opened_s
        self._files: tuple[int, float] = (0, 0.0)

    async def keep_files(self) -> None:
        self._files = await self._student.keep_files()

    async def commit(self) -> None:
        started = time.monotonic()
        with self._student.pace.commit():
            await in_daemon_thread(self._student.guard)
            saved = await self._student.ranks.commit_checkpoint()
            await self._student.note_saved(self._step, saved, *self._files)
        # Without what it waited for in between, as for an evaluation.
        self._student.pace.save_s = self._opened_s + self._files[1] + time.monotonic() - started
