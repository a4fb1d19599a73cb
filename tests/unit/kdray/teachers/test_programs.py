"""Programs over a stub teacher whose response to every text has an exact distribution: what they ask, keep and drop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from kdray.config import load_config
from kdray.config.programs import FINAL_ANSWER, BranchSolveMergeProgram, ProgramSettings
from kdray.data import tasks
from kdray.data.dataset import response_encoder
from kdray.data.tasks import STAGES
from kdray.errors import DataError, EngineError
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.seeds import uniforms
from kdray.teachers.programs import check_prompts, row_kind, row_weights
from kdray.teachers.programs.sampler import ProgramSampler, Rows, TextCodec
from kdray.types import Prompt, Rollout, SampleRequest

TOKENIZER = task_tokenizer()
Distribution = Mapping[str, Mapping[str, float]]


def ids(text: str) -> np.ndarray:
    return np.array(TOKENIZER(text)["input_ids"], dtype=np.int32)


def text(token_ids: np.ndarray) -> str:
    return str(TOKENIZER.decode(token_ids.tolist(), skip_special_tokens=True))


class StubTeacher:
    """Answers each text by its distribution, drawn with the request's seed; refuses texts that it was not taught."""

    name = "stub"

    def __init__(self, distribution: Distribution, slow: frozenset[str] = frozenset(), loses: int = 0) -> None:
        """Args: slow: texts that are answered only after everything else that waits; loses: answers that never come."""
        self.distribution = distribution
        self.slow = slow
        self.loses = loses
        self.batches: list[list[SampleRequest]] = []
        self.in_flight: set[int] = set()

    @property
    def asked(self) -> list[str]:
        return [text(request.prompt_ids) for batch in self.batches for request in batch]

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        self.batches.append(list(requests))
        for request in requests:
            assert request.alpha == 1.0
            assert request.sample_id not in self.in_flight, "two calls in flight share a sample id"
            assert request.sample_id < 2**63
            self.in_flight.add(request.sample_id)
        for request in sorted(requests, key=lambda request: text(request.prompt_ids) in self.slow):
            for _ in range(20 if text(request.prompt_ids) in self.slow else 1):
                await asyncio.sleep(0)
            if self.loses:
                self.loses -= 1
                continue
            self.in_flight.remove(request.sample_id)
            yield [self._answer(request)]

    def _answer(self, request: SampleRequest) -> Rollout:
        distribution = self.distribution[text(request.prompt_ids)]
        u = uniforms(np.array([request.seed], dtype=np.uint64), np.array([0]))[0]
        index = int(np.searchsorted(np.cumsum(list(distribution.values())), u, side="right"))
        response = list(distribution)[min(index, len(distribution) - 1)]
        token_ids = np.append(ids(response), TOKENIZER.eos_token_id)[: request.max_new_tokens].astype(np.int32)
        cut = len(token_ids) <= len(response)
        zeros = np.zeros(len(token_ids), dtype=np.float32)
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=token_ids,
            mixture_logprobs=zeros,
            student_logprobs=zeros,
            student_versions=np.zeros(len(token_ids), dtype=np.int32),
            alpha=1.0,
            finish_reason="length" if cut else "stop",
            teacher=self.name,
        )


def settings(**keys: Any) -> Any:
    return TypeAdapter(ProgramSettings).validate_python({"max_stage_tokens": 200, "max_new_tokens": 64} | keys)


def always(**responses: str) -> Distribution:
    return {asked: {response: 1.0} for asked, response in responses.items()}


def sampler(
    program: Any, teacher: Any, questions: Sequence[str] = ("q",), samples_per_prompt: int = 1, prefix: str = "", seed: int = 0
) -> ProgramSampler:
    prompts = [Prompt(index, ids(prefix + question), question=prefix + question) for index, question in enumerate(questions)]

    def encode(question: str) -> Prompt:
        return Prompt(0, ids(question), question, question=question)

    codec = TextCodec(encode, response_encoder(TOKENIZER), text)
    return ProgramSampler(program, teacher, "stub", prompts, codec, Rows(samples_per_prompt, prefix, 60, seed))


