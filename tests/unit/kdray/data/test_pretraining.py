"""Pretraining text: every token of every document a target once, and the loss against NumPy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdray.config import PretrainingSettings
from kdray.data.pretraining import load_windows
from kdray.errors import DataError
from kdray.losses import LossBatch
from kdray.losses.pretraining import pretraining
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.pretraining import PretrainingText
from kdray.types import Prompt

TOKENIZER = task_tokenizer()
EOS = TOKENIZER.eos_token_id


def text(source, **given_settings):
    return PretrainingSettings.model_validate({"source": source, **given_settings})


@pytest.fixture
def documents(tmp_path):
    def write(texts, column="text"):
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({column: document}) + "\n" for document in texts))
        return path

    return write


def test_windows_overlap_by_one_and_leave_no_token_out(documents):
    path = documents(["abcdefg", "x", "abc"])
    windows = load_windows(text({"type": "jsonl", "path": path}, window_tokens=4), TOKENIZER, seed=0)
    ids = {letter: TOKENIZER(letter)["input_ids"][0] for letter in "abcdefgx"}
    want = [[*"abcd"], [*"defg"], ["g", EOS], ["x", EOS], [*"abc", EOS]]
    assert [window.token_ids.tolist() for window in windows] == [[ids.get(part, part) for part in row] for row in want]
    assert [window.prompt_id for window in windows] == [0, 1, 2, 3, 4]


@settings(max_examples=40)
@given(st.lists(st.text("abcd ", max_size=40), min_size=1, max_size=6), st.integers(2, 12))
def test_targets_of_the_windows_are_the_documents(tmp_path_factory, texts, window_tokens):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in texts))
    given_settings = text({"type": "jsonl", "path": path}, window_tokens=window_tokens)
    ids = [[*TOKENIZER(document)["input_ids"], EOS] for document in texts]
    wanted = [token for document in ids for token in document[1:]]
    if not wanted:
        with pytest.raises(DataError, match="no document"):
            load_windows(given_settings, TOKENIZER, seed=0)
        return
    windows = load_windows(given_settings, TOKENIZER, seed=0)
    assert [int(token) for window in windows for token in window.token_ids[1:]] == wanted
    assert all(2 <= len(window.token_ids) <= window_tokens for window in windows)


def test_sources_and_what_is_wrong_with_them(documents, tmp_path):
    pq.write_table(pa.table({"body": ["one", "two"]}), tmp_path / "text.parquet")
    assert len(load_windows(text({"type": "parquet", "path": tmp_path / "text.parquet", "column": "body"}), TOKENIZER, 0)) == 2
    solved = load_windows(text({"type": "task", "tasks": ["arithmetic"], "size": 5}), TOKENIZER, seed=0)
    assert len(solved) == 5
    assert all("+" in TOKENIZER.decode(window.token_ids) and "=" in TOKENIZER.decode(window.token_ids) for window in solved)
    with pytest.raises(DataError, match=r"source\.column=text: .*line 1 has no such column; it has columns body"):
        load_windows(text({"type": "jsonl", "path": documents(["a"], "body")}), TOKENIZER, 0)
    with pytest.raises(DataError, match=r"source\.path=nowhere\.jsonl: no such file"):
        load_windows(text({"type": "jsonl", "path": "nowhere.jsonl"}), TOKENIZER, 0)
    (tmp_path / "text.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"line 1, 'text': a document is a text, found int 3"):
        load_windows(text({"type": "jsonl", "path": tmp_path / "text.jsonl"}), TOKENIZER, 0)


async def test_steps_take_all_windows_before_one_returns_and_can_be_asked_again():
    windows = [Prompt(index, np.array([7, index + 10, EOS], dtype=np.int32)) for index in range(12)]
    given_text = PretrainingText(windows, text({"type": "task"}, batch_size=4), seed=3, scorer=None)
    batches = [await given_text.batch(step) for step in (1, 2, 3)]
    assert sorted(np.concatenate([batch.sample_ids for batch in batches]).tolist()) == list(range(12))
    again = await given_text.batch(2)
    assert again.token_ids.tolist() == batches[1].token_ids.tolist()
    assert batches[0].loss_mask.tolist() == [[False, True, True]] * 4
    assert batches[0].num_target_tokens == 8


async def test_a_teacher_scores_the_windows_in_their_order():
    class Backwards:
        """Answers out of order, as replicas do."""

        name = "wise"

        async def score(self, rollouts, top_k=True):
            for one in reversed(rollouts):
                count = len(one.token_ids)
                assert one.prompt_ids.tolist() == [7]
                columns = {
                    "teacher_logprobs": np.full(count, -float(one.prompt_id + 1), dtype=np.float32),
                    "support_ids": np.zeros((count, 1), dtype=np.int32),
                    "support_logprobs": np.full((count, 1), -1.0, dtype=np.float32),
                    "tail_logprobs": np.full(count, -0.5, dtype=np.float32),
                }
                yield [replace(one, teacher="wise", **columns)]

    windows = [Prompt(index, np.array([7, index + 10, EOS], dtype=np.int32)) for index in range(4)]
    batch = await PretrainingText(windows, text({"type": "task"}, batch_size=4), seed=3, scorer=Backwards()).batch(1)
    assert (batch.token_ids[:, 1] - 10 + 1).tolist() == (-batch.columns["teacher_logprobs"][:, 1]).astype(int).tolist()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_loss_is_numpys_and_its_gradient_that_of_finite_differences(share):
    rng = np.random.default_rng(0)
    vocab, rows, width = 7, 2, 5
    mask = np.zeros((rows, width), dtype=bool)
    mask[0, 1:5] = mask[1, 1:3] = True
    ids = rng.integers(0, vocab, (rows, width))
    teacher = rng.normal(size=(rows, width, vocab))
    teacher -= np.log(np.exp(teacher).sum(-1, keepdims=True))
    support = np.argsort(-teacher, -1)[..., :3]
    known = np.take_along_axis(teacher, support, -1)
    tail = np.log(1 - np.exp(known).sum(-1))
    batch = LossBatch(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        vocab,
        support_ids=torch.from_numpy(support),
        support_logprobs=torch.from_numpy(known),
        tail_logprobs=torch.from_numpy(tail),
    )
    logits = torch.tensor(rng.normal(size=(rows, width, vocab)), requires_grad=True)
    wanted = 0.0
    for row, position in zip(*mask.nonzero(), strict=True):
        q = logits.detach().numpy()[row, position]
        q = q - np.log(np.exp(q).sum())
        inside = support[row, position]
        q8 = np.append(q[inside], np.log(1 - np.exp(q[inside]).sum()))
        p8 = np.append(known[row, position], tail[row, position])
        wanted += (1 - share) * -q[ids[row, position]] + share * (np.exp(p8) * (p8 - q8)).sum()
    given_settings = text({"type": "task"}, teacher_share=share)
    output = pretraining(logits, batch, given_settings)
    assert output.total.item() == pytest.approx(wanted, rel=1e-10)
    assert set(output.sums) == {"pretraining_loss"} | ({"pretraining_kl"} if share else set())
    assert torch.autograd.gradcheck(lambda given_logits: pretraining(given_logits, batch, given_settings).total, logits)
