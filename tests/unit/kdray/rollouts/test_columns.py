"""The table of columns: everything that lists columns agrees with it, and a new one travels by its line in the table alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.serving.scoring import prompt_logprobs
from actors.vllm_plugin import record_table
from kdray.capturing.format import SIGNAL_COLUMNS
from kdray.config.signals import MEANING
from kdray.losses import LossBatch
from kdray.rollouts.arrow import ABSENT_IN_OLD_FILES, ROLLOUT_SCHEMA
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.columns import COLUMNS, at_targets, rollout_columns, scored_columns, unscored, value_of, with_columns
from kdray.teachers.dialect import support
from kdray.teachers.ensemble import TeacherColumns
from kdray.teachers.huggingface import HFTeacher
from kdray.types import WRITERS, Rollout, SampleRequest, TrainBatch, written_by

WIDE = {"token": 0, "support": 3, "hidden": 4}


def rollout(sample_id: int = 0, tokens: int = 3, **changes: object) -> Rollout:
    """A rollout with every column of the table."""
    values = {
        column.name: np.ones((tokens, WIDE[column.width]) if WIDE[column.width] else tokens, column.dtype)
        for column in rollout_columns()
    }
    others = {"sample_id": sample_id, "prompt_id": 0, "prompt_ids": np.array([7, 8], np.int32), "alpha": 0.2}
    return Rollout(**(others | values | {"finish_reason": "stop", "teacher": "t"} | changes))


def by(producer: str) -> set[str]:
    return {column.name for column in COLUMNS if producer in column.written_by}


def read_by(consumer: str) -> set[str]:
    return {column.name for column in COLUMNS if consumer in column.read_by}


# ------------------------------------------------------------------------------------------------- one list, one table


def test_rollouts_have_a_field_or_a_place_in_more_for_every_column() -> None:
    arrays = {field.name for field in fields(Rollout) if "ndarray" in str(field.type)} - {"prompt_ids", "more"}
    assert arrays <= {column.name for column in rollout_columns()}


def test_the_arrow_schema_has_the_columns_with_their_types() -> None:
    for column in rollout_columns():
        assert ROLLOUT_SCHEMA.field(column.name).type == pa.list_(pa.from_numpy_dtype(column.dtype)), column.name
    others = {"sample_id", "prompt_id", "alpha", "finish_reason", "teacher", "prompt_ids", "support_width", "hidden_width"}
    assert set(ROLLOUT_SCHEMA.names) == {column.name for column in rollout_columns()} | others
    # Files of the first version had these; no other must be asked of a file.
    first = "token_ids student_versions mixture_logprobs student_logprobs teacher_logprobs tail_logprobs reverse_kl forward_kl "
    first += "support_ids support_logprobs teacher_hidden"
    assert {column.name for column in rollout_columns()} - ABSENT_IN_OLD_FILES == set(first.split())


def test_batches_have_the_columns_that_losses_read_with_their_types_and_fills() -> None:
    batch = rollouts_to_batch([rollout(0, 3), rollout(1, 2)], step=1, weights={0: 0.5, 1: 0.25}, advantages={0: 1.0, 1: -1.0})
    assert set(batch.columns) == read_by("loss") | read_by("output_head")
    for column in COLUMNS:
        if column.name in batch.columns:
            found = batch.columns[column.name]
            assert found.dtype == column.dtype, column.name
            assert (found[~batch.loss_mask] == column.fill).all(), column.name
            assert found.ndim == (2 if column.width == "token" else 3), column.name
    bare = {field.name for field in fields(TrainBatch)} - {"columns"}
    assert bare.isdisjoint(column.name for column in COLUMNS if column.name != "token_ids")


def test_loss_batches_have_the_columns_that_losses_read() -> None:
    rows = {"token_ids", "mask", "vocab_size", "groups", "teacher_logits", "more", "all_targets"}
    assert {field.name for field in fields(LossBatch)} - rows <= read_by("loss")
    batch = LossBatch.from_train_batch(
        rollouts_to_batch([rollout()], step=1, weights={0: 1.0}, advantages={0: 0.5}), vocab_size=9
    )
    for name in read_by("loss"):
        assert batch.masked(name).shape[:1] == (3,), name
    assert batch.masked("support_ids").dtype == torch.long


def test_the_workers_table_has_the_recorders_columns() -> None:
    """Of unequal length and width, one without tokens, one column not recorded: each by its name, as it was put in."""
    layouts = (record_table.FLOATS, record_table.INTS, record_table.HIDDEN)
    assert {name for layout in layouts for name in layout.names} == by("recorder")
    rng = np.random.default_rng(0)
    shapes = ((4, 3), (1, 5), (0, 1), (2, 3))
    slabs = [
        record_table.Slab(
            rng.normal(size=(tokens, len(record_table.FLOATS.single) + width)).astype(np.float32),
            rng.integers(0, 99, size=(tokens, len(record_table.INTS.single) + width)).astype(np.int32),
            rng.normal(size=(tokens, 2)).astype(np.float16),
        )
        for tokens, width in shapes
    ]
    measured = [column for column in COLUMNS if column.name in by("recorder") - {"forward_kl"}]
    records, passes = record_table.read_records(record_table.write_records(slabs, measured, record_table.Passes(7, 3)))
    assert passes == record_table.Passes(7, 3)
    assert [set(record) for record in records] == [by("recorder") - {"forward_kl"}] * len(slabs)
    for record, slab, (tokens, width) in zip(records, slabs, shapes, strict=True):
        for layout, array in zip(layouts, slab, strict=True):
            for place, column in enumerate(layout.single):
                if column in measured:
                    np.testing.assert_array_equal(record[column.name], array[:, place], err_msg=column.name)
                    assert record[column.name].dtype == column.dtype
            (wide,) = layout.wide
            np.testing.assert_array_equal(record[wide.name], array[:, len(layout.single) :], err_msg=wide.name)
        assert record["support_logprobs"].shape == (tokens, width)
    with pytest.raises(KeyError):
        records[0]["forward_kl"]


def test_two_wide_columns_of_one_type_lie_side_by_side() -> None:
    single, wide = record_table.FLOATS.single[:1], record_table.FLOATS.wide * 2
    other = next(column for column in COLUMNS if column.name == "teacher_hidden")
    layout = record_table.Layout(single, (wide[0], other))
    arrays = [np.arange(tokens * 5, dtype=np.float32).reshape(tokens, 5) for tokens in (2, 3)]
    found = layout.named(arrays, (wide[0], other))
    assert found[wide[0].name].to_pylist() == [array[:, 1:3].ravel().tolist() for array in arrays]
    assert found[other.name].to_pylist() == [array[:, 3:].ravel().tolist() for array in arrays]


def test_teachers_give_the_columns_that_the_table_says() -> None:
    said = {column.name for column in scored_columns() if column.signal in ("sampled", "top_k")}
    flat = SimpleNamespace(start_indices=[0], end_indices=[3], token_ids=[5, 5, 2], logprobs=[-1.0, -1.0, -2.0])
    output = SimpleNamespace(prompt_token_ids=[1], prompt_logprobs=None, outputs=[SimpleNamespace(logprobs=flat)])
    asked = prompt_logprobs.Asked(np.array([1, 5], np.int32), 1, 9, 1)
    assert set(asked.columns(output)) == by("prompt_logprobs") == said
    assert set(support([-1.0], [{3: -1.0}], 2, 9)) == by("openai") & said == said
    teacher = SimpleNamespace(_width=2)
    rows = torch.zeros(1, 4).log_softmax(-1)
    assert set(HFTeacher._columns(teacher, rows, torch.tensor([1]), None, top_k=True)) == by("huggingface") & said == said
    assert {field.name for field in fields(TeacherColumns)} == by("ensemble") & said == read_by("ensemble") == said


def test_signals_of_a_capture_are_capabilities_and_what_tells_of_the_student_is_none() -> None:
    assert set(SIGNAL_COLUMNS) <= set(MEANING)
    assert SIGNAL_COLUMNS["sampled"] == ("teacher_logprobs",)
    assert set(SIGNAL_COLUMNS["top_k"]) == {"support_ids", "support_logprobs", "tail_logprobs"}
    assert {column.name for column in COLUMNS if column.of_student} >= {"student_logprobs", "reverse_kl", "forward_kl"}
    for column in COLUMNS:
        assert not (column.of_student and column.signal), column.name


def test_an_unscored_rollout_keeps_how_it_was_drawn_and_nothing_that_a_teacher_said() -> None:
    bare = unscored(rollout())
    for column in rollout_columns():
        assert (value_of(bare, column.name) is None) == (column.stage == "scoring"), column.name
    ids = np.zeros((3, 2), np.int32)
    assert unscored(rollout(), ids).support_ids is ids


# ---------------------------------------------------------------------------------------------------------- a new column

_NEW_COLUMN = """
import tempfile
from pathlib import Path
import numpy as np
import kdray.rollouts.columns as columns