def request(sample_id: int, prompt_id: int = 0, seed: int = 7, prompt: str = "q", **changes: Any) -> SampleRequest:
    values = {"alpha": 1.0, "seed": seed, "max_new_tokens": 16, "min_version": 3} | changes
    return SampleRequest(sample_id, prompt_id, ids(prompt), **values)


def draw(source: ProgramSampler, requests: Sequence[SampleRequest]) -> list[Rollout]:
    async def read() -> list[Rollout]:
        before = asyncio.all_tasks()
        rollouts = [rollout async for part in source.sample(requests) for rollout in part]
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before, "tasks left behind"
        return rollouts

    return sorted(asyncio.run(read()), key=lambda rollout: rollout.sample_id)


def answers(source: ProgramSampler, requests: Sequence[SampleRequest]) -> list[str]:
    return [text(rollout.token_ids) for rollout in draw(source, requests)]


# ------------------------------------------------------------------------------------------------------ the chains


TWO_STEPS = {"type": "rephrase_respond", "rephrase": "re {question}", "respond": "{question}|{rephrased}?"}


def test_two_steps_rephrase_and_keep_the_answer_alone():
    teacher = StubTeacher({"re q": {" better q ": 1.0}, "q|better q?": {" yes\n": 1.0}})
    (rollout,) = draw(source := sampler(settings(**TWO_STEPS), teacher), [request(5)])
    assert teacher.asked == ["re q", "q|better q?"]
    assert rollout.token_ids.tolist() == [*ids("yes"), TOKENIZER.eos_token_id]
    assert rollout.prompt_ids.tolist() == ids("q").tolist()
    assert (rollout.sample_id, rollout.prompt_id, rollout.alpha, rollout.finish_reason) == (5, 0, 1.0, "stop")
    assert (rollout.mixture_logprobs, rollout.student_logprobs, rollout.support_ids) == (None, None, None)
    assert rollout.student_versions.tolist() == [3, 3, 3, 3]
    # " better q " and " yes\n", each with its end; the answer "yes" with its end.
    expected = {"teacher_calls": 2, "teacher_tokens": 11 + 6, "unparsable": 0, "unparsable_cut": 0, "answer_tokens": 4}
    assert source.metrics() == expected
    assert source.metrics() == {}, "counted since the last report"


def test_one_step_takes_what_follows_final_answer():
    program = settings(type="rephrase_respond", steps=1, at_once="all {question}")
    assert program.answer == FINAL_ANSWER
    teacher = StubTeacher({"all q": {"a better q. Final Answer : 42 ": 1.0}})
    assert answers(sampler(program, teacher), [request(0)]) == ["42"]


def test_attention_answers_what_is_left_of_the_question():
    program = settings(type="system2_attention", rewrite="w {question}", respond="{rewritten}!")
    teacher = StubTeacher({"w q i say 3": {"q": 1.0}, "q!": {"4": 1.0}})
    assert answers(sampler(program, teacher, ["q i say 3"]), [request(0)]) == ["4"]
    assert teacher.asked == ["w q i say 3", "q!"]


def test_direct_asks_the_question_and_thoughts_are_dropped():
    assert answers(sampler(settings(type="direct"), StubTeacher({"q": {"no": 1.0}})), [request(0)]) == ["no"]
    program = settings(type="chain_of_thought", think="t {question}")
    teacher = StubTeacher({"t q": {"7+8=15.\nfinal answer: 95": 1.0}})
    assert answers(sampler(program, teacher), [request(0)]) == ["95"]


JUDGE = {
    "type": "branch_solve_merge",
    "pair": r"A:(?P<a>\w+) B:(?P<b>\w+)",
    "branch": "b {question}",
    "solve": "s {criterion} {question}",
    "line": "{number}.{criterion}={scores};",
    "merge": "m {evaluations}",
    "answer": "^([AB])$",
    "swapped": {"A": "B", "B": "A"},
    "reply": "<{verdict}>",
    "max_criteria": 2,
}
JUDGED = always(
    **{
        "b A:one B:two": "- x\n- y\n- z",
        "s x A:one B:two": "1",
        "s y A:one B:two": "2",
        "m 1.x=1;2.y=2;": "A",
        "b A:two B:one": "1. x",
        "s x A:two B:one": "3",
        "m 1.x=3;": "B",
    }
)


