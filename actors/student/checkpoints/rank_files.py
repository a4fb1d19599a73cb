"""Files that a rank writes for a run, and reads again: in the run folder, or in the storage if nodes share no folder.

Every rank writes its part to a folder of its own, and a thread uploads it, beside training if the checkpoint is only opened;
once all have, rank 0 writes the marker. Ranks fail together: an error on one is raised on all, so that none waits for it.
Names of what they write contain the owner of the run's lease: ranks of a driver that stood still share none with those of its
successor.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from actors.student.trainer import Phase, StudentTrainer
from kdray.errors import DataError, LeaseLost, StorageError, TrainingError
from kdray.models.saving import TokenizerSource
from kdray.runs.checkpoints import FILES, FOLDER, begin, clear, commit, differing, folder_of, read_marker, within
from kdray.runs.lease import Ticket
from kdray.runs.storage import FileDigest, Storage

T = TypeVar("T")
Stored = tuple[dict[str, FileDigest], float]
"""Digests of a rank's files by their path, and the seconds until all were in their place."""

_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Saved:
    """Cost of a checkpoint; zero if it already existed."""

    bytes: int = 0
    """Total over all ranks."""
    write_s: float = 0.0
    """Rank 0: time to write the state to its own folder."""
    store_s: float = 0.0
    """Time to move it to its final place, the slowest rank's; beside training, if the checkpoint was opened."""


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that is not committed."""

    key: str
    progress: dict[str, Any]
    own: Path
    """Folder of this rank."""
    stored: Future[Stored]
    write_s: float


class RankFiles:
    """A rank's access to the files of its run. Call `close` at the end."""

    def __init__(
        self,
        trainer: StudentTrainer,
        run_folder: Path,
        storage: str | None,
        lease: Ticket | None = None,
        on_retry: Callable[[dict[str, Any]], Any] = lambda retry: None,
    ) -> None:
        """Args: storage: URL of the run in `run.storage`; None if there is only the run folder; lease: the run's, without which
        nothing is committed or deleted; None if there is none; on_retry: called before an operation on the storage is tried
        again, in any thread: rank, what, attempt, reason."""
        self._trainer = trainer
        self._lease = lease
        self._mine = folder_of(None if lease is None else lease.owner)
        self._run_folder = run_folder
        self._storage = Storage.local(run_folder) if storage is None else Storage(storage)
        self._storage.on_retry = lambda retry: on_retry({"rank": trainer.rank, **asdict(retry)})
        self._loaded: str | None = None
        self._opened: _Opened | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Next to the checkpoints, a rename publishes a folder; if they are elsewhere, Ray Train's folder on this node will do.
        beside = run_folder / "checkpoints" if storage is None else Path.cwd()
        name = f".rank-{trainer.rank}"
        self._scratch = beside / (f"{name}.{self._mine}" if self._mine else name)
        remains = [path for path in beside.glob(".rank-*") if self._is_mine(path)]
        if any(path != self._scratch for path in remains):
            # Not those of a driver at work.
            self._check_lease()
        # Of killed ranks with this number, or with one that there is no rank for any more.
        for path in remains:
            shutil.rmtree(path, ignore_errors=True)
        self._scratch.mkdir(parents=True)

    def _is_mine(self, path: Path) -> bool:
        """True for what a rank with this number left, and for rank 0 also what those left that a start with more ranks had."""
        number = path.name.removeprefix(".rank-").partition(".")[0]
        if not number.isdecimal():
            return False
        return int(number) == self._trainer.rank or (self._trainer.rank == 0 and int(number) >= self._trainer.world_size)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    # ----------------------------------------------------------------------------------------------------- writing

    def save(self, folder: Path, progress: dict[str, Any]) -> Saved:
        """Write a checkpoint atomically; an existing one (from a replay, or the one that was loaded) is left unchanged."""
        self.open(folder, progress)
        return self.commit()

    def open(self, folder: Path, progress: dict[str, Any], on_stored: Callable[[], Any] = lambda: None) -> None:
        """Write the state to a folder of this rank, from where a thread moves it to its place while training goes on.

        Nothing is a checkpoint before `commit`, which has to follow before the next one; an existing one is left unchanged.
        Args: on_stored: called once `commit` would not wait for this rank's files, in any thread.
        """
        key, first = self._key(folder), self._trainer.rank == 0

        def wanted() -> bool:
            if first:
                self._check_lease()
            return first and begin(self._storage, key, self._mine, known=key == self._loaded)

        self._abandon()
        if not self._together(wanted)[0]:
            on_stored()
            return
        started = time.perf_counter()
        own = self._new_folder()
        try:
            self._write(own, lambda: self._trainer.save(own))
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise
        place, written = within(key, self._mine), time.perf_counter()

        def store() -> Stored:
            digests = self._storage.put_tree(own, place, move=True)
            return digests, time.perf_counter() - written

        stored = self._thread.submit(store)
        self._opened = _Opened(key, progress, own, stored, written - started)
        stored.add_done_callback(lambda _: on_stored())

    def commit(self) -> Saved:
        """Complete the open checkpoint, waiting for its files; no-op if it was there already."""
        opened = self._opened
        if opened is None:
            return Saved()
        first = self._trainer.rank == 0
        try:
            answers = self._together(opened.stored.result)
        finally:
            self._abandon()
        parts = [part for part, _ in answers]

        def committed() -> None:
            if first:
                # A driver that stood still for long may have been followed by another one, which has checkpoints of its own.
                commit(self._storage, opened.key, opened.progress, parts, self._mine, self._check_lease)
                if self._mine:
                    self._check_lease()
                    clear(self._storage, opened.key, self._mine)

        self._together(committed)
        return Saved(
            bytes=sum(digest.size for part in parts for digest in part.values()),
            write_s=opened.write_s,
            store_s=max(seconds for _, seconds in answers),
        )

    def _abandon(self) -> None:
        """Forget the open checkpoint, and delete what is left of it in this rank's folder."""
        if self._opened is not None:
            shutil.rmtree(self._opened.own, ignore_errors=True)
            self._opened = None

    def export(self, folder: Path, tokenizer: TokenizerSource, ids: Sequence[int] = ()) -> None:
        """Write the student as a Hugging Face folder, with a marker that distinguishes it from an interrupted one.

        Args: ids: as for `StudentTrainer.export`.
        """
        key = self._key(folder)

        def store(own: Path) -> None:
            if self._trainer.rank == 0:
                self._check_lease()
                self._storage.delete(key)
                commit(self._storage, key, {}, [self._storage.put_tree(own, key, move=True)])

        with self._own_folder() as own:
            self._write(own, lambda: self._trainer.export(own, tokenizer, ids))
            self._together(lambda: store(own))

    # ----------------------------------------------------------------------------------------------------- reading

    def start_phase(self, phase: Phase, checkpoint: Path | None) -> None:
        """Start a phase, from a model that is fetched from the run's storage if this run wrote it; then load the checkpoint."""
        base = Path(phase.model)
        if base.is_relative_to(self._run_folder / "checkpoints"):
            with self._fetched(base) as here:
                self._trainer.start_phase(replace(phase, model=str(here)))
        else:
            self._trainer.start_phase(phase)
        if checkpoint is not None:
            with self._fetched(checkpoint) as here:
                others = any(self._together(lambda: self._trainer.backend.reads_every_rank(here)))
                with self._fetched(checkpoint, of_all=True) if others else nullcontext(here) as whole:
                    self._trainer.load(whole)
            self._loaded = self._key(checkpoint) if checkpoint.is_relative_to(self._run_folder) else None

    @contextmanager
    def _fetched(self, folder: Path, of_all: bool = False) -> Iterator[Path]:
        """A folder on this node with the files of one that the run wrote, verified against their record.

        Args: of_all: true for the files of every rank; otherwise those of this rank and of rank 0.
        """
        with self._own_folder() as own:
            yield self._together(lambda: self._fetch(folder, own, of_all))[self._trainer.rank]

    def _fetch(self, folder: Path, into: Path, of_all: bool) -> Path:
        storage, key = self._storage, folder.name
        marker = None
        if folder.is_relative_to(self._run_folder):
            key = self._key(folder)
            marker = read_marker(storage, key)
        if marker is None:
            # From a run that had no storage then, or from another run.
            storage, key = Storage.local(folder.parent), folder.name
            marker = read_marker(storage, key)
        if marker is None:
            raise DataError(f"{folder}: was not committed, neither there nor in {self._storage.url}")
        # Other ranks' files are read by those ranks only, except rank 0's: it writes the files shared by all.
        mine = {name: file for name, file in marker[FILES].items() if of_all or file["rank"] in (0, self._trainer.rank)}
        needed = {name: f"{key}/{name}" for name in mine}
        if storage.is_local:
            found, here = storage.digests(needed.values()), storage.path(key)
        else:
            found, here = storage.get_files({each: into / name for name, each in needed.items()}), into
        reason = differing(mine, {name: found[each] for name, each in needed.items()})
        if reason is not None:
            raise DataError(f"{storage.url}/{key}: {reason}; --resume takes the newest checkpoint that is whole")
        return here / marker.get(FOLDER, "")

    # ------------------------------------------------------------------------------------------------------ inside

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check(self._storage.on_retry)

    def _key(self, folder: Path) -> str:
        return folder.relative_to(self._run_folder).as_posix()

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._scratch))

    @contextmanager
    def _own_folder(self) -> Iterator[Path]:
        own = self._new_folder()
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _write(self, own: Path, work: Callable[[], None]) -> None:
        """Write into a folder of this node, together with the other ranks. Raises: StorageError, on this rank only, if it is
        full.

        The others may then be waiting for this rank, inside `work`.
        """
        try:
            work()
        except Exception as error:
            # Writers raise their own errors for a full disk, and so do lost ranks: only the disk itself can tell.
            reason = _unwritable(own)
            if reason is None:
                raise
            raise StorageError(f"rank {self._trainer.rank}: {own} cannot be written: {reason}") from error

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Results of `work` on every rank, in rank order.

        Raises: TrainingError or StorageError on all ranks if it failed on any.
        """
        result: Any = None
        problem: tuple[bool, str] | None = None
        try:
            result = work()
        except (StorageError, DataError, LeaseLost, OSError) as error:
            problem = isinstance(error, StorageError), str(error)
        answers = self._trainer.gather((result, problem))
        for rank, (_, failed) in enumerate(answers):
            if failed is not None:
                kind = StorageError if failed[0] else TrainingError
                raise kind(f"rank {rank}: {failed[1]}")
        return [each for each, _ in answers]


def _unwritable(folder: Path) -> str | None:
    """Reason why a folder cannot be written to; None if it can."""
    probe = folder / ".probe"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None
