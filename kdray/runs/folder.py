"""Folder of a run: the paths of its files, and all functions that write to it.

Whole files are written atomically, to a temporary file that is then renamed, so that no reader sees a partial one, even after
a kill. Lines are appended in one write each; a line truncated by a kill is dropped when the run is resumed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from kdray.config import Config, load_config, resuming
from kdray.config.load import load_saved_config
from kdray.config.resuming import Change, changeable
from kdray.errors import ConfigError, DataError
from kdray.runs.lines.events import each_event
from kdray.runs.lines.streams import drop_later_steps, drop_torn_line

LEASE = "lease.json"
"""File that names the driver at work on the run (`kdray.runs.lease`)."""

TRACKER_IDS = "trackers.json"
"""File of the ids under which other services know the run (`kdray.runs.tracking`)."""

CAPTURE = "capture"
"""Subfolder that `kdray capture` writes to; a run may still be started in a folder that has it."""

CHANGED = "setting_changed"
"""Event of a setting that a resume changed: the step of its checkpoint, the setting's name, its old and new value."""

_FOLDERS = ("checkpoints", "samples", "logs")


def utc_now() -> str:
    """Current time in the format of all files of a run: ISO-8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def unguarded() -> None:
    """Guard of a folder that has no other writer."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and writers of `<output>/<name>/`. The constructor does not touch the disk; `create` and `open` check it."""

    path: Path
    guard: Callable[[], None] = field(default=unguarded, compare=False, repr=False)
    """Called before every write; raises if another driver has taken over the run."""

    @classmethod
    def create(cls, config: Config, resume: bool = False, step: int = 0, guard: Callable[[], None] = unguarded) -> RunFolder:
        """Create the folder of a run that is about to start, and write its resolved config.

        With `resume`, the folder must contain a run whose config differs only in settings that a resumed run may change; each
        change becomes an event, and lines truncated by a kill are dropped.
        Args: step: of the checkpoint to resume from.
        Raises: ConfigError that names the folder and the remedies.
        """
        folder = cls(config.run_folder, guard)
        try:
            folder._start(config, resume, step)
        except OSError as error:
            raise not_writable(config, error) from error
        return folder

    def _start(self, config: Config, resume: bool, step: int) -> None:
        self.guard()
        if resume:
            found = self.changes(config)
            for path in (self.metrics, self.events):
                drop_torn_line(path)
            # Before the config: a kill in between may repeat an event, and loses none.
            for each in found:
                self.append_event(CHANGED, step=step, setting=each.setting, old=each.old, new=each.new)
        else:
            self.check_free()
            # What a run that saved nothing knew of its teachers is not true of another one's. Its events stay.
            drop_torn_line(self.events)
            (self.path / "teachers.json").unlink(missing_ok=True)
        for path in (self.path, self.checkpoints, self.samples, self.logs):
            path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, config.dump())

    def check_resumable(self, config: Config) -> None:
        """Check that a run is here which may go on with this config. Raises: ConfigError that says what differs."""
        self.changes(config)

    def check_free(self) -> None:
        """Check that a new run may begin here. Raises: ConfigError that names the folder and the remedies."""
        if not self.path.exists() or (self.path.is_dir() and all(_may_be_there(path) for path in self.path.iterdir())):
            return
        if self.holds_nothing:
            return
        if self.config.is_file():
            remedies = "continue it with --resume, or choose another run.name"
            raise ConfigError(f"{self.path}: already holds a run; {remedies}")
        raise ConfigError(f"{self.path}: exists and is not a run folder; choose another run.name or run.output")

    @property
    def holds_nothing(self) -> bool:
        """True for a run that ended before it saved anything: to continue it is to begin anew, under any settings."""
        saved = any(path.exists() for path in (self.summary, self.student))
        grown = any(path.exists() and path.stat().st_size for path in (self.metrics, self.path / "ledger.jsonl"))
        checkpoints = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        # A config.yaml alone may be anybody's; a run's first line follows it at once.
        return self.config.is_file() and self.events.is_file() and not (saved or grown or checkpoints)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the folder of an existing run. Raises: DataError if there is none."""
        folder = cls(Path(path))
        if not folder.config.is_file():
            raise DataError(f"{path}: not a run folder (it has no config.yaml); give a folder such as runs/<name>")
        return folder

    @property
    def config(self) -> Path:
        """Resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON line per step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Events, one JSON line each: scaling, faults, restarts, checkpoints."""
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        """Results, written at the end."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Parquet files of rollouts for inspection."""
        return self.path / "samples"

    @property
    def evaluations(self) -> Path:
        """Parquet files with the numbers of every held-out response (`kdray.runs.results.draws`), by evaluation."""
        return self.path / "evaluations"

    @property
    def student(self) -> Path:
        """Final student as a Hugging Face folder; written once training has ended."""
        return self.path / "student"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    def load_config(self, overrides: Sequence[str] = ()) -> Config:
        """The run's config, whose relative paths count from where the run was started, if they lead nowhere from here.

        Raises: ConfigError; DataError if the events cannot be read.
        """
        directory = started_in(each_event(self.events))
        if overrides:
            return load_config(self.config, list(overrides), directory)
        return load_saved_config(self.config, directory)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        _append(self.metrics, line, self.guard)

    def append_event(self, kind: str, **fields: Any) -> None:
        """Append a line to events.jsonl: the time, the kind, the fields."""
        _append(self.events, {"time": utc_now(), "kind": kind} | fields, self.guard)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json."""
        write_atomically(self.summary, json.dumps(plain(summary), indent=2, allow_nan=False) + "\n", self.guard)

    def write_teachers(self, fingerprints: Mapping[str, Any]) -> None:
        """Replace teachers.json: the fingerprint of each teacher, against which a resumed run checks its own."""
        content = json.dumps(fingerprints, indent=2, allow_nan=False) + "\n"
        write_atomically(self.path / "teachers.json", content, self.guard)

    def read_teachers(self) -> dict[str, Any]:
        """Read what `write_teachers` wrote; empty for a new run. Raises: DataError if it is not a JSON object."""
        path = self.path / "teachers.json"
        if not path.exists():
            return {}
        try:
            teachers = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}; remove the file to take the teachers as they are") from error
        if not isinstance(teachers, dict):
            raise DataError(f"{path}: expected a JSON object, found {type(teachers).__name__}")
        return teachers

    def read_summary(self) -> dict[str, Any]:
        """Read summary.json. Raises: DataError if the file is missing or not a JSON object."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{self.summary}: not there; the run has not ended") from error
        except ValueError as error:
            raise DataError(f"{self.summary}: not valid JSON: {error}") from error
        if not isinstance(summary, dict):
            raise DataError(f"{self.summary}: expected a JSON object, found {type(summary).__name__}")
        return summary

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a run resumed there will train and write again.

        Raises: DataError naming the line that cannot be read.
        """
        drop_later_steps(self.metrics, step, self.guard)

    def changes(self, config: Config) -> list[Change]:
        """Return the settings that a resumed run changes. Raises: ConfigError if it may not change one of them."""
        if not self.config.is_file():
            raise ConfigError(f"{self.path}: there is no run to resume; leave out --resume, or correct run.name")
        found = resuming.changes(load_saved_config(self.config), config)
        if refused := [change for change in found if not change.allowed]:
            told = "; ".join(f"{each.setting}: {_told(each.old)} there, {_told(each.new)} now" for each in refused)
            raise ConfigError(
                f"{self.path}: the run to resume had other settings: {told}. Give it those that it had, or choose another "
                f"run.name. A resumed run may change where its parts run, and {', '.join(changeable(config))}"
            )
        return found


def started_in(events: Iterable[Mapping[str, Any]]) -> Path | None:
    """Return the directory that the run was last started in, from its events; None if they do not have it."""
    found = None
    for event in events:
        if event.get("kind") == "start" and isinstance(event.get("directory"), str):
            found = Path(event["directory"])
    return found


def _told(value: Any) -> str:
    return "absent" if value is None else repr(value)


def check_writable(config: Config) -> None:
    """Check that the run's folder can be made. Raises: ConfigError with the reason."""
    place = config.run_folder.absolute()
    try:
        there = next(each for each in (place, *place.parents) if each.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file", str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{there} may not be written", str(there))
    except OSError as error:
        raise not_writable(config, error) from error