def test_a_judge_branches_solves_and_merges_in_both_orders():
    teacher = StubTeacher(JUDGED)
    judge = sampler(settings(**JUDGE), teacher, ["A:one B:two"], samples_per_prompt=2)
    # The odd sibling sees the answers swapped; its verdict B means what A means to the even one.
    assert answers(judge, [request(4), request(5)]) == ["<A>", "<A>"]
    assert [len(batch) for batch in teacher.batches[:2]] == [2, 2], "both branches together; the criteria of one side by side"


def test_a_verdict_that_depends_on_the_order_differs_between_siblings():
    teacher = StubTeacher({**JUDGED, "m 1.x=3;": {"A": 1.0}})
    judge = sampler(settings(**JUDGE), teacher, ["A:one B:two"], samples_per_prompt=2)
    assert answers(judge, [request(4), request(5)]) == ["<A>", "<B>"]


@pytest.mark.parametrize(
    "changed", [{"b A:one B:two": {"nothing listed": 1.0}}, {"m 1.x=1;2.y=2;": {"C": 1.0}}, {"s y A:one B:two": {"": 1.0}}]
)
def test_a_judge_without_criteria_scores_or_verdict_is_unparsable(changed):
    teacher = StubTeacher({**JUDGED, **changed})
    (rollout,) = draw(sampler(settings(**JUDGE), teacher, ["A:one B:two"]), [request(0)])
    assert (rollout.finish_reason, len(rollout.token_ids)) == ("unparsable", 0)


@pytest.mark.parametrize(
    ("pair", "question", "expected"),
    [
        (r"A:(?P<a>\w+) B:(?P<b>\w+)", "is A:x B:yy ok", "is A:yy B:x ok"),
        (r"B:(?P<b>\w+) A:(?P<a>\w+)", "B:1 A:22 ", "B:22 A:1 "),
    ],
)
def test_only_the_answers_are_swapped(pair, question, expected):
    judge = BranchSolveMergeProgram(type="branch_solve_merge", pair=pair)
    assert judge.swap(question) == expected
    assert judge.swap(expected) == question


# ------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("response", "keys", "cut"),
    [
        ("i do not know", {"answer": FINAL_ANSWER}, False),
        ("final answer:  ", {"answer": FINAL_ANSWER}, False),
        ("", {}, False),
        ("x" * 20, {"max_new_tokens": 10}, True),  # the call is cut
        ("x" * 16, {}, True),  # the answer and its end are longer than rollout.max_new_tokens
    ],
)
def test_what_cannot_be_read_is_empty_and_counted(response, keys, cut):
    source = sampler(settings(type="direct", **keys), StubTeacher({"q": {response: 1.0}}))
    (rollout,) = draw(source, [request(0)])
    assert (rollout.finish_reason, rollout.token_ids.tolist(), rollout.student_versions.tolist()) == ("unparsable", [], [])
    metrics = source.metrics()
    assert (metrics["unparsable"], metrics["unparsable_cut"]) == (1.0, float(cut))
    assert "answer_tokens" not in metrics


def test_a_call_that_leaves_no_room_is_not_asked():
    teacher = StubTeacher({})
    source = sampler(settings(type="direct", max_stage_tokens=70, ask="{question} and more"), teacher)
    (rollout,) = draw(source, [request(0)])
    assert (rollout.finish_reason, teacher.batches) == ("unparsable", [])


# ------------------------------------------------------------------------------ perturbation, universal consistency


def test_siblings_take_the_perturbing_templates_in_turn():
    program = settings(type="direct", perturb=["{question}", "please: {question}"])
    teacher = StubTeacher(always(**{"q": "plain", "please: q": "polite"}))
    source = sampler(program, teacher, samples_per_prompt=3)
    assert answers(source, [request(number) for number in range(3, 9)]) == ["plain", "polite", "plain"] * 2


