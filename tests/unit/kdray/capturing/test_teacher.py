"""Recorded answers: the same whatever the split into files and row groups, found by tokens, refused where they do not fit."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from collections.abc import AsyncGenerator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save_file

from kdray.capturing.format import Manifest, check_model, read_manifest, signals, write_capture
from kdray.capturing.teacher import CACHED_GROUPS, CapturedTeacher
from kdray.config import CaptureTeacherSettings, TinyModel
from kdray.errors import DataError, RequestRefused, VocabError
from kdray.models.resolve import model_name, weights_hash
from kdray.rollouts.arrow import ROLLOUT_SCHEMA, rollouts_to_table
from kdray.rollouts.columns import unscored
from kdray.teachers.fingerprint import Fingerprint
from kdray.types import Prompt, Rollout, SampleRequest, written_by

VOCAB, TOKENIZER = 20, "0123456789abcdef"
FINGERPRINT = Fingerprint("some/teacher", None, TOKENIZER, VOCAB, "float32", (1, 2, 3), (-0.5, -1.25))
TEACHERS = ("teacher_logprobs", "support_ids", "support_logprobs", "tail_logprobs", "teacher_hidden")


def prompt_ids(index: int) -> np.ndarray:
    """Of a length of its own, so that prompts are no prefixes of one another alone."""
    return np.array([index % VOCAB, *range(index % 3), index // VOCAB], np.int32)


def prompts(count: int) -> list[Prompt]:
    """Their ids are not those of the capturing run."""
    return [Prompt(500 + index, prompt_ids(index), f"text {index}") for index in range(count)]


def rollout(sample_id: int, prompt: int, tokens: int = 3, signal: str = "hidden") -> Rollout:
    """What a teacher of the given kind said: each kind has what those before it have."""
    rng = np.random.default_rng(sample_id)
    kinds = ("text", "sampled", "top_k", "hidden")
    has = {kind: kinds.index(kind) <= kinds.index(signal) for kind in kinds}

    def floats(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Rollout(
        sample_id=sample_id,
        prompt_id=prompt,
        prompt_ids=prompt_ids(prompt),
        token_ids=rng.integers(0, VOCAB, size=tokens).astype(np.int32),
        mixture_logprobs=floats(tokens) if has["sampled"] else None,
        student_logprobs=floats(tokens) if has["sampled"] else None,
        student_versions=np.arange(tokens, dtype=np.int32),
        alpha=1.0,
        finish_reason=("stop", "length")[sample_id % 2],
        teacher="long ago",
        teacher_logprobs=floats(tokens) if has["sampled"] else None,
        support_ids=rng.integers(-1, VOCAB, size=(tokens, 2)).astype(np.int32) if has["top_k"] else None,
        support_logprobs=floats(tokens, 2) if has["top_k"] else None,
        tail_logprobs=floats(tokens) if has["top_k"] else None,
        reverse_kl=floats(tokens) if has["sampled"] else None,
        forward_kl=floats(tokens) if has["sampled"] else None,
        teacher_hidden=floats(tokens, 4).astype(np.float16) if has["hidden"] else None,
    )


def request(sample_id: int, prompt: int, max_new_tokens: int = 8, min_version: int = 9) -> SampleRequest:
    return SampleRequest(sample_id, 500 + prompt, prompt_ids(prompt), 1.0, 77, max_new_tokens, min_version)


def capture(path: Path, rollouts: Sequence[Rollout], **changes: Any) -> Path:
    about: dict[str, Any] = {"fingerprint": FINGERPRINT, "tokenizer": TOKENIZER, "vocab_size": VOCAB}
    write_capture(path, rollouts, **(about | changes))
    return path


def opened(path: Path, count: int, vocab_size: int = VOCAB, tokenizer: str = TOKENIZER) -> CapturedTeacher:
    return CapturedTeacher("past", path, prompts(count), vocab_size, tokenizer)


def answers(teacher: CapturedTeacher, asked: Sequence[SampleRequest]) -> list[Rollout]:
    return sorted(asyncio.run(read(teacher.sample(asked))), key=lambda each: each.sample_id)


async def read(stream: AsyncGenerator[list[Rollout]]) -> list[Rollout]:
    return [each async for part in stream for each in part]


def expected(stored: Rollout, asked: SampleRequest) -> Rollout:
    return replace(
        stored,
        sample_id=asked.sample_id,
        prompt_id=asked.prompt_id,
        student_versions=np.full(len(stored.token_ids), asked.min_version, np.int32),
        teacher="past",
        student_logprobs=None,
        reverse_kl=None,
        forward_kl=None,
    )


def check_same(found: Rollout, wanted: Rollout) -> None:
    """Every field, bit for bit, dtypes included."""
    for field in fields(Rollout):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        assert type(one) is type(other), field.name
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, field.name
            np.testing.assert_array_equal(one, other, err_msg=field.name)
        else:
            assert one == other, field.name


# ------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("signal", ["text", "sampled", "top_k", "hidden"])
def test_what_was_captured_comes_back_as_the_requests_own(tmp_path: Path, signal: str) -> None:
    stored = [rollout(40 + index, index, tokens=index, signal=signal) for index in range(6)]
    path = capture(tmp_path / "there", stored)
    asked = [request(index, index) for index in (3, 0, 5, 1, 4, 2)]
    teacher = opened(path, 6)
    found = answers(teacher, asked)
    assert [each.sample_id for each in found] == list(range(6))
    for each in asked:
        check_same(found[each.sample_id], expected(stored[each.sample_id], each))
    assert teacher.longest_answer == 5
    assert teacher.manifest == Manifest(FINGERPRINT, TOKENIZER, VOCAB, 6)
    kinds = ("text", "sampled", "top_k", "hidden")
    assert teacher.signals == signals(path) == set(kinds[: kinds.index(signal) + 1])


def test_prompts_are_found_by_their_tokens_alone(tmp_path: Path) -> None:
    # The capturing run gave prompt 0 the number of our prompt 1, and the other way round.
    path = capture(tmp_path / "there", [replace(rollout(1, 0), prompt_id=501), replace(rollout(2, 1), prompt_id=500)])
    first, second = answers(opened(path, 2), [request(10, 0), request(11, 1)])
    np.testing.assert_array_equal(first.token_ids, rollout(1, 0).token_ids)
    np.testing.assert_array_equal(second.token_ids, rollout(2, 1).token_ids)


def test_answers_of_a_prompt_take_turns_and_a_request_gets_the_same_again(tmp_path: Path) -> None:
    path = capture(tmp_path / "there", [rollout(index, index % 2) for index in range(6)])
    teacher = opened(path, 2)
    found = [answers(teacher, [request(sample_id, 0)])[0].token_ids.tolist() for sample_id in range(6)]
    turns = [rollout(index, 0).token_ids.tolist() for index in (0, 2, 4)]
    assert found == turns * 2
    # Another process, asked in another order and all at once.
    again = answers(opened(path, 2), [request(sample_id, 0) for sample_id in (5, 3, 1, 0, 2, 4)])
    assert [each.token_ids.tolist() for each in again] == found


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[Rollout], list[list[int]], int]:
    """Rollouts of 4 prompts, the indices that each shard holds, and the rows of a row group."""
    count = draw(st.integers(4, 14))
    stored = [rollout(index, index % 4, tokens=index % 5) for index in range(count)]
    shards: list[list[int]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for index in draw(st.permutations(range(count))):
        shards[draw(st.integers(0, len(shards) - 1))].append(index)
    return stored, shards, draw(st.integers(1, 6))


@settings(max_examples=40)
@given(splits())
def test_the_split_into_shards_and_row_groups_changes_no_answer(split: tuple[list[Rollout], list[list[int]], int]) -> None:
    stored, shards, rows = split
    asked = [request(sample_id, sample_id % 4) for sample_id in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "there")
        path.mkdir()
        for number, shard in enumerate(shards):
            table = rollouts_to_table([stored[index] for index in shard])
            pq.write_table(table, path / f"{number}.parquet", row_group_size=rows)
        manifest = {"fingerprint": None, "tokenizer": TOKENIZER, "vocab_size": VOCAB, "rollouts": len(stored)}
        (path / "manifest.json").write_text(json.dumps(manifest))
        teacher = opened(path, 4)
        found = answers(teacher, asked)
    for each, answer in zip(asked, found, strict=True):
        own = [one for one in stored if one.prompt_id == each.sample_id % 4]
        check_same(answer, expected(own[each.sample_id % len(own)], each))
    assert teacher.signals == {"text", "sampled", "top_k", "hidden"}


def test_a_large_capture_is_read_a_few_row_groups_at_a_time(tmp_path: Path) -> None:
    count, tokens = 60, 2000
    path = tmp_path / "large.parquet"
    table = rollouts_to_table([rollout(index, index, tokens) for index in range(count)])
    pq.write_table(table, path, row_group_size=1)
    one_group = table.nbytes // count
    del table
    before = pa.total_allocated_bytes()
    teacher = opened(path, count)
    assert pa.total_allocated_bytes() - before < one_group
    for index in range(count):
        (answer,) = answers(teacher, [request(index, index, tokens)])
        np.testing.assert_array_equal(answer.token_ids, rollout(index, index, tokens).token_ids)
        del answer
        assert pa.total_allocated_bytes() - before < 2 * (CACHED_GROUPS + 1) * one_group
    reads = teacher._group.cache_info()
    assert (reads.misses, reads.currsize) == (count, CACHED_GROUPS)
    # What was just read is not read again, and an answer in use does not keep its row group.
    kept = answers(teacher, [request(count - 1, count - 1, tokens), request(count - 2, count - 2, tokens)])
    assert teacher._group.cache_info().misses == count
    asyncio.run(teacher.close())
    assert len(kept) == 2
    assert pa.total_allocated_bytes() - before < 4 * one_group


def test_row_groups_are_written_small(tmp_path: Path) -> None:
    path = capture(tmp_path / "there", [rollout(index, index, tokens=20_000, signal="top_k") for index in range(30)])
    (shard,) = path.glob("*.parquet")
    metadata = pq.read_metadata(shard)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert sum(sizes) == 30
    assert 1 < len(sizes) < 30


# ------------------------------------------------------------------------------------------------------ writing


def test_shards_are_added_and_counted_and_nothing_half_written_is_left(tmp_path: Path) -> None:
    path = tmp_path / "there"
    shards = [
        write_capture(path, [rollout(2 * number, 0), rollout(2 * number + 1, 1)], FINGERPRINT, TOKENIZER, VOCAB)
        for number in range(3)
    ]
    assert sorted(path.iterdir()) == sorted([*shards, path / "manifest.json"])
    assert read_manifest(path) == Manifest(FINGERPRINT, TOKENIZER, VOCAB, 6)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {"fingerprint", "tokenizer", "vocab_size", "rollouts", "asked_with", "asked", "complete"}
    assert Fingerprint.from_dict(manifest["fingerprint"]) == FINGERPRINT
    assert len(answers(opened(path, 2), [request(index, index % 2) for index in range(6)])) == 6


def test_a_write_that_fails_leaves_the_capture_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = capture(tmp_path / "there", [rollout(0, 0)])
    before = {file: file.read_bytes() for file in path.iterdir()}

    def full(table: pa.Table, file: Any, **_: Any) -> None:
        file.write(b"PAR1")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="no space left"):
            capture(path, [rollout(1, 1)])
    assert {file: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "f" * 16}, f"its tokenizer is {TOKENIZER}, not {'f' * 16}"),
        ({"vocab_size": 21}, "it has 20 ids, not 21"),
        ({"fingerprint": None}, "one of them is a black box"),
        ({"fingerprint": replace(FINGERPRINT, model="other/teacher")}, "its model is 'other/teacher'"),
        ({"fingerprint": replace(FINGERPRINT, scores=(-0.5, -3.0))}, "its canary no longer matches"),
    ],
)
def test_one_capture_holds_one_teachers_answers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = capture(tmp_path / "there", [rollout(0, 0)])
    with pytest.raises(DataError, match=rf"holds answers of another teacher: {message}.*write to another folder"):
        capture(path, [rollout(1, 1)], **changes)
    assert len(list(path.glob("*.parquet"))) == 1


def test_a_students_part_is_not_captured(tmp_path: Path) -> None:
    mixed = replace(rollout(3, 0), alpha=0.2, writer=written_by("mixture", 3))
    with pytest.raises(DataError, match=r"sample 3 was drawn at alpha 0\.2.*capture with rollout\.alpha=1"):
        capture(tmp_path / "there", [rollout(0, 0), mixed])
    assert not (tmp_path / "there").exists()
    pq.write_table(rollouts_to_table([mixed]), tmp_path / "mixed.parquet")
    with pytest.raises(DataError, match=r"sample 3 was drawn at alpha 0\.2"):
        opened(tmp_path / "mixed.parquet", 1)


# ------------------------------------------------------------------------------------------------------ signals


def test_a_signal_is_what_every_answer_has(tmp_path: Path) -> None:
    path = tmp_path / "there"
    # An answer without tokens has empty columns, which are no nulls.
    capture(path, [rollout(0, 0), rollout(1, 0, tokens=0)])
    assert signals(path) == {"text", "sampled", "top_k", "hidden"}
    capture(path, [rollout(2, 0, signal="top_k"), rollout(3, 0)])
    assert signals(path) == {"text", "sampled", "top_k"}
    capture(path, [rollout(4, 0, signal="text"), rollout(5, 0)])
    assert signals(path) == {"text"}
    # Columns that only some have would not make a batch.
    found = answers(opened(path, 1), [request(index, 0) for index in range(6)])
    assert all(getattr(each, name) is None for each, name in itertools.product(found, TEACHERS))


def test_an_empty_capture_promises_nothing(tmp_path: Path) -> None:
    assert signals(capture(tmp_path / "there", [])) == set()


def test_a_top_k_without_its_tail_is_none(tmp_path: Path) -> None:
    assert signals(capture(tmp_path / "there", [replace(rollout(0, 0), tail_logprobs=None)])) == {"text", "sampled", "hidden"}


# ----------------------------------------------------------------------------------------------------- refusals


def test_what_a_file_cannot_answer_is_refused(tmp_path: Path) -> None:
    teacher = opened(capture(tmp_path / "there", [rollout(0, 0, tokens=3), rollout(1, 1, tokens=7)]), 2)
    with pytest.raises(RequestRefused, match=r"alpha 1, not 0\.2; set rollout\.alpha=1"):
        answers(teacher, [replace(request(0, 0), alpha=0.2)])
    with pytest.raises(RequestRefused, match=r"prompt 502 is none of those that teachers\.past was opened for"):
        answers(teacher, [request(0, 2)])
    with pytest.raises(RequestRefused, match=r"rollout\.max_new_tokens=2, .* prompt 500 has 3 tokens; set it to 7"):
        answers(teacher, [request(0, 0, max_new_tokens=2)])
    assert len(answers(teacher, [request(0, 0, max_new_tokens=3)])) == 1
    with pytest.raises(RequestRefused, match=r"teachers\.past\.type=capture: recorded answers say nothing of other sequences"):
        asyncio.run(read(teacher.score([unscored(rollout(2, 0))])))
    for asked, top_k in ((rollout(0, 0), True), (unscored(rollout(0, 0)), False)):
        with pytest.raises(RequestRefused, match=r"say nothing at ids that another teacher names"):
            asyncio.run(read(teacher.score([asked], top_k)))


def test_missing_paths_and_files_are_named(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "nowhere: no such file or folder"),
        (tmp_path, r"the folder has no manifest\.json"),
    ):
        with pytest.raises(DataError, match=message):
            opened(path, 1)
    path = capture(tmp_path / "there", [rollout(0, 0)])
    for shard in path.glob("*.parquet"):
        shard.unlink()
    with pytest.raises(DataError, match=r"the folder has no \*\.parquet"):
        opened(path, 1)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"text\.parquet: cannot be read as Parquet"):
        opened(tmp_path / "text.parquet", 1)


def test_another_schema_is_refused_column_by_column(tmp_path: Path) -> None:
    table = rollouts_to_table([rollout(0, 0)])
    wide = table.set_column(
        table.schema.get_field_index("token_ids"), "token_ids", table.column("token_ids").cast(pa.list_(pa.int64()))
    )
    for changed, message in (
        (table.drop_columns(["teacher_logprobs"]), "column teacher_logprobs is absent, and rollouts have list<"),
        (wide, "column token_ids is list<.*int64"),
    ):
        pq.write_table(changed, tmp_path / "changed.parquet")
        with pytest.raises(DataError, match=message):
            opened(tmp_path / "changed.parquet", 1)
    # Order and further columns do not matter.
    more = table.select(list(reversed(ROLLOUT_SCHEMA.names))).append_column("more", pa.array(["x"]))
    pq.write_table(more, tmp_path / "more.parquet")
    (found,) = answers(opened(tmp_path / "more.parquet", 1), [request(0, 0)])
    check_same(found, expected(rollout(0, 0), request(0, 0)))


def test_prompts_without_an_answer_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    path = capture(tmp_path / "there", [rollout(index, index) for index in (0, 1, 3)])
    with pytest.raises(DataError, match=r"2 of 5 prompts have no answer there, first prompt 502 \('text 2', 4 tokens\)"):
        opened(path, 5)


def test_another_tokenizer_or_more_ids_than_the_students_are_refused(tmp_path: Path) -> None:
    path = capture(tmp_path / "there", [rollout(0, 0)])
    with pytest.raises(DataError, match=rf"made with tokenizer {TOKENIZER}, and the student's is other"):
        opened(path, 1, tokenizer="other")
    with pytest.raises(VocabError, match="distributions cover 20 ids, and the student has 19"):
        opened(path, 1, vocab_size=19)
    opened(path, 1, vocab_size=21)


def test_ids_that_the_student_has_not_are_refused_without_a_manifest_too(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    stored = replace(rollout(8, 0), token_ids=np.array([1, 19, 2], np.int32), support_ids=np.full((3, 2), 5, np.int32))
    pq.write_table(rollouts_to_table([stored]), path)
    with pytest.raises(VocabError, match="sample 8 holds id 19, and the student has 19"):
        opened(path, 1, vocab_size=19)
    pq.write_table(rollouts_to_table([replace(stored, support_ids=np.full((3, 2), 25, np.int32))]), path)
    with pytest.raises(DataError, match="sample 8: its support names id 25, and the student has 20"):
        answers(opened(path, 1), [request(0, 0)])


def test_a_lost_shard_is_noticed(tmp_path: Path) -> None:
    path = capture(tmp_path / "there", [rollout(0, 0)])
    capture(path, [rollout(1, 0)])
    next(path.glob("*.parquet")).unlink()
    with pytest.raises(DataError, match="hold 1 of the 2 rollouts"):
        opened(path, 1)


def test_a_column_that_does_not_fit_and_a_file_that_changed_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    pq.write_table(rollouts_to_table([replace(rollout(0, 0), tail_logprobs=np.zeros(2, np.float32))]), path)
    with pytest.raises(DataError, match="sample 0: its tail_logprobs does not fit its tokens"):
        answers(opened(path, 1), [request(0, 0)])
    pq.write_table(rollouts_to_table([rollout(0, 0)]), path)
    teacher = opened(path, 1)
    pq.write_table(rollouts_to_table([rollout(0, 1)]), path)
    with pytest.raises(DataError, match="it answers another prompt than at the start of the run"):
        answers(teacher, [request(0, 0)])


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "{}",
        '{"fingerprint": null, "tokenizer": 3, "vocab_size": 20, "rollouts": 1}',
        '{"fingerprint": null, "tokenizer": "x", "vocab_size": true, "rollouts": 1}',
        '{"fingerprint": {"model": "m"}, "tokenizer": "x", "vocab_size": 20, "rollouts": 1}',
    ],
)
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    path = capture(tmp_path / "there", [rollout(0, 0)])
    (path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: .*capture again"):
        opened(path, 1)


def test_a_manifest_that_names_files_is_refused(tmp_path: Path) -> None:
    pq.write_table(rollouts_to_table([rollout(7, 1)]), tmp_path / "outside.parquet")
    path = capture(tmp_path / "there", [rollout(0, 0)])
    manifest = json.loads((path / "manifest.json").read_text())
    outside = str(tmp_path / "outside.parquet")
    strange = {"files": [outside], "path": outside, "shards": ["../outside.parquet"]}
    (path / "manifest.json").write_text(json.dumps(manifest | strange))
    with pytest.raises(DataError, match="unknown entries files, path, shards"):
        opened(path, 2)


def test_settings_know_their_type_and_need_a_path() -> None:
    assert CaptureTeacherSettings(type="capture", path=Path("there")).path == Path("there")
    with pytest.raises(ValidationError):
        CaptureTeacherSettings(type="capture")  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------- whose answers


def made_by(model: str, weights: str | None = None, revision: str | None = None) -> Manifest:
    about = {"type": "vllm", "model": model, "revision": revision, "weights": weights}
    return Manifest(None, TOKENIZER, VOCAB, 1, about)


def folder_with(path: Path, seed: int, change: tuple[str, int] | None = None) -> str:
    """Weights as a model's folder has them. Args: change: a tensor, and the row of it that training has moved."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=(64, 64)).astype(np.float32) for name in ("embed", "layer.0", "layer.1")}
    if change is not None:
        tensors[change[0]][change[1]] += 1e-3
    save_file(tensors, path / "model.safetensors")
    return str(path)