def not_writable(config: Config, error: OSError) -> ConfigError:
    """Error of a run's folder that cannot be made or written."""
    reason = error.strerror or str(error)
    return ConfigError(
        f"run.output={config.run.output!s:.100}: the run's folder cannot be written there: {reason}; choose another"
    )


def _may_be_there(path: Path) -> bool:
    """Return True for what a new run may find in its folder: a capture, or the remains of a start killed before its config."""
    started = path.name in _FOLDERS and path.is_dir() and not any(path.iterdir())
    return path.name in (CAPTURE, LEASE) or started or path.name.startswith((".config.yaml.", f".{LEASE}."))


def write_atomically(path: Path, text: str, guard: Callable[[], None] = unguarded) -> None:
    """Write a text file atomically: to a temporary file beside it, which is then renamed.

    Args: guard: called just before that; what it raises leaves the file that is there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            # Otherwise some file systems keep the rename but lose the content if the machine crashes.
            file.flush()
            os.fsync(file.fileno())
        guard()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file. A last line without newline is skipped: it is being written, or truncated.

    Raises: DataError naming file and line.
    """
    return parse_lines(path.read_text(encoding="utf-8"), str(path))


def parse_lines(text: str, path: str) -> list[dict[str, Any]]:
    """Parse the text of a file as `read_lines` does. Args: path: its name in messages."""
    objects = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}; remove the line") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}; remove the line")
        objects.append(value)
    return objects


def plain(value: Any) -> Any:
    """Convert a value to JSON types: numpy values and paths to plain ones, NaN and infinities to None.

    Raises: TypeError for anything else that JSON does not support.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(plain(line), allow_nan=False) + "\n"


def _append(path: Path, line: Mapping[str, Any], guard: Callable[[], None]) -> None:
    content = _line(line).encode()
    # A single write of the whole line to a file opened for appending, so that threads cannot interleave.
    with path.open("ab", buffering=0) as file:
        # As late as can be: a driver that stops after it writes on waking what its successor has written, too.
        guard()
        written = file.write(content)
        if written != len(content):
            # On a full disk, a partial line would otherwise precede the next one.
            file.truncate(file.tell() - written)
            raise OSError(errno.ENOSPC, "no room for a whole line", str(path))