UNIVERSAL = {"answers": 5, "line": "{number}{answer} ", "choose": "of {answers}", "choice": r"(\d)"}


def test_the_teacher_chooses_among_several_answers():
    distribution = {"q": {"a": 0.5, "b": 0.5}}
    chosen = StubTeacher(distribution)
    program = settings(type="direct", universal=UNIVERSAL)
    # Which answers the five calls get follows from their seeds; a call that chooses the first must give the first of them.
    with pytest.raises(KeyError) as unknown:
        draw(sampler(program, chosen), [request(0)])
    asked = str(unknown.value.args[0])
    listed = dict(zip((part[0] for part in asked[3:].split()), (part[1] for part in asked[3:].split()), strict=True))
    assert list(listed) == ["1", "2", "3", "4", "5"]
    assert set(listed.values()) == {"a", "b"}, "the five calls share their seeds"
    for number, answer in listed.items():
        teacher = StubTeacher({**distribution, asked: {f"number {number}": 1.0}})
        source = sampler(program, teacher)
        assert answers(source, [request(0)]) == [answer]
        assert [len(batch) for batch in teacher.batches] == [5, 1]
        assert source.metrics()["teacher_calls"] == 6
    for reply in ("none", "9", "0"):
        (rollout,) = draw(sampler(program, StubTeacher({**distribution, asked: {reply: 1.0}})), [request(0)])
        assert rollout.finish_reason == "unparsable"


def test_answers_that_agree_need_no_choice_and_unparsable_ones_do_not_count():
    program = settings(type="direct", answer="(a)", universal=UNIVERSAL)
    teacher = StubTeacher({"q": {"a": 0.5, "b": 0.5}})
    assert answers(sampler(program, teacher), [request(0)]) == ["a"]
    assert len(teacher.asked) == 5
    (rollout,) = draw(sampler(program, StubTeacher({"q": {"b": 1.0}})), [request(0)])
    assert rollout.finish_reason == "unparsable"


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("recipe", "task"),
    [
        ("letters", "last_letters"),
        ("coins", "coin_flip"),
        ("attention", "misled_letters"),
        ("attention", "backed_letters"),
        ("judge", "judged_letters"),
        ("thoughts", "arithmetic"),
        ("step_by_step", "arithmetic"),
        ("step_by_step", "last_letters"),
    ],
)
def test_a_recipe_is_right_where_every_stage_is(recipe, task):
    """Its templates ask what its stages were taught, word for word: the stub knows nothing else."""
    config = load_config(f"configs/system2_{recipe}.yaml")
    example = tasks.task(task).generate(np.random.default_rng(4), 3)
    distribution: dict[str, dict[str, float]] = {}
    for stage in STAGES.values():
        # Some stages draw what they ask about, such as one word of three.
        for seed in range(20 if isinstance(stage.of, type(tasks.task(task))) else 0):
            taught = stage.make(example, np.random.default_rng(seed))
            distribution[taught.prompt] = {taught.answer: 1.0}
    if recipe == "attention":
        question = example.prompt.split("i think ")[0]
        distribution[question] = {example.answer: 1.0}
    teacher = StubTeacher(distribution)
    program, prefix = config.rollout.program, config.data.prefix
    assert program is not None
    first, second = draw(
        sampler(program, teacher, [example.prompt], 2 if recipe == "step_by_step" else 1, prefix),
        [request(number, prompt=prefix + example.prompt, max_new_tokens=config.rollout.max_new_tokens) for number in range(2)],
    )
    assert text(first.token_ids) == example.answer
    if recipe == "step_by_step":
        assert text(second.prompt_ids) == program.rationale_prefix + example.prompt
        assert text(second.token_ids) in next(iter(distribution[f"explain: {example.prompt}"]))


# --------------------------------------------------------------------------------------------- many at once


