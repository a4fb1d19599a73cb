"""Which responses are trained on: every rule, the order of rules, votes among siblings, the data's answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdray.config import FilterSettings
from kdray.config.graders import ExactGrader, LastNumberGrader
from kdray.data.graders import Exact, Grading, LastNumber
from kdray.errors import ResponseError
from kdray.losses import LossBatch
from kdray.losses.sft import sft
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.filters import Distinct, Filters
from kdray.types import Prompt, Rollout, Writer, written_by

PROMPTS = {number: Prompt(number, np.array([7], np.int32), answer=answer) for number, answer in ((0, "ab"), (1, "cd"))}


def decode(token_ids: np.ndarray) -> str:
    return "".join(chr(token) for token in token_ids)


def rollout(sample_id: int, text: str, prompt_id: int = 0, finish: str = "stop", by: Writer = "teacher") -> Rollout:
    ids = np.array([ord(letter) for letter in text], dtype=np.int32)
    return Rollout(
        sample_id,
        prompt_id,
        np.array([7], np.int32),
        ids,
        None,
        None,
        np.zeros(len(ids), np.int32),
        alpha=1.0 if by == "teacher" else 0.0,
        finish_reason=finish,
        writer=written_by(by, len(ids)),
    )


def dropped(rollouts: list[Rollout], **settings: object) -> dict[int, str]:
    return Filters(FilterSettings(**settings), decode, Grading("exact", Exact(ExactGrader())), PROMPTS)(rollouts)


def test_a_response_that_was_cut_or_could_not_be_parsed_is_left_out():
    batch = [rollout(0, "ab"), rollout(1, "ab", finish="length"), rollout(2, "", finish="unparsable")]
    assert dropped(batch) == {1: "finished", 2: "unparsable"}
    assert dropped(batch, finished=False) == {}


def test_pattern_and_grade():
    batch = [rollout(0, "ab"), rollout(1, "xb"), rollout(2, "cd", prompt_id=1), rollout(3, "ab", prompt_id=1)]
    assert dropped(batch, pattern="^[ac]") == {1: "pattern"}
    assert dropped(batch, correct=True) == {1: "correct", 3: "correct"}
    # The first rule that fails is the one named.
    assert dropped([rollout(0, "xx", finish="length")], pattern="a", correct=True) == {0: "finished"}


@pytest.mark.parametrize(
    ("texts", "agreement", "kept"),
    [
        (["ab", "ab", "xy", "ab"], "majority", {0, 1, 3}),
        (["ab", "ab", "xy", "zz"], "majority", set()),  # half is no majority
        (["ab", "ab", "xy", "zz"], "plurality", {0, 1}),
        (["ab", "ab", "xy", "xy"], "plurality", set()),
        (["ab", "ab", "ab", "xy"], "unanimous", set()),
        (["ab ", " ab", "ab", "ab"], "unanimous", {0, 1, 2, 3}),
    ],
)
def test_siblings_vote(texts: list[str], agreement: str, kept: set[int]):
    out = dropped([rollout(i, text) for i, text in enumerate(texts)], agreement=agreement)
    assert set(range(4)) - set(out) == kept
    assert set(out.values()) <= {"agreement"}


def test_an_answer_that_failed_another_rule_is_a_vote_against():
    batch = [rollout(0, "ab"), rollout(1, "ab"), rollout(2, "ab", finish="length"), rollout(3, "", finish="unparsable")]
    assert dropped(batch, agreement="majority") == {0: "agreement", 1: "agreement", 2: "finished", 3: "unparsable"}


def test_prompts_vote_apart_and_one_of_equal_answers_is_kept():
    batch = [rollout(0, "ab"), rollout(1, "ab"), rollout(2, "xy", 1), rollout(3, "xy", 1), rollout(4, "zz", 1)]
    assert dropped(batch, agreement="majority", distinct=True) == {1: "distinct", 3: "distinct", 4: "agreement"}


def test_the_datas_answers_pass_and_have_no_vote():
    batch = [rollout(0, "ab"), rollout(1, "xy"), rollout(2, "ab", by="data"), rollout(3, "xy", by="data")]
    assert dropped(batch, agreement="majority") == {0: "agreement", 1: "agreement"}


def test_a_left_out_rollout_keeps_its_row_and_has_no_target():
    rollouts = [rollout(0, "abc"), rollout(1, "de"), rollout(2, "f")]
    whole, batch = rollouts_to_batch(rollouts, 1), rollouts_to_batch(rollouts, 1, dropped={1: "pattern"})
    np.testing.assert_array_equal(batch.sample_ids, [0, 1, 2])
    np.testing.assert_array_equal(batch.token_ids, whole.token_ids)
    np.testing.assert_array_equal(batch.loss_mask.sum(1), [3, 0, 1])
    assert (whole.num_target_tokens, batch.num_target_tokens) == (6, 4)


def test_weighted_rows_count_by_their_weight_in_cross_entropy():
    rollouts = [rollout(0, "abc"), rollout(1, "de")]
    batch = LossBatch.from_train_batch(rollouts_to_batch(rollouts, 1, weights={0: 1.0, 1: 0.25}), vocab_size=128)
    logits = torch.randn(2, batch.token_ids.shape[1], 128, generator=torch.Generator().manual_seed(0))
    at = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.token_ids.flatten(), reduction="none").view(2, -1)
    wanted = at[0, 1:4].sum() + 0.25 * at[1, 1:3].sum()
    assert float(sft(logits, batch).total) == pytest.approx(float(wanted))


def test_one_answer_drawn_beside_the_datas_agrees_with_nobody():
    batch = [rollout(0, "xy"), rollout(1, "ab", by="data")]
    for agreement in ("plurality", "majority", "unanimous"):
        assert dropped(batch, agreement=agreement) == {0: "agreement"}


# --------------------------------------------------------------------------------------------- rules of other sorts


def test_further_rules_come_after_the_others_in_their_order(example_plugin):
    batch = [rollout(0, "aaaaa"), rollout(1, "abab"), rollout(2, "zzzzz"), rollout(3, "abab", finish="length")]
    rules = [{"type": "pattern", "pattern": "^a"}, {"type": "repetition", "longest": 4}]
    assert dropped(batch, rules=rules) == {0: "repetition", 2: "pattern", 3: "finished"}
    assert dropped(batch, rules=rules[::-1]) == {0: "repetition", 2: "repetition", 3: "finished"}
    assert dropped(batch, rules=[*rules, "distinct"], finished=False) == {0: "repetition", 2: "pattern", 3: "distinct"}


def test_a_rule_sees_what_is_left_of_a_prompt_and_how_many_were_drawn(monkeypatch):
    seen: list[tuple[list[int], list[str | None], int]] = []

    def failing(self, responses, drawn):
        seen.append(([each.sample_id for each in responses], [each.prompt.answer for each in responses], drawn))
        return {responses[0].sample_id}

    monkeypatch.setattr(Distinct, "failing", failing)
    batch = [rollout(0, "ab"), rollout(1, "xb"), rollout(2, "cd", 1), rollout(3, "ab"), rollout(4, "xb", by="data")]
    assert dropped(batch, pattern="^[ac]", distinct=True) == {0: "distinct", 1: "pattern", 2: "distinct"}
    assert seen == [([0, 3], ["ab", "ab"], 3), ([2], ["cd"], 1)]


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (lambda self, responses, drawn: 1 // 0, "ZeroDivisionError"),
        (lambda self, responses, drawn: None, "TypeError"),
        (lambda self, responses, drawn: ["ab"], r"left out \['ab'\], which are no samples that it was given"),
    ],
)
def test_a_rule_that_fails_ends_the_run_with_its_name(monkeypatch, failing, reason):
    monkeypatch.setattr(Distinct, "failing", failing)
    with pytest.raises(ResponseError, match=rf"rollout.filters: distinct on prompt 0, samples \[0, 1\]: .*{reason}"):
        dropped([rollout(0, "ab"), rollout(1, "xy")], distinct=True)


def test_a_grader_that_fails_is_not_a_wrong_answer():
    no_number = {0: replace(PROMPTS[0], answer="none")}
    filters = Filters(FilterSettings(correct=True), decode, Grading("number", LastNumber(LastNumberGrader())), no_number)
    with pytest.raises(ResponseError, match="number failed on prompt 0"):
        filters([rollout(0, "5")])


def test_siblings_agree_on_the_answer_that_the_grader_finds():
    number = Grading("number", LastNumber(LastNumberGrader()))
    texts = ["2 + 2 = 4", "it is 4.0", "4 of them", "so 5", "no idea"]
    batch = [rollout(sample, text) for sample, text in enumerate(texts)]

    def left_out(grade: Grading | None, agreement: str) -> set[int]:
        return set(Filters(FilterSettings(agreement=agreement), decode, grade, PROMPTS)(batch))

    assert left_out(number, "majority") == {3, 4}
    # A response without an answer is a vote against.
    assert left_out(number, "unanimous") == {0, 1, 2, 3, 4}
    assert left_out(None, "plurality") == {0, 1, 2, 3, 4}
    nothing = [rollout(0, "no"), rollout(1, "idea")]
    assert set(Filters(FilterSettings(agreement="plurality"), decode, number, PROMPTS)(nothing)) == {0, 1}


def test_without_a_reference_no_response_is_correct():
    unanswered = {0: replace(PROMPTS[0], answer=None)}
    grade = Grading("exact", Exact(ExactGrader()))
    assert Filters(FilterSettings(correct=True), decode, grade, unanswered)([rollout(0, "ab")]) == {0: "correct"}
