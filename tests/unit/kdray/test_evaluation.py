"""Held-out measurement: its requests, its means worked by hand, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kdray.config.graders import ExactGrader, LastNumberGrader
from kdray.data.graders import Exact, Grading, LastNumber
from kdray.errors import EngineError, ResponseError
from kdray.evaluation import HeldOut, distinct, ends_in_a_loop
from kdray.rollouts.seeds import sample_seed
from kdray.runs.results.comparison import intervals_of
from kdray.runs.results.draws import ratios, read_draws, write_draws
from kdray.types import Prompt, Rollout, SampleRequest
from tests.support.fakes import BigramWorld, FakeSampler, FakeScorer, History, make_prompts

PROMPTS = [Prompt(prompt_id, np.array([1, 2], np.int32), "", answer) for prompt_id, answer in ((40, "ab"), (7, "b"), (9, "c"))]
GRADE = Grading("exact", Exact(ExactGrader()))
REVERSE = {40: [0.5, 1.0, 1.5], 7: [3.0], 9: []}
FORWARD = {40: [1.0, 1.0, 2.0], 7: [8.0], 9: []}
TOKENS = {40: [0, 1, 9], 7: [2], 9: []}


@dataclass
class ScriptedSampler:
    """Gives the rollouts above, last request first."""

    lacking: str | None = None
    """A column that the rollout of prompt 7 comes without."""
    seen: list[SampleRequest] = field(default_factory=list)

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        self.seen.extend(requests)
        for request in reversed(requests):
            await asyncio.sleep(0)
            yield [self._rollout(request)]

    def _rollout(self, request: SampleRequest) -> Rollout:
        tokens = np.array(TOKENS[request.prompt_id], np.int32)
        made = Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=tokens,
            mixture_logprobs=np.zeros(len(tokens), np.float32),
            student_logprobs=np.zeros(len(tokens), np.float32),
            student_versions=np.full(len(tokens), request.min_version, np.int32),
            alpha=request.alpha,
            finish_reason="length" if request.prompt_id == 40 else "stop",
            reverse_kl=np.array(REVERSE[request.prompt_id], np.float32),
            forward_kl=np.array(FORWARD[request.prompt_id], np.float32),
        )
        return replace(made, **{self.lacking: None}) if self.lacking and request.prompt_id == 7 else made


def decode(token_ids: np.ndarray) -> str:
    return "".join("abc"[token] for token in token_ids if token < 3)


async def test_numbers_against_hand_computation() -> None:
    sampler = ScriptedSampler()
    found = await HeldOut(PROMPTS, sampler, None, decode, GRADE, max_new_tokens=8, seed=5).measure(version=3)
    assert found.numbers == pytest.approx(
        {
            "reverse_kl": (0.5 + 1.0 + 1.5 + 3.0) / 4,  # over tokens: over rollouts it would be 2.0
            "forward_kl": (1.0 + 1.0 + 2.0 + 8.0) / 4,
            "response_tokens": (3 + 1 + 0) / 3,
            "truncated": 1 / 3,
            "repetition": 0.0,
            # Of the first response alone: the second is no more than its end, the third is empty.
            "distinct_1": 1.0,
            "distinct_2": 1.0,
            "distinct_3": 1.0,
            "prompts": 3.0,
            "responses": 3.0,
            "exact_match": 1 / 3,  # "ab" is right; "c" is not "b"; nothing is not "c"
        }
    )
    assert [rollout.prompt_id for rollout in found.rollouts] == [40, 7, 9]


WORDS = {40: "the Cats sat, on a mat", 7: "a dog", 9: "nothing of it"}
REFERENCES = {40: "The cat lay on the mat.", 7: None, 9: "a bird sings"}


async def test_rouge_l_against_hand_computation() -> None:
    """the cat(s) on mat: 4 of 6 words of either; and no word of 3. A prompt without a reference answer does not count."""
    prompts = [replace(prompt, answer=REFERENCES[prompt.prompt_id]) for prompt in PROMPTS]
    by_length = {3: WORDS[40], 1: WORDS[7], 0: WORDS[9]}

    def words(token_ids: np.ndarray) -> str:
        return by_length[len(token_ids)]

    found = await HeldOut(prompts, ScriptedSampler(), None, words, None, max_new_tokens=8, seed=5, rouge_l=True).measure(0)
    assert [draw.rouge_l for draw in found.draws] == [pytest.approx(4 / 6), None, 0.0]
    assert found.numbers["rouge_l"] == pytest.approx(2 / 6)
    assert intervals_of(ratios(found.draws))["rouge_l"] == [0.0, pytest.approx(4 / 6)]
    without = await HeldOut(prompts, ScriptedSampler(), None, words, None, max_new_tokens=8, seed=5).measure(0)
    assert "rouge_l" not in without.numbers


class Stepwise(Exact):
    """Half of the steps are right in a long response, and a prompt with the answer `c` has no steps."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__(ExactGrader())
        self.share = share

    def step_match(self, prompt: Prompt, response: str) -> float | None:
        return None if prompt.answer == "c" else self.share if len(response) > 1 else 0.0


