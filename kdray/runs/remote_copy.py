"""Copy of a run folder in `run.storage`: uploads by the driver, and restoring a run from it.

The run folder remains the driver's working copy. Files that a resume needs are uploaded before a checkpoint is committed, and
the results at the end. The storage has the same layout as the run folder, but for the files that only grow: it has them in
segments (`kdray.runs.lines.segments`), each sent once. Storages of earlier versions have them whole, which is read, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from kdray.config import Config
from kdray.errors import ConfigError, DataError, KdrayError
from kdray.runs.checkpoints import COMMITTED
from kdray.runs.folder import LEASE, TRACKER_IDS, RunFolder, unguarded
from kdray.runs.lines.segments import SEGMENTS, GrowingFile, Segment, chain, fetch_segments, matching, segments_of
from kdray.runs.lines.streams import end_of_step, next_step
from kdray.runs.storage import Storage, part_chunks

LEDGER = "ledger.jsonl"
METRICS = "metrics.jsonl"
_LINES = (METRICS, LEDGER)
"""Files with one line per step."""
_GROWING = (*_LINES, "events.jsonl")
"""Files that are only appended to, but for what a resume drops at their end; those in `tb/` are, too."""
_CURVES = "tb"
_FILES = ("config.yaml", "teachers.json", TRACKER_IDS)
_FOLDERS = ("samples", "evaluations")
_RESULTS = ("summary.json", "report.html")
_UNREAD = ("checkpoints/", "logs/", "peers/", "capture/", LEASE)
"""Files that are not needed by the commands that read a run."""


class StoredRun:
    """A run's folder and its copy in the storage."""

    def __init__(self, folder: RunFolder, storage: Storage) -> None:
        self.folder = folder
        self.storage = storage
        self.guard: Callable[[], None] = unguarded
        """Called before anything is sent; raises if another driver has taken over the run."""
        self._sent: dict[str, tuple[int, int]] = {}
        """Modification time and size of uploaded files, by key."""
        self._left = self._stats(self._below(*_FOLDERS))
        """The same of files that earlier drivers left here: of those that are in the storage nothing is to be sent. One of a
        step after the checkpoint, which may differ from the stored one, is written again before the next upload."""
        self._growing: dict[str, GrowingFile] = {}
        self._found: dict[str, list[Segment]] | None = None
        """Segments in the storage before the first upload."""

    @classmethod
    def of(cls, config: Config) -> StoredRun | None:
        """Open the config's run; None without `run.storage`. Raises: ConfigError if it cannot be written."""
        if config.run.storage is None:
            return None
        stored = cls(RunFolder(config.run_folder.absolute()), Storage(config.run.storage, config.run.name))
        if stored.storage.is_local and Path(stored.storage.root).resolve() == config.run_folder.resolve():
            raise ConfigError(
                f"run.storage={config.run.storage}: that is run.output itself; leave run.storage out, the run folder is there"
            )
        stored.storage.check()
        if stored.storage.is_local and config.peers:
            # Parent folder of the peers' storages; peers treat it as a share that must already exist.
            stored.storage.path("peers").mkdir(exist_ok=True)
        return stored

    # ----------------------------------------------------------------------------------------------------- sending

    def send(self) -> int:
        """Upload the changed files among those that a resume needs; return the bytes sent. Raises: StorageError; LeaseLost."""
        self.guard()
        # Those with a line for each step first: what others say of steps is then there, too.
        return self._send_growing([*_GROWING, *self._below(_CURVES)]) + self._send([*_FILES, *self._below(*_FOLDERS)])

    def send_results(self) -> int:
        """Upload the results too; the ranks have already uploaded the student."""
        return self.send() + self._send(list(_RESULTS))

    def _send_growing(self, names: Iterable[str]) -> int:
        if self._found is None:
            self._found = segments_of(self.storage.list(SEGMENTS))
            # Of an earlier version, which had them whole: segments replace them.
            whole = {name for name in self.storage.list() if name in _GROWING or name.startswith(f"{_CURVES}/")}
        else:
            whole = set()
        found = self._found
        there = [name for name in names if (self.folder.path / name).is_file()]
        for name in there:
            if name not in self._growing:
                self._growing[name] = GrowingFile(self.storage, name, self.folder.path / name)
        sent = self.storage.several(lambda name: self._growing[name].send(found.get(name, [])), there)
        for name in whole & set(there):
            self.storage.delete(name)
        return sum(sent.values())

    def _below(self, *folders: str) -> list[str]:
        path = self.folder.path
        return [
            file.relative_to(path).as_posix()
            for name in folders
            for file in sorted((path / name).rglob("*"))
            # Skip temporary files, which are renamed once complete.
            if file.is_file() and not file.name.startswith(".") and file.suffix != ".partial"
        ]

    def _send(self, names: list[str]) -> int:
        if self._left:
            stored = {key: size for folder in _FOLDERS for key, size in self.storage.list(folder).items()}
            self._sent = {name: stat for name, stat in self._left.items() if stored.get(name) == stat[1]} | self._sent
            self._left = {}
        # Before reading, so that lines appended meanwhile are sent the next time.
        changed = {name: stat for name, stat in self._stats(names).items() if self._sent.get(name) != stat}
        digests = self.storage.put_files({name: self.folder.path / name for name in changed})
        self._sent |= changed
        return sum(digest.size for digest in digests.values())

    def _stats(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Modification time and size of the files that are there, by name."""
        found = {}
        for name in names:
            path = self.folder.path / name
            if path.is_file():
                stat = path.stat()
                found[name] = (stat.st_mtime_ns, stat.st_size)
        return found

    # ---------------------------------------------------------------------------------------------------- fetching

    def refuse_another(self) -> None:
        """Check that the name is free. Raises: ConfigError if the storage holds something that a run of that name has saved."""
        there = self.storage.list()
        trained = {*_LINES, *_RESULTS} & (there.keys() | segments_of(there).keys())
        # A start that ended before anything was saved is begun anew, as in the run folder: its segments stay in the chain.
        committed = any(name.startswith(("checkpoints/", "student/")) and name.endswith(f"/{COMMITTED}") for name in there)
        if trained or committed:
            raise ConfigError(f"{self.storage.url}: already holds a run; continue it with --resume, or choose another run.name")

    def fetch(self, step: int) -> bool:
        """Prepare the run folder for continuing from `step`; return True if files were fetched for it.

        Local files are kept if they match the stored history up to that step: there is a config.yaml, and what the storage has
        of metrics.jsonl and ledger.jsonl for the steps up to it are the first lines here. Otherwise (there are none, they end
        earlier, or another machine continued from an earlier step) the stored files replace them.
        Raises: StorageError, DataError.
        """
        there = self.storage.list()
        if self.folder.config.is_file() and all(self._tells(name, step, there) for name in _LINES):
            return False
        if "config.yaml" not in there:
            return False
        wanted = {*_FILES, *_GROWING}
        folders = tuple(f"{each}/" for each in (*_FOLDERS, _CURVES))
        _get(self.storage, there, self.folder.path, lambda name: name in wanted or name.startswith(folders))
        self._left = self._stats(self._below(*_FOLDERS))
        return True

    def _tells(self, name: str, step: int, there: Iterable[str]) -> bool:
        """Return True if the local file begins with the stored lines of the steps up to `step`."""
        path = self.folder.path / name
        parts = chain(segments_of(there).get(name, []))
        if not parts and name not in there:
            return True
        try:
            end, _ = end_of_step(path, step)
        except DataError:
            # Damaged; the stored file is intact.
            return False
        # Lines up to `end` count here. Whole segments are told by their names, and the one in which they end is read.
        same = matching(parts, path, end)
        begin = same[-1].end if same else 0
        key = name if not parts else f"{SEGMENTS}/{name}/{parts[len(same)].name}" if len(same) < len(parts) else None
        if key is None:
            return True
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part"
            size = self.storage.get(key, part).size
            here, stored = (part_chunks(path, begin, end), part_chunks(part, 0, end - begin))
            if size < end - begin or any(one != other for one, other in zip(here, stored, strict=True)):
                return False
            following = next_step(part, end - begin)
            return following is None or following > step


def _get(storage: Storage, there: Iterable[str], to: Path, wanted: Callable[[str], bool]) -> None:
    """Download the wanted files of a run, by their names in the run folder; those in segments are put together."""
    segments = {name: found for name, found in segments_of(there).items() if wanted(name)}
    whole = [key for key in there if wanted(key) and not key.startswith(f"{SEGMENTS}/") and key not in segments]
    storage.get_files({name: to / name for name in whole})
    fetch_segments(storage, {name: to / name for name in segments}, segments)


def num_stored_lines(storage: Storage, name: str) -> int:
    """Count the lines of a file of a run in its storage, or in a run folder."""
    there = storage.list()
    with tempfile.TemporaryDirectory() as folder:
        _get(storage, there, Path(folder), lambda each: each == name)
        path = Path(folder) / name
        return sum(1 for _ in path.open("rb")) if path.is_file() else 0


def fetch_results(url: str, to: Path) -> Path:
    """Copy a run from its storage, without checkpoints, into a new folder `to`.

    Raises: DataError if there is no run, or the storage cannot be read.
    """
    storage = Storage(url, patience_s=15.0)
    try:
        there = storage.list()
        if "config.yaml" not in there:
            raise DataError(f"{url}: holds no run (there is no config.yaml); give a URL such as s3://bucket/folder/<name>")
        _get(storage, there, to, lambda name: not name.startswith(_UNREAD))
    except (KdrayError, OSError, ValueError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{url}: cannot be read: {error}") from error
    return to
