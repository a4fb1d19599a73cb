"""Rollouts as Arrow: the one columnar schema that travels between actors and lies as Parquet on disk.

Every per-token column is a list; a support of width K is stored flattened, T * K values, with K in `support_width`;
hidden states likewise, with their channels in `hidden_width`.
A column that the route did not produce is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from kdray.types import Rollout, SampleRequest

_INT_LISTS = ("prompt_ids", "token_ids", "student_versions")
_FLOAT_LISTS = ("mixture_logprobs", "student_logprobs", "teacher_logprobs", "tail_logprobs", "reverse_kl", "forward_kl")

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("alpha", pa.float64(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
        *(pa.field(name, pa.list_(pa.int32())) for name in _INT_LISTS),
        *(pa.field(name, pa.list_(pa.float32())) for name in _FLOAT_LISTS),
        pa.field("support_width", pa.int32(), nullable=False),
        pa.field("support_ids", pa.list_(pa.int32())),
        pa.field("support_logprobs", pa.list_(pa.float32())),
        pa.field("hidden_width", pa.int32(), nullable=False),
        pa.field("teacher_hidden", pa.list_(pa.float16())),
    ]
)

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("alpha", pa.float64(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("max_new_tokens", pa.int32(), nullable=False),
        pa.field("min_version", pa.int32(), nullable=False),
    ]
)


def rollouts_to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """One row a rollout."""
    columns: dict[str, list] = {name: [] for name in ROLLOUT_SCHEMA.names}
    for rollout in rollouts:
        for name in ("sample_id", "prompt_id", "alpha", "finish_reason", "teacher", *_INT_LISTS, *_FLOAT_LISTS):
            columns[name].append(getattr(rollout, name))
        ids, logprobs = rollout.support_ids, rollout.support_logprobs
        hidden = rollout.teacher_hidden
        columns["hidden_width"].append(0 if hidden is None else hidden.shape[1])
        columns["teacher_hidden"].append(None if hidden is None else hidden.ravel())
        columns["support_width"].append(0 if ids is None else ids.shape[1])
        columns["support_ids"].append(None if ids is None else ids.ravel())
        columns["support_logprobs"].append(None if logprobs is None else logprobs.ravel())
    return pa.table(columns, schema=ROLLOUT_SCHEMA)


def table_to_rollouts(table: pa.Table) -> list[Rollout]:
    """The inverse of `rollouts_to_table`; arrays are read-only views of the table where it is one chunk."""
    columns = {name: table.column(name).combine_chunks() for name in table.schema.names}
    matrices = {"support_ids": "support_width", "support_logprobs": "support_width", "teacher_hidden": "hidden_width"}
    lists = {name: _slices(columns[name]) for name in (*_INT_LISTS, *_FLOAT_LISTS, *matrices)}
    scalars = {name: columns[name].to_pylist() for name in ("sample_id", "prompt_id", "alpha", "finish_reason", "teacher")}
    widths = {name: columns[name].to_pylist() for name in ("support_width", "hidden_width")}
    rollouts = []
    for row in range(table.num_rows):
        arrays = {name: values[row] for name, values in lists.items()}
        for name, width in matrices.items():
            if arrays[name] is not None:
                arrays[name] = arrays[name].reshape(-1, widths[width][row])
        rollouts.append(Rollout(**{name: values[row] for name, values in scalars.items()}, **arrays))
    return rollouts


def requests_to_table(requests: Sequence[SampleRequest]) -> pa.Table:
    """One row a request."""
    return pa.table(
        {name: [getattr(request, name) for request in requests] for name in REQUEST_SCHEMA.names}, schema=REQUEST_SCHEMA
    )


def table_to_requests(table: pa.Table) -> list[SampleRequest]:
    """The inverse of `requests_to_table`."""
    prompts = _slices(table.column("prompt_ids").combine_chunks())
    others = [name for name in REQUEST_SCHEMA.names if name != "prompt_ids"]
    values = {name: table.column(name).to_pylist() for name in others}
    return [
        SampleRequest(prompt_ids=prompts[row], **{name: values[name][row] for name in others}) for row in range(table.num_rows)
    ]


def _slices(column: pa.ListArray) -> list[Any]:
    """The rows of a list column as arrays; None where null."""
    values = column.values.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return [values[offsets[row] : offsets[row + 1]] if valid[row] else None for row in range(len(column))]
