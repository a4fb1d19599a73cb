"""Captures that were written before `writer` was a column, when nan as alpha said that an answer was the data's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdray.capturing.collect import by_key
from kdray.capturing.format import Manifest, find_shards, read_manifest, signals, write_capture, write_manifest
from kdray.capturing.journal import Journal
from kdray.capturing.teacher import CapturedTeacher
from kdray.capturing.writer import CAPTURE_SCHEMA, CaptureFolder
from kdray.errors import DataError
from kdray.rollouts.arrow import rollouts_to_table, row_writers, table_to_rollouts
from kdray.types import Rollout, SampleRequest, written_by
from tests.unit.kdray.capturing.test_collect import (
    ASKED_WITH,
    FINGERPRINT,
    KEY_SPEC,
    TOKENIZER,
    VOCAB,
    Scored,
    answer,
    of_data,
    prompts,
    reference,
    requests,
    run,
    scored,
    unscored,
)

INTS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
OLD_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("alpha", pa.float64(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
        *(pa.field(name, INTS) for name in ("prompt_ids", "token_ids", "student_versions")),
        *(pa.field(name, FLOATS) for name in ("mixture_logprobs", "student_logprobs", "teacher_logprobs", "tail_logprobs")),
        *(pa.field(name, FLOATS) for name in ("reverse_kl", "forward_kl")),
        pa.field("support_width", pa.int32(), nullable=False),
        pa.field("support_ids", INTS),
        pa.field("support_logprobs", FLOATS),
        pa.field("hidden_width", pa.int32(), nullable=False),
        pa.field("teacher_hidden", pa.list_(pa.float16())),
    ]
)
OLD_CAPTURE = OLD_SCHEMA.append(pa.field("key", pa.binary(16), nullable=False)).append(pa.field("seed", pa.uint64()))


def old_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Rollouts as an older version wrote them."""
    table = rollouts_to_table(rollouts)
    alphas = pa.array([nan if one.has_writer("data") else one.alpha for one in rollouts])
    table = table.set_column(table.schema.get_field_index("alpha"), table.schema.field("alpha"), alphas)
    return table.select(OLD_SCHEMA.names).cast(OLD_SCHEMA)


def old_rows(folder: CaptureFolder, wanted: Sequence[SampleRequest]) -> pa.Table:
    """Answers to requests, as an older capture kept them."""
    keyed = by_key(folder, wanted, reference)
    rollouts = [scored(each) if each.writer == "data" else answer(each) for each in keyed.values()]
    bare = [replace(one, student_logprobs=None, reverse_kl=None, forward_kl=None) for one in rollouts]
    seeds = [None if each.writer == "data" else each.seed for each in keyed.values()]
    table = old_table(bare).append_column(OLD_CAPTURE.field("key"), pa.array(list(keyed), pa.binary(16)))
    return table.append_column(OLD_CAPTURE.field("seed"), pa.array(seeds, pa.uint64()))


def mixed() -> list[SampleRequest]:
    """Every other request is for the data's answer."""
    return [of_data(each) if each.sample_id % 2 else each for each in requests()]


def interrupted(path: Path, sealed: int, journaled: int, wanted: Sequence[SampleRequest]) -> None:
    """The folder of an older version that was killed: some answers in a shard, some in the journal, with a torn tail."""
    path.mkdir()
    folder = CaptureFolder(path, KEY_SPEC)
    rows = old_rows(folder, wanted)
    pq.write_table(rows.slice(0, sealed), path / "part-00ff.parquet")
    manifest = Manifest(FINGERPRINT, TOKENIZER, VOCAB, sealed, ASKED_WITH, sealed, complete=False)
    write_manifest(path, manifest)
    journal = Journal(path / "journal", OLD_CAPTURE)
    for start in range(sealed, sealed + journaled, 2):
        journal.append(rows.slice(start, min(2, sealed + journaled - start)))
    journal.close()
    with (path / "journal").open("ab") as file:
        file.write(b"\x10\x00\x00\x00torn")
    event = {"time": "2026-01-01", "kind": "asked", "answers": sealed + journaled + 1}
    (path / "events.jsonl").write_text(json.dumps(event) + "\n")


