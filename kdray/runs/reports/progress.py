"""Line of a terminal that shows how far a phase of a run has come: whole on a narrow one, too."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

_NARROW, _WIDE = 80, 140
"""Columns of a terminal up to which the bar is short, and from which on it is long."""
_LONGEST = 24
"""Cells of the longest name of a phase that is shown whole."""


def progress_line(console: Console) -> Progress:
    """Make the line: phase, bar, step and time left stay whole, and as many of the task's `values` as have room follow.

    A task without a total shows neither steps nor a time.
    """
    width = 8 if console.width <= _NARROW else 12 if console.width < _WIDE else 30
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=_LONGEST)),
        BarColumn(bar_width=width, table_column=Column(no_wrap=True)),
        _Steps(table_column=Column(no_wrap=True)),
        _Left(table_column=Column(no_wrap=True)),
        _Values(table_column=Column(ratio=1)),
        console=console,
        expand=True,
    )


class _Steps(MofNCompleteColumn):
    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Values(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return _AsManyAsFit(task.fields["values"])


class _AsManyAsFit:
    """Texts in a row, as many as there is room for; the last ones are left out."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = list(self._parts)
        while parts and cell_len("  ".join(parts)) > options.max_width:
            parts.pop()
        yield Text("  ".join(parts), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, min(options.max_width, cell_len("  ".join(self._parts))))