async def test_step_match_is_a_mean_over_prompts_whose_answers_have_steps() -> None:
    grade = Grading("steps", Stepwise())
    found = await HeldOut(PROMPTS, ScriptedSampler(), None, decode, grade, max_new_tokens=8, seed=5).measure(version=0)
    assert [draw.step_match for draw in found.draws] == [0.5, 0.0, None]
    assert found.numbers["step_match"] == 0.25
    assert intervals_of(ratios(found.draws))["step_match"] == [0.0, 0.5]


async def test_a_share_of_steps_outside_0_and_1_ends_the_run() -> None:
    grade = Grading("steps", Stepwise(share=7.0))
    with pytest.raises(ResponseError, match=r"steps failed on prompt 40 .* gave 7.0, not a share from 0 to 1"):
        await HeldOut(PROMPTS, ScriptedSampler(), None, decode, grade, max_new_tokens=8, seed=5).measure(version=0)


async def test_numbers_of_earlier_versions_have_no_rouge_l(tmp_path: Path) -> None:
    found = await HeldOut(PROMPTS, ScriptedSampler(), None, decode, GRADE, max_new_tokens=8, seed=5).measure(0)
    write_draws(tmp_path / "now.parquet", found.draws)
    assert read_draws(tmp_path / "now.parquet") == found.draws
    pq.write_table(pq.read_table(tmp_path / "now.parquet").drop_columns("rouge_l"), tmp_path / "earlier.parquet")
    assert read_draws(tmp_path / "earlier.parquet") == found.draws


async def test_context_of_the_environment_is_not_measured() -> None:
    class WithTurns(ScriptedSampler):
        def _rollout(self, request: SampleRequest) -> Rollout:
            made = super()._rollout(request)
            names = ("token_ids", "mixture_logprobs", "student_logprobs", "student_versions", "reverse_kl", "forward_kl")
            longer = {name: np.append(getattr(made, name), getattr(made, name).dtype.type(99)) for name in names}
            return replace(made, **longer, writer=np.append(made.writer, np.int8(4)))

    found = [
        (await HeldOut(PROMPTS, sampler, None, decode, None, max_new_tokens=5, seed=3).measure(version=2)).numbers
        for sampler in (ScriptedSampler(), WithTurns())
    ]
    assert found[0] == found[1]


async def test_requests_are_fixed_by_seed_and_prompt() -> None:
    sampler = ScriptedSampler()
    await HeldOut(PROMPTS, sampler, None, decode, None, max_new_tokens=8, seed=5).measure(version=3)
    assert [request.seed for request in sampler.seen] == [sample_seed(5, "heldout", prompt_id) for prompt_id in (40, 7, 9)]
    assert {(request.alpha, request.max_new_tokens, request.min_version) for request in sampler.seen} == {(0.0, 8, 3)}
    teacher = ScriptedSampler()
    await HeldOut(PROMPTS, teacher, None, decode, None, max_new_tokens=8, seed=5, alpha=1.0).measure(version=3)
    assert {request.alpha for request in teacher.seen} == {1.0}


async def test_ungraded_and_unanswered_prompts_do_not_count_as_wrong() -> None:
    numbers = (
        await HeldOut(PROMPTS, ScriptedSampler(), None, decode, None, max_new_tokens=8, seed=5).measure(version=0)
    ).numbers
    assert "exact_match" not in numbers
    prompts = [PROMPTS[0], replace(PROMPTS[1], answer=None)]
    numbers = (
        await HeldOut(prompts, ScriptedSampler(), None, decode, GRADE, max_new_tokens=8, seed=5).measure(version=0)
    ).numbers
    assert numbers["exact_match"] == 1.0


@pytest.mark.parametrize("lacking", ["reverse_kl", "forward_kl"])
async def test_missing_kl_is_refused(lacking: str) -> None:
    with pytest.raises(EngineError, match="held-out KL"):
        await HeldOut(PROMPTS, ScriptedSampler(lacking), None, decode, None, max_new_tokens=8, seed=5).measure(version=0)


async def test_a_scorer_that_cannot_give_full_rows_is_refused() -> None:
    world, history = BigramWorld(), History()
    sampler = FakeSampler(world, history, scored=False)
    with pytest.raises(EngineError, match="held-out KL"):
        await HeldOut(make_prompts(), sampler, FakeScorer(world, history), decode, None, 6, seed=5).measure(version=0)


async def test_numbers_of_another_version_are_refused() -> None:
    class Newer(ScriptedSampler):
        def _rollout(self, request: SampleRequest) -> Rollout:
            made = super()._rollout(request)
            made.student_versions[-1:] += request.prompt_id == 7
            return made

    with pytest.raises(EngineError, match="evaluation of student version 3 was answered by version 3, 4"):
        await HeldOut(PROMPTS, Newer(), None, decode, None, max_new_tokens=8, seed=5).measure(version=3)
    # Of the student's versions, a teacher alone has none.
    await HeldOut(PROMPTS, Newer(), None, decode, None, max_new_tokens=8, seed=5, alpha=1.0).measure(version=3)