def test_first_stages_travel_together_and_a_slow_one_holds_nobody_up():
    questions = ["a", "b", "c"]
    distribution = always(**{f"re {q}": f"{q}{q}" for q in questions}, **{f"{q}|{q}{q}?": q.upper() for q in questions})
    teacher = StubTeacher(distribution, slow=frozenset({"re a"}))
    order = []

    async def read() -> None:
        source = sampler(settings(**TWO_STEPS), teacher, questions)
        async for rollouts in source.sample([request(n, n, prompt=questions[n]) for n in range(3)]):
            order.extend(text(rollout.token_ids) for rollout in rollouts)

    asyncio.run(read())
    assert len(teacher.batches[0]) == 3
    assert order[-1] == "A"
    assert sorted(order) == ["A", "B", "C"]


def test_a_repeated_request_draws_the_same_and_other_samples_differ():
    distribution = {"re q": {"x": 0.5, "y": 0.5}, "q|x?": {"1": 0.5, "2": 0.5}, "q|y?": {"3": 0.5, "4": 0.5}}
    requests = [request(number, seed=1000 + number) for number in range(64)]
    together = answers(sampler(settings(**TWO_STEPS), StubTeacher(distribution)), requests)
    alone = [answers(sampler(settings(**TWO_STEPS), StubTeacher(distribution)), [one])[0] for one in requests]
    assert together == alone
    # All four chains, each of probability 1/4: the two stages draw independently (99.99% bounds of a binomial).
    assert all(5 <= together.count(answer) <= 30 for answer in "1234")


def test_a_lost_call_and_a_failing_teacher_end_the_stream():
    with pytest.raises(EngineError, match="1 calls missing"):
        draw(sampler(settings(type="direct"), StubTeacher(always(q="a"), loses=1)), [request(0), request(1)])
    with pytest.raises(KeyError):
        draw(sampler(settings(type="direct"), StubTeacher({})), [request(0)])


def test_the_trainer_waits_for_the_calls_of_what_it_waits_for():
    waited: list[list[int]] = []
    teacher = StubTeacher(always(**{"re q": "x", "q|x?": "y"}))
    source = sampler(settings(**TWO_STEPS), teacher)
    source._on_awaited = lambda calls: waited.append(list(calls))

    async def read() -> None:
        source.awaited([1])
        async for _ in source.sample([request(0, seed=1), request(1, seed=2)]):
            pass

    asyncio.run(read())
    calls = [call for batch in teacher.batches for call in batch]
    of_second = {call.sample_id for call in calls if call.sample_id >= max(call.sample_id for call in teacher.batches[0])}
    assert len(calls) == 4
    assert {call for group in waited for call in group} == of_second
    assert len(of_second) == 2


# -------------------------------------------------------------------------------------------- step by step


STEPS = {"type": "rationale", "explain": "why {question}", "rationale_prefix": "[r] "}


def test_a_pair_of_rows_comes_from_one_response():
    responses = {f"because {letter}. final answer: {letter}": 1 / 8 for letter in "abcdefgh"}
    teacher = StubTeacher({"why q": responses})
    source = sampler(settings(**STEPS), teacher, samples_per_prompt=2, prefix="[l] ")
    requests = [request(number, seed=number, prompt="[l] q") for number in range(20)]
    rollouts = draw(source, requests)
    assert len(teacher.asked) == 10, "asked once a pair"
    for label, rationale in zip(rollouts[::2], rollouts[1::2], strict=True):
        assert text(label.prompt_ids) == "[l] q"
        assert text(rationale.prompt_ids) == "[r] q"
        assert text(rationale.token_ids) == f"because {text(label.token_ids)}."
        assert rationale.token_ids[-1] == TOKENIZER.eos_token_id
    assert len({text(rollout.token_ids) for rollout in rollouts[::2]}) > 1, "pairs draw apart"
    # Split over two calls, a pair still shares its text.
    again = [*draw(source, requests[:3]), *draw(source, requests[3:])]
    assert [rollout.token_ids.tolist() for rollout in again] == [rollout.token_ids.tolist() for rollout in rollouts]


def test_a_response_without_a_rationale_gives_no_row_of_either_kind():
    source = sampler(settings(**STEPS), StubTeacher({"why q": {"final answer: b": 1.0}}), samples_per_prompt=2, prefix="[l] ")
    assert [rollout.finish_reason for rollout in draw(source, [request(0), request(1)])] == ["unparsable"] * 2


