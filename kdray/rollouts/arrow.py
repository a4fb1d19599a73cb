"""Rollouts as Arrow tables: the columnar schema used both between actors and, as Parquet, on disk.

Every per-token column of `kdray.rollouts.columns` is a list; a support of width K is stored flattened, T * K values, with K in
`support_width`; hidden states likewise, with the number of channels in `hidden_width`.
A column that the route did not produce is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isnan
from typing import Any

import numpy as np
import pyarrow as pa

from kdray.rollouts.columns import Column, rollout_columns, rollouts_of, values_of
from kdray.types import WRITERS, Rollout, SampleRequest, Writer, drawn_by

_SCALARS = (
    pa.field("sample_id", pa.int64(), nullable=False),
    pa.field("prompt_id", pa.int64(), nullable=False),
    pa.field("alpha", pa.float64(), nullable=False),
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("teacher", pa.string(), nullable=False),
)
WIDTHS = {"support": "support_width", "hidden": "hidden_width"}
"""Names of the columns that store the width of the others."""


def column_fields(columns: Iterable[Column]) -> list[pa.Field]:
    """Return the fields of per-token columns, and of the width columns that they need."""
    columns = tuple(columns)
    widths = [name for width, name in WIDTHS.items() if any(column.width == width for column in columns)]
    return [
        *(pa.field(column.name, pa.list_(pa.from_numpy_dtype(column.dtype))) for column in columns),
        *(pa.field(name, pa.int32(), nullable=False) for name in widths),
    ]


_COLUMNS = rollout_columns()

ROLLOUT_SCHEMA = pa.schema([*_SCALARS, pa.field("prompt_ids", pa.list_(pa.int32())), *column_fields(_COLUMNS)])

ABSENT_IN_OLD_FILES = frozenset(column.name for column in _COLUMNS if not column.in_every_file)
"""Columns that files of older versions lack; `upgraded` adds them."""

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("alpha", pa.float64(), nullable=False),
        pa.field("writer", pa.string(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("max_new_tokens", pa.int32(), nullable=False),
        pa.field("min_version", pa.int32(), nullable=False),
        pa.field("stop_ids", pa.list_(pa.int32()), nullable=False),
    ]
)


def rollouts_to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Convert rollouts to a table, one row per rollout."""
    scalars = {each.name: [getattr(rollout, each.name) for rollout in rollouts] for each in _SCALARS}
    prompts = [rollout.prompt_ids for rollout in rollouts]
    columns = columns_to_lists({column: values_of(rollouts, column.name) for column in _COLUMNS})
    return pa.table({**scalars, "prompt_ids": prompts, **columns}, schema=ROLLOUT_SCHEMA)


def table_to_rollouts(table: pa.Table) -> list[Rollout]:
    """Inverse of `rollouts_to_table`; arrays are read-only views of the table if it has a single chunk."""
    if not ABSENT_IN_OLD_FILES.issubset(table.schema.names):
        table = upgraded(table)
    values = {each.name: table.column(each.name).to_pylist() for each in _SCALARS}
    values["prompt_ids"] = _slices(table.column("prompt_ids").combine_chunks())
    return rollouts_of(values | read_columns(table, _COLUMNS))


def requests_to_table(requests: Sequence[SampleRequest]) -> pa.Table:
    """Convert requests to a table, one row per request."""
    return pa.table(
        {name: [getattr(request, name) for request in requests] for name in REQUEST_SCHEMA.names}, schema=REQUEST_SCHEMA
    )


def table_to_requests(table: pa.Table) -> list[SampleRequest]:
    """Inverse of `requests_to_table`."""
    prompts = _slices(table.column("prompt_ids").combine_chunks())
    others = [name for name in REQUEST_SCHEMA.names if name != "prompt_ids"]
    values = {name: table.column(name).to_pylist() for name in others}
    values["stop_ids"] = [tuple(ids) for ids in values["stop_ids"]]
    return [
        SampleRequest(prompt_ids=prompts[row], **{name: values[name][row] for name in others}) for row in range(table.num_rows)
    ]


# ------------------------------------------------------------------------------------------------------- older versions


