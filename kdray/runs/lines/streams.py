"""Files of JSON lines read one line at a time, so that memory does not grow with the run.

Only the fields of a line that are asked for are built; the rest is checked for its syntax and skipped.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from kdray.errors import DataError

T = TypeVar("T")

_BLOCK = 2**20


class StepLine(msgspec.Struct):
    """Line of a step, of which only the number is of interest."""

    step: int


def stream(path: Path, kind: type[T], wrong: Callable[[DataError], None] | None = None) -> Iterator[tuple[T, int]]:
    """Yield each line of a file, decoded as `kind`, and the offset in bytes at which it ends; nothing if there is no file.

    A last line without newline is skipped: it is being written, or was truncated by a kill.
    Args: wrong: called for a line that is no `kind`, which is then skipped; without it, the error is raised.
    Raises: DataError naming file and line.
    """
    decoder = msgspec.json.Decoder(kind)
    end = 0
    for number, line in raw_lines(path):
        end += len(line)
        try:
            found = decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            told = DataError(f"{path}:{number}: not valid JSON, or no line of this file: {error}; remove the line")
            if wrong is None:
                raise told from error
            wrong(told)
            continue
        yield found, end


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1 on, and the bytes of each whole line; nothing if there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line


def end_of_step(path: Path, step: int) -> tuple[int, int]:
    """Return the offset at which the lines of steps up to `step` end, and the last of these steps (0 if there is none).

    Raises: DataError naming the line that cannot be read, or that stands after those of later steps.
    """
    end = last = 0
    beyond: int | None = None
    for line, at in stream(path, StepLine):
        if line.step > step:
            beyond = beyond or line.step
        elif beyond is not None:
            raise DataError(f"{path}: the line of step {line.step} stands after that of step {beyond}; kdray verify lists such")
        else:
            end, last = at, line.step
    return end, last


def next_step(path: Path, offset: int) -> int | None:
    """Return the step of the line that begins at an offset; None if there is no whole line of a step."""
    with path.open("rb") as file:
        file.seek(offset)
        line = file.readline()
    try:
        return msgspec.json.decode(line, type=StepLine).step if line.endswith(b"\n") else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def drop_later_steps(path: Path, step: int, guard: Callable[[], None]) -> None:
    """Drop the lines of steps after `step`, which a run resumed there will train and write again, and a line that is torn.

    The file is cut where they begin, by one call, so that a kill leaves it as it was or as it will be.
    Args: guard: called before the file is changed; raises if another driver has taken over the run.
    Raises: DataError naming the line that cannot be read.
    """
    try:
        end, _ = end_of_step(path, step)
    except DataError:
        # One that cannot be read is told of; lines in another order are sorted out one by one.
        _keep_lines(path, step, guard)
        return
    guard()
    if path.exists() and path.stat().st_size > end:
        os.truncate(path, end)


def _keep_lines(path: Path, step: int, guard: Callable[[], None]) -> None:
    """Replace a file by its lines of steps up to `step`, wherever they stand. Raises: DataError as for `stream`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with path.open("rb") as source, temporary.open("wb") as target:
            begin = 0
            for line, end in stream(path, StepLine):
                content = source.read(end - begin)
                if line.step <= step:
                    target.write(content)
                begin = end
            target.flush()
            os.fsync(target.fileno())
        guard()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def drop_torn_line(path: Path) -> None:
    """Remove the last line of a JSON-lines file if a kill truncated it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _BLOCK)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            file.truncate(end)