def test_keys_are_those_of_older_captures() -> None:
    """Computed by the version before; another value would ask for every answer of an interrupted capture again."""
    folder = CaptureFolder(Path("nowhere"), KEY_SPEC)
    first = requests()[0]
    assert folder.key(first).hex() == "17d7c47ca5488f65d9d8d1447fd75a16"
    assert folder.key(of_data(first), reference(first.prompt_id)).hex() == "32f79b2850d96a89d3467d753aa38522"


@pytest.mark.parametrize(("sealed", "journaled"), [(8, 5), (0, 7), (9, 0)])
def test_an_interrupted_capture_of_an_older_version_goes_on(tmp_path: Path, sealed: int, journaled: int) -> None:
    path, wanted, stub = tmp_path / "there", mixed(), Scored()
    interrupted(path, sealed, journaled, wanted)
    distinct = len(by_key(CaptureFolder(path, KEY_SPEC), wanted, reference))
    folder = run(path, wanted, stub, references=reference)
    assert len(stub.asked) == distinct - sealed - journaled
    assert folder.held == distinct
    manifest = read_manifest(path)
    assert manifest is not None
    assert (manifest.rollouts, manifest.complete) == (distinct, True)
    assert signals(path) == {"text", "references", "sampled", "top_k"}
    shards = {shard.name: pq.read_schema(shard).names for shard in find_shards(path)}
    assert ("writer" in shards["part-00ff.parquet"]) is False, "an old shard stays as it is"
    assert all("writer" in names for name, names in shards.items() if name != "part-00ff.parquet")
    # Every answer is given as the teacher, or the data, gave it, whichever version wrote it down.
    teacher = CapturedTeacher("past", path, prompts(10), VOCAB, TOKENIZER)
    drawn = [each for each in wanted if each.writer == "teacher"]
    found = sorted(asyncio.run(read(teacher.sample(drawn))), key=lambda each: each.sample_id)
    for each, one in zip(drawn, found, strict=True):
        np.testing.assert_array_equal(one.token_ids, answer(each).token_ids)
        np.testing.assert_array_equal(one.support_logprobs, answer(each).support_logprobs)
        assert (one.alpha, one.writers) == (1.0, ("teacher",))
    references = [unscored(each) for each in wanted if each.writer == "data"]
    for each, one in zip(references, asyncio.run(read(teacher.score(references))), strict=False):
        np.testing.assert_array_equal(
            one.teacher_logprobs, scored(each if each.sample_id == one.sample_id else one).teacher_logprobs
        )
        assert one.writers == ("data",)
    again = Scored()
    run(path, wanted, again, references=reference)
    assert not again.asked
    # Draws of either version count where any draw does.
    run(path, requests(), again, reuse=True)
    assert {each.writer for each in again.asked} == {"teacher"}
    assert len(again.asked) == len(requests()) - len(drawn)


async def read(stream: object) -> list[Rollout]:
    return [each async for part in stream for each in part]


def test_rows_of_any_writer_are_translated_and_new_ones_left_alone() -> None:
    ids = np.arange(3, dtype=np.int32)
    drawn = [Rollout(i, i, ids, ids[:i], None, None, ids[:i], alpha, "stop") for i, alpha in enumerate((0.0, 0.3, 1.0, 1.0))]
    data = Rollout(9, 9, ids, ids, None, None, ids, 0.0, "stop", writer=written_by("data", 3))
    rollouts = [*drawn, data]
    table = old_table(rollouts)
    assert np.isnan(table.column("alpha").to_numpy()).tolist() == [False] * 4 + [True]
    for given in (table, table.slice(1), rollouts_to_table(rollouts), rollouts_to_table(rollouts).slice(1)):
        wanted = rollouts[-given.num_rows :]
        for one, other in zip(table_to_rollouts(given), wanted, strict=True):
            assert (one.alpha, one.writers) == (other.alpha, other.writers)
            np.testing.assert_array_equal(one.writer, other.writer)
            assert one.writer.dtype == np.int8
        assert row_writers(given).tolist() == [1, 0, 2, 2, 3][-given.num_rows :]


