"""Recorded columns on their way from the vLLM worker to the engine: arrays while recording, then an Arrow table that is read by
name. Writer and reader are both here; neither imports vLLM.

`kdray.rollouts.columns` defines the columns. The recorder keeps few arrays for all rows of a step, since each costs a
device-to-host copy: columns of the same type are concatenated, scalar columns first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kdray.rollouts.arrow import WIDTHS, read_columns
from kdray.rollouts.columns import Column, Width, recorded_columns

_COLUMNS = recorded_columns()


class Layout(NamedTuple):
    """Order of the columns in an array [rows, one per column of `single` + K per column of `wide`]."""

    single: tuple[Column, ...]
    wide: tuple[Column, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in (*self.single, *self.wide))

    def empty(self) -> np.ndarray:
        """An array without rows, with wide columns of width 1."""
        return np.empty((0, len(self.names)), dtype=(*self.single, *self.wide)[0].dtype)

    def named(self, arrays: Sequence[np.ndarray], wanted: Collection[Column]) -> dict[str, pa.Array]:
        """The wanted columns of the arrays as Arrow rows, one per array, and their widths."""
        first, lengths = len(self.single), np.array([len(array) for array in arrays])
        found: dict[str, pa.Array] = {}
        ends, joined = _ends(lengths), np.concatenate([array[:, :first] for array in arrays])
        for place, column in enumerate(self.single):
            if column in wanted:
                found[column.name] = pa.ListArray.from_arrays(ends, pa.array(np.ascontiguousarray(joined[:, place])))
        widths = np.array([array.shape[1] - first for array in arrays]) // max(1, len(self.wide))
        for place, column in enumerate(self.wide):
            if column in wanted:
                starts = (first + place * widths).tolist()
                parts = [
                    array[:, start : start + width] for array, start, width in zip(arrays, starts, widths.tolist(), strict=True)
                ]
                # Arrays of equal width are concatenated without copying each.
                flat = np.concatenate(parts if (widths == widths[0]).all() else [part.ravel() for part in parts]).ravel()
                found[column.name] = pa.ListArray.from_arrays(_ends(lengths * widths), pa.array(flat))
                found[WIDTHS[column.width]] = pa.array(widths.astype(np.int32))
        return found


def _ends(lengths: np.ndarray) -> pa.Array:
    """Offsets of consecutive rows."""
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    return pa.array(ends, pa.int32())


def _layout(dtype: type[np.generic], wide: Width) -> Layout:
    def of(width: Width) -> tuple[Column, ...]:
        return tuple(column for column in _COLUMNS if column.dtype is dtype and column.width == width)

    return Layout(of("token"), of(wide))


FLOATS, INTS, HIDDEN = _layout(np.float32, "support"), _layout(np.int32, "support"), _layout(np.float16, "hidden")
assert {*FLOATS.names, *INTS.names, *HIDDEN.names} == {column.name for column in _COLUMNS}, "no array holds such a column"


class Slab(NamedTuple):
    """Recorded positions as arrays [rows, columns], of a step or of a request."""

    floats: np.ndarray  # float32, as FLOATS
    ints: np.ndarray  # int32, as INTS
    hidden: np.ndarray  # float16, as HIDDEN


Record = Mapping[str, np.ndarray]
"""Columns of one request, by name."""


class Passes(NamedTuple):
    """Forward passes of an engine: all, and those that ran the teacher."""

    steps: int = 0
    teacher_steps: int = 0

    def since(self, before: Passes) -> Passes:
        return Passes(self.steps - before.steps, self.teacher_steps - before.teacher_steps)

    def added_to(self, table: pa.Table) -> pa.Table:
        """The table with these numbers in its schema's metadata."""
        return table.replace_schema_metadata({**(table.schema.metadata or {}), _PASSES: b"%d %d" % self})

    @classmethod
    def of(cls, schema: pa.Schema) -> Passes:
        """Numbers in a schema's metadata; none if it has none."""
        steps, teacher_steps = (schema.metadata or {}).get(_PASSES, b"0 0").split()
        return cls(int(steps), int(teacher_steps))


_PASSES = b"kdray passes"


def write_records(slabs: Sequence[Slab], columns: Collection[Column], passes: Passes) -> bytes:
    """An Arrow stream of these columns, one row per request. Args: passes: of the engine since its start."""
    found: dict[str, pa.Array] = {}
    for layout, arrays in zip((FLOATS, INTS, HIDDEN), zip(*slabs, strict=True), strict=True):
        found |= layout.named(arrays, columns)
    table = passes.added_to(pa.table(found))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_records(answer: bytes) -> tuple[list[Record], Passes]:
    """The inverse of `write_records`."""
    batch = pa.ipc.open_stream(answer).read_next_batch()
    columns = read_columns(batch, _COLUMNS)
    records: list[Record] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return records, Passes.of(batch.schema)