def test_samples_of_a_prompt_alternate_between_label_and_rationale():
    assert [row_kind(sample_id, 2) for sample_id in range(4)] == ["label", "rationale"] * 2
    assert [row_kind(sample_id, 4) for sample_id in range(4, 8)] == ["label", "rationale"] * 2


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "direct", "ask": "tell"}, r"ask='tell': lacks \{question\}"),
        ({"type": "direct", "ask": "{question} {more}"}, r"nothing is known as \{more\}; use \{question\}"),
        ({"type": "direct", "ask": "{question} {"}, "write a literal brace twice"),
        ({"type": "direct", "answer": "(x"}, "answer='\\(x': not a regular expression"),
        ({"type": "direct", "perturb": ["{q}"]}, r"perturb.0='\{q\}'"),
        ({"type": "direct", "max_new_tokens_of": {"think": 5}}, "names think, but the stages are answer"),
        ({"type": "direct", "max_stage_tokens": 64}, "max_stage_tokens=64 leaves no room .* stage answer"),
        ({"type": "direct", "universal": UNIVERSAL | {"choice": "x"}}, "choice='x': needs a group"),
        (JUDGE | {"pair": r"(?P<a>x)"}, "needs the groups"),
        (JUDGE | {"swapped": {"A": "B", "B": "B"}}, "swapping twice must give every verdict back"),
        (STEPS | {"answer": "(.*)"}, "needs the groups"),
        (STEPS | {"perturb": ["{question}"]}, "come from one response"),
    ],
)
def test_what_a_program_cannot_use_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        settings(**keys)


def test_prompts_that_do_not_fit_a_program_are_refused():
    chat = Prompt(3, ids("q"), question=[{"role": "user", "content": "q"}])
    with pytest.raises(DataError, match="prompt 3: .* chat messages"):
        check_prompts(settings(type="direct"), [chat])
    with pytest.raises(DataError, match="prompt 0: .*no two answers in 'q'"):
        check_prompts(settings(**JUDGE), [Prompt(0, ids("q"), question="q")])
    check_prompts(settings(**JUDGE), [Prompt(0, ids("q"), question="A:x B:y")])


def test_a_stream_that_is_closed_early_asks_nothing_more_and_leaves_nothing():
    questions = ["a", "b"]
    distribution = always(**{f"re {q}": f"{q}{q}" for q in questions}, **{f"{q}|{q}{q}?": q.upper() for q in questions})
    teacher = StubTeacher(distribution, slow=frozenset({"re b"}))
    source = sampler(settings(**TWO_STEPS), teacher, questions)

    async def read() -> None:
        before = asyncio.all_tasks()
        stream = source.sample([request(n, n, prompt=questions[n]) for n in range(2)])
        (rollout,) = await anext(stream)
        assert text(rollout.token_ids) == "A"
        await stream.aclose()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
        assert not source._in_flight

    asyncio.run(read())
    assert "b|bb?" not in teacher.asked


def test_label_and_rationale_rows_count_by_their_own_means():
    """The weighted sum over all tokens, divided by all tokens, is mean(label) + 0.5 mean(rationale), whatever their lengths."""
    lengths = [2, 9, 3, 30, 4]
    alphas = [1.0, 1.0, 1.0, 1.0, float("nan")]
    rollouts = [
        Rollout(i, i // 2, np.array([1]), np.zeros(n, np.int32), None, None, np.zeros(n, np.int32), alpha, "stop")
        for i, (n, alpha) in enumerate(zip(lengths, alphas, strict=True))
    ]
    weights = row_weights(rollouts, samples_per_prompt=2, rationale_weight=0.5)
    losses = [np.linspace(0.1, 1.0, n) * (1 + i) for i, n in enumerate(lengths)]
    got = sum(weights[i] * values.sum() for i, values in enumerate(losses)) / sum(lengths)
    label = np.concatenate([losses[0], losses[2], losses[4]])
    rationale = np.concatenate([losses[1], losses[3]])
    assert got == pytest.approx(label.mean() + 0.5 * rationale.mean())
    assert row_weights(rollouts[:1], 2, 0.5) == {0: 1.0}