def upgraded(table: pa.Table) -> pa.Table:
    """Add the missing columns to a table of rollouts written by any version of kdray.

    Before the column `writer` existed, an alpha of nan marked responses from the data.
    """
    lacking = [column for column in _COLUMNS if column.name in ABSENT_IN_OLD_FILES and column.name not in table.schema.names]
    for column in lacking:
        values = pa.nulls(table.num_rows, pa.list_(pa.from_numpy_dtype(column.dtype)))
        if column.name == "writer":
            lengths = table.column("token_ids").combine_chunks().value_lengths().fill_null(0).to_numpy()
            alphas = table.column("alpha").to_numpy()
            codes = np.repeat(_codes(alphas), lengths)
            values = pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), pa.array(codes, pa.int8()))
            place = table.schema.get_field_index("alpha")
            table = table.set_column(place, table.schema.field(place), pa.array(np.where(np.isnan(alphas), 0.0, alphas)))
        table = table.append_column(ROLLOUT_SCHEMA.field(column.name), values)
    return table


def writer_columns(schema: pa.Schema) -> list[str]:
    """Names of the columns that determine the writers of rows, for a table of any version."""
    return [name for name in ("alpha", "writer") if name in schema.names]


def row_writers(table: pa.Table) -> np.ndarray:
    """Writers of the rows of a table, codes of WRITERS [rows]; of several, the student comes before the teacher, then the data.

    Args: table: with the `writer_columns` of its schema.
    """
    codes = _codes(table.column("alpha").to_numpy())
    if "writer" in table.schema.names:
        column = table.column("writer").combine_chunks()
        lengths = column.value_lengths().fill_null(0).to_numpy()
        starts = np.cumsum(lengths) - lengths
        if lengths.any():
            # The order of the codes: mixture and student before teacher, data, environment.
            codes[lengths > 0] = np.minimum.reduceat(column.flatten().to_numpy(), starts[lengths > 0])
    return codes


def old_writer(alpha: float) -> Writer:
    """Return the writer of a response from an older version by its alpha; nan meant the data."""
    return "data" if isnan(alpha) else drawn_by(alpha)


def _codes(alphas: np.ndarray) -> np.ndarray:
    return np.array([WRITERS.index(old_writer(alpha)) for alpha in alphas], dtype=np.int8)


# ------------------------------------------------------------------------------------------------------------- columns


def columns_to_lists(columns: Mapping[Column, Sequence[np.ndarray | None]]) -> dict[str, Sequence[Any]]:
    """Convert per-token columns to Arrow lists, by the names of `column_fields`.

    Args: columns: per row, [T] or [T, K]; None is null.
    """
    lists: dict[str, Sequence[Any]] = {}
    for column, values in columns.items():
        if column.width == "token":
            lists[column.name] = values
        else:
            widths = WIDTHS[column.width]
            before = lists.get(widths, [0] * len(values))
            lists[widths] = [last if value is None else value.shape[1] for value, last in zip(values, before, strict=True)]
            lists[column.name] = [None if value is None else value.ravel() for value in values]
    return lists


def read_columns(table: pa.Table | pa.RecordBatch, columns: Iterable[Column]) -> dict[str, list[np.ndarray | None]]:
    """Inverse of `columns_to_lists`, by name, for those of the columns that the table has."""
    found = {}
    for column in columns:
        if column.name not in table.schema.names:
            continue
        values = table.column(column.name)
        rows = _slices(values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values)
        if column.width != "token":
            widths = table.column(WIDTHS[column.width]).to_pylist()
            # A row without slots has no such column: the engine that drew it did not run the teacher.
            rows = [
                row.reshape(-1, width) if width and row is not None else None for row, width in zip(rows, widths, strict=True)
            ]
        found[column.name] = rows
    return found


def _slices(column: pa.ListArray) -> list[Any]:
    """Return the rows of a list column as arrays; None where null."""
    values = column.values.to_numpy(zero_copy_only=False)
    rows = [values[start:end] for start, end in pairwise(column.offsets.to_pylist())]
    if column.null_count:
        valid = column.is_valid().to_pylist()
        rows = [row if there else None for row, there in zip(rows, valid, strict=True)]
    return rows