# The one line that a column takes, here of a scorer that a loss reads, wide as the support, and of a recorder.
columns.COLUMNS += (
    columns.Column("entropy", np.float32, "token", 0.5, "scoring", frozenset({"recorder"}), frozenset({"loss"}), "sampled"),
    columns.Column("votes", np.int32, "support", -7, "draw", frozenset({"data"}), frozenset({"loss"})),
)

import pyarrow.parquet as pq
from actors.vllm_plugin import record_table
from kdray.capturing.format import signals
from kdray.losses import LossBatch
from kdray.rollouts.arrow import rollouts_to_table, table_to_rollouts
from kdray.rollouts.batching import micro_batches, rollouts_to_batch, shard
from kdray.types import Rollout

def drawn(sample_id, tokens):
    ones = np.full(tokens, -1.0, np.float32)
    ids = np.arange(2 * tokens, dtype=np.int32).reshape(tokens, 2)
    made = Rollout(sample_id, 0, np.array([5, 6], np.int32), np.arange(tokens, dtype=np.int32), ones, ones,
                   np.zeros(tokens, np.int32), 0.2, "stop", support_ids=ids, support_logprobs=ids.astype(np.float32))
    given = {"entropy": np.arange(tokens, dtype=np.float32), "votes": ids + 1, "reverse_kl": ones, "teacher_logprobs": ones}
    return columns.with_columns(made, given, teacher="t")

