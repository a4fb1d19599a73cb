"""Capturing with a teacher that counts its calls: every answer once, whatever is killed when, and nobody else's."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdray.capturing.collect import ask, by_key, check_alone, lacking
from kdray.capturing.format import read_manifest, signals, write_capture
from kdray.capturing.teacher import CapturedTeacher
from kdray.capturing.writer import CaptureFolder, CaptureKeySpec
from kdray.data.dataset import PromptStream
from kdray.errors import ConfigError, DataError, EngineError, RequestRefused
from kdray.rollouts.draw import LoopSettings, sample_request
from kdray.teachers.fingerprint import Fingerprint
from kdray.types import Prompt, Rollout, SampleRequest, written_by

VOCAB, TOKENIZER = 12, "0123456789abcdef"
FINGERPRINT = Fingerprint("some/teacher", None, TOKENIZER, VOCAB, "float32", (1, 2, 3), (-0.5, -1.25))
ASKED_WITH = {"type": "vllm", "model": "some/teacher", "revision": None, "max_new_tokens": 8, "stop_ids": [1]}
KEY_SPEC = CaptureKeySpec(TOKENIZER, VOCAB, ASKED_WITH)
SAMPLES = 3


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(index, np.array([2, index % VOCAB, index // VOCAB], np.int32), f"text {index}", "x") for index in range(count)
    ]


def requests(count: int = 10, seed: int = 0, epochs: int = 1) -> list[SampleRequest]:
    """What a run asks for in its first epochs over this many prompts."""
    settings = LoopSettings(seed, 9, 6, 1.0, 8, SAMPLES, 0, 0, 0)
    stream = PromptStream(prompts(count), seed)
    return [sample_request(settings, stream, sample_id) for sample_id in range(count * SAMPLES * epochs)]


def answer(request: SampleRequest) -> Rollout:
    """What the stub draws: a function of prompt and seed, as a teacher's answer is."""
    rng = np.random.default_rng([request.seed, *request.prompt_ids.tolist()])
    tokens = int(rng.integers(1, 6))
    logprobs = rng.normal(size=tokens).astype(np.float32)
    return Rollout(
        sample_id=request.sample_id,
        prompt_id=request.prompt_id,
        prompt_ids=request.prompt_ids,
        token_ids=rng.integers(0, VOCAB, tokens).astype(np.int32),
        mixture_logprobs=logprobs,
        student_logprobs=rng.normal(size=tokens).astype(np.float32),
        student_versions=np.zeros(tokens, np.int32),
        alpha=request.alpha,
        finish_reason="stop",
        teacher="stub",
        teacher_logprobs=logprobs,
        support_ids=np.zeros((tokens, 1), np.int32),
        support_logprobs=rng.normal(size=(tokens, 1)).astype(np.float32),
        tail_logprobs=rng.normal(size=tokens).astype(np.float32),
        reverse_kl=logprobs,
        forward_kl=logprobs,
    )


class Killed(Exception):
    """Stands for `kill -9`: nothing of the process runs any more."""


@dataclass
class Stub:
    """A sampler that notes what it is asked, and dies after a number of answers."""

    dies_after: int | None = None
    asked: list[SampleRequest] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    most_in_flight: int = 0

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        self.asked += requests
        for start in range(0, len(requests), 2):
            await asyncio.sleep(0)
            self.most_in_flight = max(self.most_in_flight, len(self.asked) - len(self.answered))
            if self.dies_after is not None and len(self.answered) >= self.dies_after:
                raise Killed
            part = requests[start : start + 2]
            self.answered += [request.sample_id for request in part]
            yield [answer(request) for request in part]


def no_reference(prompt_id: int) -> np.ndarray:
    raise AssertionError("no request is for the data's answer")


def run(
    path: Path,
    wanted: Sequence[SampleRequest],
    stub: Stub,
    shard_bytes: int = 10**9,
    spec: CaptureKeySpec = KEY_SPEC,
    fingerprint: Fingerprint | None = FINGERPRINT,
    references: Any = no_reference,
    reuse: bool = False,
) -> CaptureFolder:
    """One start of a capture."""
    with CaptureFolder(path, spec, shard_bytes) as folder:
        missing = lacking(folder, by_key(folder, wanted, references), reuse)
        folder.begin(fingerprint)
        asyncio.run(ask(folder, missing, stub, None, in_flight=8))
        folder.complete()
    return folder


def rows(path: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(shard) for shard in sorted(path.glob("*.parquet"))])