async def test_the_same_version_gives_the_same_numbers_and_a_later_one_smaller_ones() -> None:
    world = BigramWorld()

    async def measure(version: int, delay: int) -> dict[str, float]:
        sampler = FakeSampler(world, History(published=version), delay=lambda request: request.sample_id * delay % 5)
        return (await HeldOut(make_prompts(40), sampler, None, decode, None, 8, seed=5).measure(version=version)).numbers

    assert await measure(0, delay=1) == await measure(0, delay=3)
    assert (await measure(6, delay=1))["reverse_kl"] < 0.5 * (await measure(0, delay=1))["reverse_kl"]


async def test_what_cannot_be_graded_at_all_has_no_score_and_a_grader_that_fails_is_told() -> None:
    unanswered = [replace(each, answer=None) for each in PROMPTS]
    numbers = (
        await HeldOut(unanswered, ScriptedSampler(), None, decode, GRADE, max_new_tokens=8, seed=5).measure(version=0)
    ).numbers
    assert "exact_match" not in numbers
    number = Grading("data.grader.type=last_number", LastNumber(LastNumberGrader()))
    with pytest.raises(ResponseError, match="data.grader.type=last_number failed on prompt 40"):
        await HeldOut(PROMPTS, ScriptedSampler(), None, decode, number, max_new_tokens=8, seed=5).measure(version=0)


async def test_every_response_to_a_prompt_has_a_seed_of_its_own_and_the_first_has_the_seed_of_an_only_one() -> None:
    sampler = ScriptedSampler()
    held_out = HeldOut(PROMPTS, sampler, None, decode, GRADE, 8, seed=5, samples_per_prompt=4, pass_at=[2, 4], siblings=3)
    found = await held_out.measure(version=3)
    assert [request.sample_id for request in sampler.seen] == [3 * index for index in range(12)]
    assert [request.prompt_id for request in sampler.seen] == [40] * 4 + [7] * 4 + [9] * 4
    seeds = [request.seed for request in sampler.seen]
    assert len(set(seeds)) == 12
    assert seeds[::4] == [sample_seed(5, "heldout", prompt_id) for prompt_id in (40, 7, 9)]
    assert [(draw.prompt_id, draw.draw) for draw in found.draws] == [(p, d) for p in (40, 7, 9) for d in range(4)]
    # The scripted responses of a prompt are all alike: nothing but the number of responses changes.
    assert found.numbers["reverse_kl"] == pytest.approx(1.5)
    assert (found.numbers["prompts"], found.numbers["responses"]) == (3.0, 12.0)
    assert found.numbers["exact_match"] == found.numbers["pass_at_2"] == found.numbers["pass_at_4"] == pytest.approx(1 / 3)
    assert found.numbers["distinct_1"] == pytest.approx(3 / 12)


@pytest.mark.parametrize(
    ("token_ids", "loops"),
    [
        ([], False),
        ([7] * 5, False),  # the digits of 100000 are no loop
        ([7] * 6, True),
        ([1, 2, 3, 7, 7, 7, 7, 7, 7], True),
        ([7, 7, 7, 7, 7, 7, 1], False),  # it got out of the loop
        ([1, 2] * 3, True),
        ([1, 2] * 2 + [1, 3], False),
        ([9, *list(range(64)) * 3], True),
        (list(range(65)) * 3, False),
        ([1, 2, 3] * 2, False),  # twice is no loop yet
    ],
)
def test_loops_at_the_end(token_ids: list[int], loops: bool) -> None:
    assert ends_in_a_loop(np.array(token_ids, np.int32)) is loops


def test_distinct_n_grams_do_not_cross_responses() -> None:
    responses = [np.array(each, np.int32) for each in ([1, 2, 1, 2], [2, 1], [5], [])]
    assert distinct(responses, 1) == pytest.approx(3 / 7)
    assert distinct(responses, 2) == pytest.approx(2 / 4)  # 12, 21, 12 and 21
    assert distinct(responses, 3) == pytest.approx(2 / 2)
    assert distinct(responses, 5) is None


async def test_overlap_of_top_ids_is_the_share_of_the_students_that_are_the_teachers() -> None:
    class WithSupport(ScriptedSampler):
        def _rollout(self, request: SampleRequest) -> Rollout:
            made = super()._rollout(request)
            # Two ids of the teacher; then those of the student's two that are not among them.
            rows = {40: [[1, 2, -1, -1], [1, 2, -1, 3], [1, 2, 3, 4]], 7: [[1, 2, 3, -1]], 9: []}[request.prompt_id]
            return replace(made, support_ids=np.array(rows, np.int32).reshape(-1, 4))

    async def overlap(top_ids: tuple[int, int] | None) -> float | None:
        held_out = HeldOut(PROMPTS, WithSupport(), None, decode, None, 8, seed=5, top_ids=top_ids)
        return (await held_out.measure(version=0)).numbers.get("top_overlap")

    assert await overlap((2, 2)) == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert await overlap((4, 4)) is None, "another support than these numbers say"
    assert await overlap((4, 0)) is None
    assert await overlap(None) is None