# The producer gives it; nothing between names it.
given = [drawn(0, 3), drawn(1, 2)]
back = table_to_rollouts(rollouts_to_table(given))
for one, other in zip(given, back, strict=True):
    for name in ("entropy", "votes", "reverse_kl"):
        np.testing.assert_array_equal(columns.value_of(one, name), columns.value_of(other, name))
    assert columns.value_of(columns.unscored(other), "entropy") is None
    assert columns.value_of(columns.unscored(other), "votes") is not None
batch = rollouts_to_batch(back, step=1)
assert batch.columns["entropy"].tolist() == [[0.5, 0.5, 0, 1, 2], [0.5, 0.5, 0, 1, 0.5]]
assert batch.columns["votes"].shape == (2, 5, 2) and (batch.columns["votes"][:, :2] == -7).all()
(part,) = micro_batches(shard(batch, 0, 1), 2)
tensors = LossBatch.from_train_batch(part, vocab_size=9)
# The consumer reads it.
assert tensors.masked("entropy").tolist() == [0, 1, 2, 0, 1]
assert tensors.masked("votes").tolist() == [[1, 2], [3, 4], [5, 6], [1, 2], [3, 4]]

slab = record_table.Slab(*(np.zeros((2, len(layout.names)), (*layout.single, *layout.wide)[0].dtype)
                           for layout in (record_table.FLOATS, record_table.INTS, record_table.HIDDEN)))