def check_once(path: Path, wanted: Sequence[SampleRequest]) -> None:
    """Every request's own answer, once, counted from the files."""
    table = rows(path)
    found = Counter(zip(map(tuple, table.column("prompt_ids").to_pylist()), table.column("seed").to_pylist(), strict=True))
    assert found == Counter((tuple(each.prompt_ids.tolist()), each.seed) for each in wanted)
    tokens = dict(zip(table.column("seed").to_pylist(), table.column("token_ids").to_pylist(), strict=True))
    assert all(tokens[each.seed] == answer(each).token_ids.tolist() for each in wanted)
    manifest = read_manifest(path)
    assert manifest is not None
    assert (manifest.rollouts, manifest.complete) == (len(wanted), True)


def sample(path: Path, asked: Sequence[SampleRequest], count: int = 10) -> list[Rollout]:
    async def read() -> list[Rollout]:
        teacher = CapturedTeacher("past", path, prompts(count), VOCAB, TOKENIZER)
        return [each async for part in teacher.sample(asked) for each in part]

    return sorted(asyncio.run(read()), key=lambda each: each.sample_id)


# ---------------------------------------------------------------------------------------------------- once and all


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_every_answer_is_asked_and_kept_once(tmp_path: Path, shard_bytes: int) -> None:
    path, stub = tmp_path / "there", Stub()
    folder = run(path, requests(), stub, shard_bytes)
    check_once(path, requests())
    assert Counter(each.sample_id for each in stub.asked) == Counter(range(30))
    assert stub.most_in_flight <= 8
    assert folder.asked == folder.held == 30
    assert read_manifest(path).asked == 30  # type: ignore[union-attr]
    assert (len(list(path.glob("*.parquet"))) > 1) == (shard_bytes < 10**9)
    # The student of the capturing run has no part in it.
    assert rows(path).column("student_logprobs").null_count == rows(path).column("forward_kl").null_count == 30


@pytest.mark.parametrize("shard_bytes", [1, 2000, 10**9])
def test_killed_after_any_number_of_answers_it_asks_for_the_missing_ones_alone(tmp_path: Path, shard_bytes: int) -> None:
    # A shard for every answer waits for the disk each time: fewer places to die at.
    for dies_after in range(0, 31, 10 if shard_bytes == 1 else 2):
        path = tmp_path / str(dies_after)
        first, second = Stub(dies_after), Stub()
        if dies_after < 30:
            with pytest.raises(Killed):
                run(path, requests(), first, shard_bytes)
        else:
            run(path, requests(), first, shard_bytes)
        kept = set(first.answered)
        folder = run(path, requests(), second, shard_bytes)
        assert Counter(each.sample_id for each in second.asked) == Counter(set(range(30)) - kept), dies_after
        check_once(path, requests())
        # What was in flight is all that was asked for twice; the count may hold a call that was not sent any more.
        assert len(first.asked) - len(kept) <= folder.asked - folder.held <= 8


def test_a_second_start_asks_nothing(tmp_path: Path) -> None:
    path, stub = tmp_path / "there", Stub()
    run(path, requests(), Stub())
    before = {file: file.read_bytes() for file in path.glob("*.parquet")}
    run(path, requests(), stub)
    assert not stub.asked
    assert {file: file.read_bytes() for file in path.glob("*.parquet")} == before


def test_a_capture_is_extended_by_prompts_samples_and_seeds(tmp_path: Path) -> None:
    path = tmp_path / "there"
    run(path, requests(), Stub())
    more, epochs, seeds = Stub(), Stub(), Stub()
    run(path, requests(10, epochs=2), epochs)
    assert [each.sample_id for each in epochs.asked] == list(range(30, 60))
    run(path, requests(14), more)
    # Other places in the stream, other seeds; prompt and seed decide, not the sample's number.
    assert len(more.asked) == len(
        {(*r.prompt_ids, r.seed) for r in requests(14)} - {(*r.prompt_ids, r.seed) for r in requests(10, epochs=2)}
    )
    run(path, requests(10, seed=5), seeds)
    assert len(seeds.asked) == 30
    assert rows(path).num_rows == 30 + len(more.asked) + 60
    # Every one of these runs finds its own draws, in its own order.
    for wanted in (requests(14), requests(10, epochs=2), requests(10, seed=5)):
        for each, found in zip(wanted, sample(path, wanted, 14), strict=True):
            np.testing.assert_array_equal(found.token_ids, answer(each).token_ids)


