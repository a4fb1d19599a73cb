"""The copy of a run folder in `run.storage`: what the driver sends there, and how a run comes back from it.

The run folder stays the driver's working copy. Before a checkpoint is committed, what a resume from it needs is sent; at the
end, the results. The storage's layout is the run folder's.
"""

from __future__ import annotations

from pathlib import Path

from kdray.config import Config
from kdray.errors import ConfigError, DataError, KdrayError
from kdray.runs.checkpoints import COMMITTED
from kdray.runs.folder import RunFolder, parse_lines, read_lines
from kdray.runs.storage import Storage

LEDGER = "ledger.jsonl"
_LINES = ("metrics.jsonl", LEDGER)
"""Files with a line a step."""
_FILES = ("config.yaml", *_LINES, "events.jsonl", "teachers.json")
_FOLDERS = ("samples", "tb")
_RESULTS = ("summary.json", "report.html")
_UNREAD = ("checkpoints/", "logs/", "peers/", "capture/")
"""What the commands that read a run do not need."""


class StoredRun:
    """A run's folder, and its copy in the storage."""

    def __init__(self, folder: RunFolder, storage: Storage) -> None:
        self.folder = folder
        self.storage = storage
        self._sent: dict[str, tuple[int, int]] = {}
        """Change time and size of what was sent, by key."""

    @classmethod
    def of(cls, config: Config) -> StoredRun | None:
        """The config's run; None without `run.storage`. Raises: ConfigError where it cannot be written."""
        if config.run.storage is None:
            return None
        stored = cls(RunFolder(config.run_folder.absolute()), Storage(config.run.storage, config.run.name))
        if stored.storage.is_local and Path(stored.storage.root).resolve() == config.run_folder.resolve():
            raise ConfigError(
                f"run.storage={config.run.storage}: that is run.output itself; leave run.storage out, the run folder is there"
            )
        stored.storage.check()
        if stored.storage.is_local and config.peers:
            # What theirs lies in, which they take for a share that has to be there.
            stored.storage.path("peers").mkdir(exist_ok=True)
        return stored

    # ----------------------------------------------------------------------------------------------------- sending

    def send(self) -> int:
        """Send what changed of the files that a resume needs; the bytes sent. Raises: StorageError."""
        return self._send([*_FILES, *self._below(*_FOLDERS)])

    def send_results(self) -> int:
        """Send the results beside; the student is there already, from the ranks."""
        return self.send() + self._send(list(_RESULTS))

    def _below(self, *folders: str) -> list[str]:
        path = self.folder.path
        return [
            file.relative_to(path).as_posix()
            for name in folders
            for file in sorted((path / name).rglob("*"))
            # Half-written ones are renamed when they are whole.
            if file.is_file() and not file.name.startswith(".") and file.suffix != ".partial"
        ]

    def _send(self, names: list[str]) -> int:
        changed = {}
        for name in names:
            path = self.folder.path / name
            if path.is_file():
                # Looked at before it is read: what is appended meanwhile is sent the next time.
                stat = path.stat()
                if self._sent.get(name) != (stat.st_mtime_ns, stat.st_size):
                    changed[name] = (stat.st_mtime_ns, stat.st_size)
        digests = self.storage.put_files({name: self.folder.path / name for name in changed})
        self._sent |= changed
        return sum(digest.size for digest in digests.values())

    # ---------------------------------------------------------------------------------------------------- fetching

    def refuse_another(self) -> None:
        """Raises: ConfigError where the storage holds a run of that name already."""
        held = self.storage.read("config.yaml") is not None
        if held or any(name.endswith(f"/{COMMITTED}") for name in self.storage.list("checkpoints")):
            raise ConfigError(f"{self.storage.url}: already holds a run; continue it with --resume, or choose another run.name")

    def fetch(self, step: int) -> bool:
        """Make the run folder one that a run may continue from `step` in; whether files were fetched for that.

        The local files win where they tell the stored history at least up to that step: there is a config.yaml, and of the
        steps up to it metrics.jsonl and ledger.jsonl hold the very lines that the stored ones hold. Otherwise (there are none,
        they end earlier, or another machine went on from an earlier step) the stored ones replace them.
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
        """Whether the local file has the stored lines of the steps up to `step`."""
        path = self.folder.path / name
        stored = self.storage.read(name)
        if stored is None:
            return True
        try:
            here = read_lines(path) if path.is_file() else []
        except DataError:
            # Damaged: the stored one is not.
            return False
        there = parse_lines(stored.decode("utf-8"), f"{self.storage.url}/{name}")
        return [line for line in here if line["step"] <= step] == [line for line in there if line["step"] <= step]


def fetch_results(url: str, to: Path) -> Path:
    """Copy what a run left in its storage, without checkpoints, into a new folder `to`.

    Raises: DataError where there is no run, or the storage cannot be read.
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
