"""Shared base of the command-line modules: common arguments, and the mapping of exceptions to messages and exit codes.

Exit codes: 0 done; 1 the run failed; 2 the config or an input is wrong; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdray.errors import KdrayError, ended_with, exit_code, first_reason

if TYPE_CHECKING:
    from rich.console import Console

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
    _tell(error, outcome)
    return ended_with(error)


def _tell(error: BaseException, outcome: Outcome) -> None:
    logs = outcome.logs()
    where = f"\nlogs: {logs}" if logs is not None else ""
    code = exit_code(error)
    if code == 130:
        typer.echo(f"interrupted: {error}" if str(error) else "interrupted", err=True)
        return
    if code == 2:
        typer.echo(f"kdray: {error}", err=True)
        return
    if isinstance(error, KdrayError):
        typer.echo(f"kdray: {error}{where}", err=True)
        return
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        remedy = "make room where run.output lies, then continue with --resume"
        typer.echo(f"kdray: a file could not be written: {error}; {remedy}{where}", err=True)
        return
    text = "".join(traceback.format_exception(error))
    if logs is not None:
        # The log itself may be what cannot be written.
        with contextlib.suppress(OSError):
            logs.mkdir(parents=True, exist_ok=True)
            with (logs / "driver.log").open("a", encoding="utf-8") as file:
                file.write(text)
    typer.echo(f"{text}kdray: failed unexpectedly: {type(error).__name__}: {error}{where}", err=True)


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
    """Print a table with a row for each key and a column for each mapping, whole within the terminal's width.

    On a narrow one, intervals stand below their numbers, and columns that have no room follow in a table of their own.
    Args: intervals: of some numbers, by column.
    """
    from rich.console import Console

    from kdray.runs.results.comparison import show_interval

    console = Console()
    keys = list(dict.fromkeys(key for values in columns.values() for key in values))
    apart = " "

    def rows(names: Sequence[str]) -> list[list[str]]:
        every = [[key, *(cell(name, key) for name in names)] for key in keys]
        return [row for row in every if any(row[1:])]

    def cell(name: str, key: str) -> str:
        return _cell(columns[name].get(key)) + show_interval(intervals, name, key).replace(" ", apart, 1)

    def fits(names: Sequence[str]) -> bool:
        longest = Widths.of([title, *names], rows(names), _LONGEST_TITLE).longest
        return _needed(longest) <= console.width

    names = list(columns)
    if fits(names) or not intervals:
        print_rows([title, *names], rows(names), console)
        return
    apart = "\n"
    while names:
        count = max((count for count in range(1, len(names) + 1) if fits(names[:count])), default=1)
        print_rows([title, *names[:count]], rows(names[:count]), console)
        names = names[count:]


def print_rows(titles: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """Print a table within the terminal's width. Its words stay whole; where they have no room side by side, each row becomes
    lines of their own, with the titles before them.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = console or Console()
    widths = Widths.of(titles, rows)
    room = console.width - _needed([0] * len(titles))
    if sum(widths.longest) > room:
        widths = Widths.of(titles, rows, _LONGEST_TITLE)
    if sum(widths.words) > room:
        for first, *others in rows:
            console.print(Text(f"{titles[0]} {first}".strip(), style="bold"))
            lines = Table.grid(Column(overflow="fold"), Column(overflow="fold"), padding=(0, 0, 0, 2))
            for name, value in zip(titles[1:], others, strict=True):
                if value:
                    lines.add_row(Text(name), Text(value))
            console.print(lines)
        return
    # Text, not markup: a path may contain square brackets.
    shown = zip(titles, widths.within(room), strict=True)
    columns = [Column(Text(name, overflow="fold"), width=width, overflow="fold") for name, width in shown]
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


_LONGEST_TITLE = 24


@dataclass(frozen=True)
class Widths:
    """Widths of a table's columns."""

    longest: list[int]
    """Longest line of each column."""
    words: list[int]
    """Longest word of each column."""

    @classmethod
    def of(cls, titles: Sequence[str], rows: Sequence[Sequence[str]], most: int | None = None) -> Widths:
        """Measure a table. Args: most: width to which titles, such as paths, may be folded; None leaves them whole."""
        from rich.cells import cell_len

        def widest(pieces: Callable[[str], list[str]]) -> list[int]:
            found = []
            for title, *cells in zip(titles, *rows, strict=True):
                head = max(map(cell_len, pieces(title)), default=0)
                found.append(max([head if most is None else min(head, most), *(cell_len(x) for c in cells for x in pieces(c))]))
            return found

        return cls(widest(str.splitlines), widest(str.split))

    def within(self, room: int) -> list[int]:
        """Widths that together take at most `room`: the widest columns are narrowed, none below its longest word."""

        def narrowed(most: int) -> list[int]:
            return [max(word, min(longest, most)) for longest, word in zip(self.longest, self.words, strict=True)]

        return narrowed(max((most for most in range(room + 1) if sum(narrowed(most)) <= room), default=0))


def _needed(widths: Sequence[int]) -> int:
    """Width of a table with columns of these widths: a border and two spaces for each."""
    return sum(widths) + 3 * len(widths) + 1


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