def test_where_any_draw_counts_new_prompts_alone_are_asked_about(tmp_path: Path) -> None:
    path, stub = tmp_path / "there", Stub()
    run(path, requests(), Stub(), shard_bytes=2000)
    more = requests(14)
    run(path, more, stub, reuse=True)
    assert Counter(each.prompt_id for each in stub.asked) == dict.fromkeys(range(10, 14), SAMPLES)
    assert sum(len(each.token_ids) > 0 for each in sample(path, more, 14)) == len(more)
    # Twice as many samples of a prompt: as many as are there are not asked for.
    again = Stub()
    run(path, requests(14, epochs=2), again, reuse=True)
    assert Counter(each.prompt_id for each in again.asked) == dict.fromkeys(range(14), SAMPLES)


def test_a_run_from_the_capture_gets_what_the_teacher_would_have_said(tmp_path: Path) -> None:
    path = tmp_path / "there"
    run(path, requests(), Stub(), shard_bytes=2000)
    for each, found in zip(requests(), sample(path, requests()), strict=True):
        for name in (
            "prompt_id",
            "prompt_ids",
            "token_ids",
            "teacher_logprobs",
            "support_ids",
            "support_logprobs",
            "tail_logprobs",
        ):
            np.testing.assert_array_equal(getattr(found, name), getattr(answer(each), name))


# ------------------------------------------------------------------------------------------------ between two steps


def killed_with_a_journal(path: Path) -> int:
    """A folder of a process that was killed before its first shard. Returns: answers that it had."""
    stub = Stub(dies_after=12)
    with pytest.raises(Killed):
        run(path, requests(), stub)
    assert not list(path.glob("*.parquet"))
    return len(stub.answered)


def test_killed_between_a_shards_rename_and_the_end_of_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "there"
    kept = killed_with_a_journal(path)
    journal, manifest = ((path / name).read_bytes() for name in ("journal", "manifest.json"))
    with CaptureFolder(path, KEY_SPEC) as folder:
        folder.flush_shard()
    sealed = (path / "manifest.json").read_bytes()
    # As it lies after a kill right behind the rename, and behind the manifest.
    for count in (manifest, sealed):
        (path / "journal").write_bytes(journal)
        (path / "manifest.json").write_bytes(count)
        with CaptureFolder(path, KEY_SPEC) as folder:
            assert folder.held == kept
        with CaptureFolder(path, KEY_SPEC) as folder:
            # Again, as the second open left it.
            assert folder.held == kept
            folder.flush_shard()
        assert rows(path).num_rows == read_manifest(path).rollouts == kept  # type: ignore[union-attr]
    stub = Stub()
    run(path, requests(), stub)
    assert len(stub.asked) == 30 - kept
    check_once(path, requests())


def test_killed_while_a_shard_is_written(tmp_path: Path) -> None:
    path = tmp_path / "there"
    kept = killed_with_a_journal(path)
    (path / ".part-00ff.parquet.1234").write_bytes(b"PAR1 half of")
    (path / ".manifest.json.1234").write_text("{")
    stub = Stub()
    run(path, requests(), stub)
    assert len(stub.asked) == 30 - kept
    check_once(path, requests())
    assert {file.name.partition("-")[0] for file in path.iterdir()} == {
        "part",
        "journal",
        "manifest.json",
        "events.jsonl",
        ".lock",
    }


def test_a_torn_journal_and_a_torn_event_cost_what_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "there"
    kept = killed_with_a_journal(path)
    (path / "journal").write_bytes((path / "journal").read_bytes()[:-3])
    with (path / "events.jsonl").open("a") as file:
        file.write('{"kind": "asked", "answ')
    stub = Stub()
    folder = run(path, requests(), stub)
    # An append holds two answers here.
    assert len(stub.asked) == 30 - kept + 2
    check_once(path, requests())
    assert folder.asked - folder.held <= 8 + 2


