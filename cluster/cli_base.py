"""Shared base of the command-line modules: common arguments, and the mapping of exceptions to messages and exit codes.

Exit codes: 0 done; 1 the run failed; 2 the config or an input is wrong; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdray.errors import ConfigError, DataError, Interrupted, KdrayError, first_reason

if TYPE_CHECKING:
    from kdray.config import Config

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML recipe, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as training.learning_rate=1e-5.")
]
Supervise = Annotated[
    bool,
    typer.Option("--supervise", help="Resume after failures by itself while steps advance; end where a step fails twice."),
]
LOADING = "loading libraries"
CHECKING = "checking models and data"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Outcome:
    """Location of a failure's log, once the command has written a run folder."""

    def __init__(self) -> None:
        self.log_folder: Path | None = None
        self._watched: tuple[Path, object] | None = None

    def watch(self, run_folder: Path) -> None:
        """Watch a folder; an existing one belongs to another run until its config.yaml is written again."""
        self._watched = (run_folder, _stamp(run_folder))

    def logs(self) -> Path | None:
        if self._watched is not None and _stamp(self._watched[0]) != self._watched[1]:
            return self._watched[0] / "logs"
        return self.log_folder


def _stamp(run_folder: Path) -> object:
    try:
        stat = (run_folder / "config.yaml").stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


@contextlib.contextmanager
def exit_codes() -> Iterator[Outcome]:
    """Convert exceptions of a command to a message on stderr and the documented exit code (design and README)."""
    outcome = Outcome()
    try:
        yield outcome
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except BaseExceptionGroup as group:
        raise typer.Exit(_explain(first_reason(group), outcome)) from None
    except Exception as error:
        raise typer.Exit(_explain(error, outcome)) from None


def _explain(error: BaseException, outcome: Outcome) -> int:
    """Print the reason why the command ends, and return its exit code."""
    logs = outcome.logs()
    where = f"\nlogs: {logs}" if logs is not None else ""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        typer.echo(f"interrupted: {error}" if str(error) else "interrupted", err=True)
        return 130
    if isinstance(error, ConfigError | DataError):
        typer.echo(f"kdray: {error}", err=True)
        return 2
    if isinstance(error, KdrayError):
        typer.echo(f"kdray: {error}{where}", err=True)
        return 1
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        remedy = "make room where run.output lies, then continue with --resume"
        typer.echo(f"kdray: a file could not be written: {error}; {remedy}{where}", err=True)
        return 1
    text = "".join(traceback.format_exception(error))
    if logs is not None:
        # The log itself may be what cannot be written.
        with contextlib.suppress(OSError):
            logs.mkdir(parents=True, exist_ok=True)
            with (logs / "driver.log").open("a", encoding="utf-8") as file:
                file.write(text)
    typer.echo(f"{text}kdray: failed unexpectedly: {type(error).__name__}: {error}{where}", err=True)
    return 1


def _say(line: str) -> None:
    typer.echo(line, err=True)


@contextlib.contextmanager
def opening(say: Callable[[str], object] = _say, announce: bool = True) -> Iterator[Callable[[str | None], None]]:
    """Signs of life until a command has something of its own to show; yields what takes the name of each part that begins.

    Args: as `kdray.runs.ticks.Opening`; by default on stderr, since a command's output may be read by another program.
    """
    from kdray.runs.ticks import Opening

    with Opening(say, announce) as parts:
        yield parts.begin


def load(path: Path, overrides: list[str] | None) -> Config:
    from kdray.config import load_config

    return load_config(path, overrides or [])


def print_columns(
    title: str, columns: Mapping[str, Mapping[str, Any]], intervals: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Print a table with a row for each key and a column for each mapping. Args: intervals: of some numbers, by column."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from kdray.runs.results.comparison import show_interval

    # Text, not markup: a path may contain square brackets.
    table = Table(title, *(Column(Text(name)) for name in columns))
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        shown = [_cell(values.get(key)) + show_interval(intervals, name, key) for name, values in columns.items()]
        table.add_row(key, *(Text(each) for each in shown))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