slab.floats[:, record_table.FLOATS.names.index("entropy")] = (3, 4)
(record,), _ = record_table.read_records(record_table.write_records([slab], columns.recorded_columns(), record_table.Passes()))
assert record["entropy"].tolist() == [3, 4]

# A file that was written before knows nothing of it.
old = rollouts_to_table(given).drop_columns(["entropy", "votes"])
assert [columns.value_of(one, "entropy") for one in table_to_rollouts(old)] == [None, None]
# Nor does it have the signal that the column is now a part of.
with tempfile.TemporaryDirectory() as folder:
    for name, table, wanted in (("new", rollouts_to_table(given), {"text", "sampled"}), ("old", old, {"text"})):
        pq.write_table(table, Path(folder, f"{name}.parquet"))
        assert signals(Path(folder, f"{name}.parquet")) == wanted, name
print("travelled")
"""


def test_a_new_column_travels_by_its_line_in_the_table() -> None:
    """From rollout to Arrow and back, into a batch, its parts, and the loss; no file but the table names it."""
    done = subprocess.run([sys.executable, "-c", _NEW_COLUMN], capture_output=True, text=True, timeout=120)
    assert done.stdout == "travelled\n", done.stderr


# --------------------------------------------------------------------------------------------------------------- writers


def test_codes_of_writers_are_those_of_the_files() -> None:
    assert WRITERS == ("mixture", "student", "teacher", "data", "environment")
    assert written_by("environment", 2).tolist() == [4, 4]
    assert written_by("data", 0).dtype == np.int8


@pytest.mark.parametrize(("alpha", "writer"), [(0.0, "student"), (1.0, "teacher"), (0.3, "mixture"), (1e-9, "mixture")])
def test_alpha_says_who_draws_and_a_rollout_is_by_that_writer_unless_told(alpha: float, writer: str) -> None:
    ids = np.array([1, 2], np.int32)
    assert SampleRequest(0, 0, ids, alpha, 1, 8).writer == writer
    assert SampleRequest(0, 0, ids, alpha, 1, 8, writer="data").writer == "data"
    plain = rollout(alpha=alpha, writer=rollout().writer)
    assert plain.writers == ("student",), "what is given stays"
    drawn = Rollout(0, 0, ids, ids, None, None, ids, alpha, "stop")
    assert drawn.writers == (writer,)
    assert drawn.writer.dtype == np.int8
    # A response without a token has a writer too.
    assert Rollout(0, 0, ids, ids[:0], None, None, ids[:0], alpha, "length").writers == (writer,)


def test_tokens_of_the_environment_are_no_targets() -> None:
    writer = np.array([0, 4, 4, 2, 0], np.int8)
    versions = np.array([3, -1, -1, 5, 4], np.int32)
    turns = rollout(tokens=5, writer=writer, student_versions=versions)
    assert turns.has_context
    assert turns.is_target.tolist() == [True, False, False, True, True]
    assert (turns.num_targets, turns.oldest_version, turns.target_versions.tolist()) == (3, 3, [3, 5, 4])
    assert turns.writers == ("mixture", "environment", "teacher")
    assert not turns.has_writer("data")
    plain = rollout(tokens=5)
    assert not plain.has_context
    kls = {"reverse_kl": np.arange(5, dtype=np.float32)}
    pair = [with_columns(turns, kls), with_columns(plain, kls)]
    assert at_targets(pair, "reverse_kl").tolist() == [0, 3, 4, 0, 1, 2, 3, 4]
    # One that lacks the column has no values in it.
    assert at_targets([unscored(pair[0]), pair[0]], "reverse_kl").tolist() == [0, 3, 4]
    assert len(at_targets([], "reverse_kl")) == 0