def test_a_lost_shard_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "there"
    run(path, requests(), Stub(), shard_bytes=2000)
    lost = sorted(path.glob("*.parquet"))[0]
    count = pq.read_metadata(lost).num_rows
    lost.unlink()
    stub = Stub()
    run(path, requests(), stub)
    assert len(stub.asked) == count
    check_once(path, requests())


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    path = tmp_path / "there"
    with (
        CaptureFolder(path, KEY_SPEC),
        pytest.raises(ConfigError, match="another process writes to it"),
        CaptureFolder(path, KEY_SPEC),
    ):
        pass
    with CaptureFolder(path, KEY_SPEC):
        pass


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(KEY_SPEC, tokenizer="f" * 16), f"asked with tokenizer='{TOKENIZER}', not '{'f' * 16}'"),
        (replace(KEY_SPEC, vocab_size=13), "asked with vocab_size=12, not 13"),
        (replace(KEY_SPEC, asked_with=ASKED_WITH | {"model": "other"}), "asked with model='some/teacher', not 'other'"),
        (replace(KEY_SPEC, asked_with=ASKED_WITH | {"max_new_tokens": 9}), "asked with max_new_tokens=8, not 9"),
        (replace(KEY_SPEC, asked_with=ASKED_WITH | {"top_p": 0.9}), r"asked with top_p=None, not 0\.9"),
    ],
)
def test_answers_asked_in_another_way_are_refused_before_anybody_is_asked(
    tmp_path: Path, spec: CaptureKeySpec, message: str
) -> None:
    path, stub = tmp_path / "there", Stub()
    run(path, requests(), Stub())
    before = {file: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(DataError, match=f"{message}: one capture holds the answers of one teacher.*another folder"):
        run(path, requests(11), stub, spec=spec)
    assert not stub.asked
    assert {file: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize(
    ("fingerprint", "message"),
    [
        (replace(FINGERPRINT, scores=(-0.5, -3.0)), "its canary no longer matches"),
        (replace(FINGERPRINT, dtype="bfloat16"), "its dtype is 'bfloat16'"),
        (None, "one of them is a black box"),
    ],
)
def test_another_teacher_is_refused_as_soon_as_it_has_introduced_itself(
    tmp_path: Path, fingerprint: Fingerprint | None, message: str
) -> None:
    path, stub = tmp_path / "there", Stub()
    run(path, requests(), Stub())
    with pytest.raises(DataError, match=f"holds answers of another teacher: {message}"):
        run(path, requests(11), stub, fingerprint=fingerprint)
    assert not stub.asked
    assert read_manifest(path).complete  # type: ignore[union-attr]


def test_what_a_student_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.alpha=0\.2: .*set rollout\.alpha=1"):
        check_alone([replace(requests()[0], alpha=0.2)])
    check_alone([*requests(), of_data(requests()[0])])


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds mine\.txt and no capture"):
        run(tmp_path / "notes", requests(), Stub())
    write_capture(tmp_path / "other", [answer(requests()[0])], FINGERPRINT, TOKENIZER, VOCAB)
    with pytest.raises(DataError, match="not made by `kdray capture`"):
        run(tmp_path / "other", requests(), Stub())
    run(tmp_path / "there", requests(), Stub())
    with pytest.raises(DataError, match="made by `kdray capture`, which alone adds to it"):
        write_capture(tmp_path / "there", [answer(requests()[0])], FINGERPRINT, TOKENIZER, VOCAB)
    killed_with_a_journal(tmp_path / "killed")
    (tmp_path / "killed" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds events\.jsonl and no capture"):
        run(tmp_path / "killed", requests(), Stub())


def test_a_teacher_that_answers_something_else_is_an_error(tmp_path: Path) -> None:
    class Deaf(Stub):
        async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
            yield [answer(each) for each in requests[1:]]

    class Strange(Stub):
        async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
            yield [answer(requests[0])] * 2

    with pytest.raises(EngineError, match="ended with 4 answers missing"):
        run(tmp_path / "deaf", requests(), Deaf())
    with pytest.raises(EngineError, match="arrived twice"):
        run(tmp_path / "strange", requests(), Strange())


def test_training_from_an_unfinished_capture_is_told_how_to_finish_it(tmp_path: Path) -> None:
    path = tmp_path / "there"
    with pytest.raises(Killed):
        run(path, requests(), Stub(dies_after=12), shard_bytes=1)
    manifest = read_manifest(path)
    assert manifest is not None
    assert not manifest.complete
    with pytest.raises(DataError, match="prompts have no answer there.*not complete: start `kdray capture` again"):
        sample(path, requests())
    # The prompts that it has can be trained.
    there = {tuple(ids) for ids in rows(path).column("prompt_ids").to_pylist()}
    some = [prompt for prompt in prompts(10) if tuple(prompt.token_ids.tolist()) in there]
    assert 0 < len(some) < 10
    CapturedTeacher("past", path, some, VOCAB, TOKENIZER)


# -------------------------------------------------------------------------------------------------------- references


def reference(prompt_id: int) -> np.ndarray:
    return np.array([3, prompt_id % VOCAB, 1], np.int32)


def of_data(request: SampleRequest) -> SampleRequest:
    """A request for the prompt's reference answer."""
    return replace(request, alpha=0.0, writer="data")


class Scored(Stub):
    """Gives the data's answers to requests that no model is to draw for, with the teacher's columns."""

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        of_data = {request.sample_id for request in requests if request.writer == "data"}
        async for part in super().sample(requests):
            yield [scored(each) if each.sample_id in of_data else each for each in part]


def unscored(request: SampleRequest | Rollout) -> Rollout:
    ids = reference(request.prompt_id)
    return Rollout(
        request.sample_id,
        request.prompt_id,
        request.prompt_ids,
        ids,
        None,
        None,
        np.zeros(3, np.int32),
        0.0,
        "stop",
        writer=written_by("data", 3),
    )


def scored(request: SampleRequest | Rollout) -> Rollout:
    logprobs = -np.arange(1, 4, dtype=np.float32) - request.prompt_id
    wide = logprobs[:, None]
    return replace(
        unscored(request),
        teacher="stub",
        teacher_logprobs=logprobs,
        support_ids=reference(request.prompt_id)[:, None],
        support_logprobs=wide,
        tail_logprobs=logprobs - 1,
    )


def test_reference_answers_are_held_once_and_scored_again(tmp_path: Path) -> None:
    path, stub = tmp_path / "there", Scored()
    mixed = [of_data(each) if each.sample_id % 2 else each for each in requests()]
    run(path, mixed, stub, references=reference)
    assert signals(path) == {"text", "references", "sampled", "top_k"}
    distinct = {each.prompt_id for each in mixed if each.writer == "data"}
    drawn = [each for each in mixed if each.alpha == 1.0]
    assert rows(path).num_rows == len(stub.asked) == len(drawn) + len(distinct)
    again = Scored()
    run(path, mixed, again, references=reference)
    assert not again.asked
    teacher = CapturedTeacher("past", path, prompts(10), VOCAB, TOKENIZER)

    async def read(given: Sequence[Rollout]) -> list[Rollout]:
        return [each async for part in teacher.score(given) for each in part]

    wanted = [unscored(each) for each in mixed if each.writer == "data"]
    found = sorted(asyncio.run(read(wanted)), key=lambda each: each.sample_id)
    for each, one in zip(wanted, found, strict=True):
        assert (one.sample_id, one.teacher) == (each.sample_id, "past")
        assert (one.alpha, one.writers) == (0.0, ("data",))
        assert one.mixture_logprobs is None
        for name in ("token_ids", "teacher_logprobs", "support_ids", "support_logprobs", "tail_logprobs"):
            np.testing.assert_array_equal(getattr(one, name), getattr(scored(each), name))
    other = replace(wanted[0], token_ids=np.array([5, 5, 1], np.int32))
    with pytest.raises(RequestRefused, match=r"sample 1 of prompt .*capture the reference answers"):
        asyncio.run(read([other]))
    # What the teacher wrote is given for draws alone.
    assert all(one.alpha == 1.0 for one in sample(path, drawn))
    for each, one in zip(drawn, sample(path, drawn), strict=True):
        np.testing.assert_array_equal(one.token_ids, answer(each).token_ids)


def test_a_capture_of_references_alone_draws_nothing(tmp_path: Path) -> None:
    path = tmp_path / "there"
    run(path, [of_data(each) for each in requests()], Scored(), references=reference)
    assert signals(path) == {"references", "sampled", "top_k"}
    assert rows(path).column("seed").null_count == rows(path).num_rows == 10
    with pytest.raises(RequestRefused, match=r"and none that the teacher wrote; set rollout\.data_share=1"):
        sample(path, requests())


def test_another_reference_answer_is_another_row(tmp_path: Path) -> None:
    path, again = tmp_path / "there", Scored()
    wanted = [of_data(each) for each in requests()]
    run(path, wanted, Scored(), references=reference)
    run(path, wanted, again, references=lambda prompt_id: reference(prompt_id) + (prompt_id == 4))
    assert [each.prompt_id for each in again.asked] == [4]


def test_the_manifest_names_no_file_and_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "there"
    run(path, requests(), Stub())
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["asked_with"] == ASKED_WITH
    assert "part-" not in json.dumps(manifest)
    # The folder can be moved.
    shutil.move(path, tmp_path / "elsewhere")
    stub = Stub()
    run(tmp_path / "elsewhere", requests(), stub)
    assert not stub.asked