def test_a_required_model_is_compared_by_its_weights_wherever_it_lies(tmp_path: Path) -> None:
    there = folder_with(tmp_path / "a" / "final", seed=1)
    manifest = made_by("final", weights_hash(there))
    check_model("teachers.x.model", manifest, there, None)
    # Moved and renamed, it is the same teacher; of the same name with one other tensor, another one.
    check_model("teachers.x.model", manifest, folder_with(tmp_path / "moved", seed=1), None)
    others = [folder_with(tmp_path / "b" / "final", seed=2)]
    others += [folder_with(tmp_path / f"{row}" / "final", seed=1, change=("layer.1", row)) for row in (0, 32)]
    for other in others:
        with pytest.raises(DataError, match=r"x\.model=final: the capture was made by final, whose weights are others"):
            check_model("teachers.x.model", manifest, other, None)


def test_a_required_model_of_the_hub_or_an_endpoint_is_compared_by_name(tmp_path: Path) -> None:
    tiny = TinyModel(type="tiny", layers=3)
    check_model("m", made_by("org/name", revision="v1"), "org/name", "v1")
    check_model("m", made_by(model_name(tiny), "0" * 16), tiny, None)
    check_model("m", Manifest(FINGERPRINT, TOKENIZER, VOCAB, 1), "some/teacher", None)
    for manifest, model, revision, message in (
        (made_by("org/name", revision="v1"), "org/name", None, "m=org/name: the capture was made by org/name at v1"),
        (made_by("org/name"), "org/other", None, "m=org/other: the capture was made by org/name; name that teacher"),
        (made_by(model_name(tiny)), TinyModel(type="tiny", layers=4), None, r"m=tiny-\w+: the capture was made by tiny-"),
        (Manifest(FINGERPRINT, TOKENIZER, VOCAB, 1), "other", None, "m=other: the capture was made by some/teacher"),
        (Manifest(None, TOKENIZER, VOCAB, 1), "other", None, "does not say whose answers it holds"),
        (None, "other", None, "one Parquet file does not say whose answers it holds"),
    ):
        with pytest.raises(DataError, match=message):
            check_model("m", manifest, model, revision)
    with pytest.raises(ValidationError, match="revision=v1 without `model`"):
        CaptureTeacherSettings(type="capture", path=tmp_path, revision="v1")


def test_a_damaged_shard_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = capture(tmp_path / "there", [rollout(index, index, tokens=50) for index in range(4)])
    (shard,) = path.glob("*.parquet")
    chunk = next(
        pq.read_metadata(shard).row_group(0).column(number)
        for number in range(pq.read_metadata(shard).num_columns)
        if pq.read_metadata(shard).schema.column(number).path.startswith("teacher_logprobs")
    )
    content = bytearray(shard.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"part-\w+\.parquet: cannot be read as Parquet: .*restore it, or capture again"):
        answers(opened(path, 4), [request(0, 0, max_new_tokens=50)])


def test_the_same_rows_again_are_the_same_shard(tmp_path: Path) -> None:
    path = tmp_path / "there"
    one, other = (write_capture(path, [rollout(0, 0)], FINGERPRINT, TOKENIZER, VOCAB) for _ in range(2))
    assert one == other
    assert read_manifest(path) == Manifest(FINGERPRINT, TOKENIZER, VOCAB, 1)