def test_of_several_writers_of_a_row_the_student_is_named() -> None:
    ids = np.arange(4, dtype=np.int32)
    rows = [[2, 4, 2, 2], [2, 4, 1, 2], [4, 3, 3, 4], [2, 0, 3, 1], [4, 4, 4, 4]]
    rollouts = [Rollout(0, 0, ids, ids, None, None, ids, 1.0, "stop", writer=np.array(row, np.int8)) for row in rows]
    assert row_writers(rollouts_to_table(rollouts)).tolist() == [2, 1, 3, 0, 4]


def test_a_students_part_is_found_in_an_older_file_and_in_one_turn_of_a_new_one(tmp_path: Path) -> None:
    one = answer(requests()[0])
    length = len(one.token_ids)
    for name, table in (
        ("old", old_table([replace(one, alpha=0.2, writer=written_by("mixture", length))])),
        ("turn", rollouts_to_table([replace(one, alpha=0.2, writer=np.array([*[2] * (length - 1), 1], np.int8))])),
    ):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=r"sample 0 was drawn at alpha 0\.2"):
            CapturedTeacher("past", tmp_path / f"{name}.parquet", prompts(5), VOCAB, TOKENIZER)


def test_an_older_capture_is_added_to(tmp_path: Path) -> None:
    path, wanted = tmp_path / "there", requests()
    write_capture(path, [answer(wanted[0])], FINGERPRINT, TOKENIZER, VOCAB)
    (new,) = path.glob("*.parquet")
    pq.write_table(old_table([answer(wanted[0])]), path / "part-old.parquet")
    new.unlink()
    write_capture(path, [answer(wanted[1])], FINGERPRINT, TOKENIZER, VOCAB)
    assert signals(path) == {"text", "sampled", "top_k"}
    assert read_manifest(path).rollouts == 2  # type: ignore[union-attr]


def test_a_journal_of_strange_rows_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    for change in (
        lambda schema: schema.remove(schema.get_field_index("token_ids")),
        lambda schema: schema.remove(schema.get_field_index("teacher_logprobs")),
        lambda schema: schema.set(schema.get_field_index("seed"), pa.field("seed", pa.int64())),
        lambda schema: schema.append(pa.field("more", pa.int8())),
    ):
        path = tmp_path / "there"
        path.mkdir(exist_ok=True)
        write_manifest(path, Manifest(FINGERPRINT, TOKENIZER, VOCAB, 0, ASKED_WITH, 0, complete=False))
        (path / "journal").unlink(missing_ok=True)
        Journal(path / "journal", change(OLD_CAPTURE)).close()
        before = (path / "journal").read_bytes()
        with pytest.raises(DataError, match="holds rows of another version of kdray"), CaptureFolder(path, KEY_SPEC):
            pass
        assert (path / "journal").read_bytes() == before


def test_a_journal_is_rewritten_once(tmp_path: Path) -> None:
    path = tmp_path / "there"
    interrupted(path, 0, 6, mixed())
    with CaptureFolder(path, KEY_SPEC) as folder:
        assert folder.held == 6
    journal = Journal(path / "journal", CAPTURE_SCHEMA)
    assert (journal.num_rows, journal.torn_bytes) == (6, 0)
    journal.close()
    # As a kill in the middle of it leaves the folder: the old file is whole.
    interrupted(tmp_path / "killed", 0, 6, mixed())
    (tmp_path / "killed" / ".journal.1234").write_bytes(b"half of")
    with CaptureFolder(tmp_path / "killed", KEY_SPEC) as folder:
        assert folder.held == 6
    assert not list((tmp_path / "killed").glob(".journal.*"))
