"""Copy of a run folder in `run.storage`: uploads by the driver, and restoring a run from it.

The run folder remains the driver's working copy. Files that a resume needs are uploaded before a checkpoint is committed, and
the results at the end. The storage has the same layout as the run folder.
"""

from __future__ import annotations

from pathlib import Path

from kdray.config import Config
from kdray.errors import ConfigError, DataError, KdrayError
from kdray.runs.checkpoints import COMMITTED
from kdray.runs.folder import LEASE, TRACKER_IDS, RunFolder, parse_lines, read_lines
from kdray.runs.storage import Storage

LEDGER = "ledger.jsonl"
_LINES = ("metrics.jsonl", LEDGER)
"""Files with one line per step."""
_FILES = ("config.yaml", *_LINES, "events.jsonl", "teachers.json", TRACKER_IDS)
_FOLDERS = ("samples", "evaluations", "tb")
_RESULTS = ("summary.json", "report.html")
_UNREAD = ("checkpoints/", "logs/", "peers/", "capture/", LEASE)
"""Files that are not needed by the commands that read a run."""


class StoredRun:
    """A run's folder and its copy in the storage."""

    def __init__(self, folder: RunFolder, storage: Storage) -> None:
        self.folder = folder
        self.storage = storage
        self._sent: dict[str, tuple[int, int]] = {}
        """Modification time and size of uploaded files, by key."""

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
        """Upload the changed files among those that a resume needs; return the bytes sent. Raises: StorageError."""
        return self._send([*_FILES, *self._below(*_FOLDERS)])

    def send_results(self) -> int:
        """Upload the results too; the ranks have already uploaded the student."""
        return self.send() + self._send(list(_RESULTS))

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
        changed = {}
        for name in names:
            path = self.folder.path / name
            if path.is_file():
                # Stat before reading, so that lines appended meanwhile are sent the next time.
                stat = path.stat()
                if self._sent.get(name) != (stat.st_mtime_ns, stat.st_size):
                    changed[name] = (stat.st_mtime_ns, stat.st_size)
        digests = self.storage.put_files({name: self.folder.path / name for name in changed})
        self._sent |= changed
        return sum(digest.size for digest in digests.values())

    # ---------------------------------------------------------------------------------------------------- fetching

    def refuse_another(self) -> None:
        """Check that the name is free. Raises: ConfigError if the storage already holds a run of that name."""
        held = self.storage.read("config.yaml") is not None
        if held or any(name.endswith(f"/{COMMITTED}") for name in self.storage.list("checkpoints")):
            raise ConfigError(f"{self.storage.url}: already holds a run; continue it with --resume, or choose another run.name")

    def fetch(self, step: int) -> bool:
        """Prepare the run folder for continuing from `step`; return True if files were fetched for it.

        Local files are kept if they match the stored history up to that step: there is a config.yaml, and metrics.jsonl and
        ledger.jsonl have exactly the stored lines for the steps up to it. Otherwise (there are none, they end earlier, or
        another machine continued from an earlier step) the stored files replace them.
        Raises: StorageError, DataError.
        """
        if self.folder.config.is_file() and all(self._tells(name, step) for name in _LINES):
            return False
        there = self.storage.list()
        wanted = [name for name in there if name in _FILES or name.startswith(tuple(f"{each}/" for each in _FOLDERS))]
        if "config.yaml" not in wanted:
            return False
        self.storage.get_files({name: self.folder.path / name for name in wanted})
        return True

    def _tells(self, name: str, step: int) -> bool:
        """Return True if the local file has the stored lines of the steps up to `step`."""
        path = self.folder.path / name
        stored = self.storage.read(name)
        if stored is None:
            return True
        try:
            here = read_lines(path) if path.is_file() else []
        except DataError:
            # Damaged; the stored file is intact.
            return False
        there = parse_lines(stored.decode("utf-8"), f"{self.storage.url}/{name}")
        return [line for line in here if line["step"] <= step] == [line for line in there if line["step"] <= step]


def fetch_results(url: str, to: Path) -> Path:
    """Copy a run from its storage, without checkpoints, into a new folder `to`.

    Raises: DataError if there is no run, or the storage cannot be read.
    """
    storage = Storage(url, patience_s=15.0)
    try:
        names = [name for name in storage.list() if not name.startswith(_UNREAD)]
        if "config.yaml" not in names:
            raise DataError(f"{url}: holds no run (there is no config.yaml); give a URL such as s3://bucket/folder/<name>")
        storage.get_files({name: to / name for name in names})
    except (KdrayError, OSError, ValueError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{url}: cannot be read: {error}") from error
    return to
