"""Several teachers as one, in a world of 6 ids: who is asked what, the target against whole rows, teachers that go away."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kdray.config import Config, ReverseKLLoss, parse_config
from kdray.errors import ConfigError, EngineError
from kdray.interfaces import Availability
from kdray.rollouts.batching import rollouts_to_batch
from kdray.teachers.team import TeacherTeam
from kdray.types import Prompt, Rollout, SampleRequest
from tests.support.fakes import turns
from tests.support.toy_world import ToyWorld

VOCAB, TOP_K, TOKENS = 6, 2, 3
COLUMNS = ("teacher_logprobs", "support_ids", "support_logprobs", "tail_logprobs", "reverse_kl", "forward_kl")
TINY = {"type": "tiny", "train": {"steps": 1}}


class ToyTeacher:
    """log p depends on the last token alone. It samples greedily along its own distribution, from token 0 on."""

    def __init__(self, name: str, seed: int, pause: int = 1) -> None:
        self.name = name
        self.availability = Availability()
        self.rows = np.random.default_rng(seed).dirichlet(np.full(VOCAB, 0.6), size=VOCAB)
        self.pause = pause
        self.drawn: list[int] = []
        self.questions: list[tuple[int, int, bool]] = []
        """(sample id, ids asked for, top_k) of every scored rollout."""
        self.stuck = False
        """Whether it answers nothing any more."""

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        for request in requests:
            await self._turn()
            self.drawn.append(request.sample_id)
            tokens = np.array([(request.sample_id + step) % VOCAB for step in range(TOKENS)], np.int32)
            blank = np.zeros(TOKENS, np.float32)
            versions = np.full(TOKENS, request.min_version, np.int32)
            rollout = Rollout(
                request.sample_id, request.prompt_id, request.prompt_ids, tokens, blank, blank, versions, request.alpha, "stop"
            )
            yield [self.answer(rollout, top_k=True)]

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        for rollout in rollouts:
            assert rollout.support_logprobs is None
            assert rollout.teacher_logprobs is None
            asked = 0 if rollout.support_ids is None else rollout.support_ids.shape[1]
            self.questions.append((rollout.sample_id, asked, top_k))
            await self._turn()
            yield [self.answer(rollout, top_k)]

    async def _turn(self) -> None:
        await turns(self.pause)
        if self.stuck:
            await asyncio.Event().wait()

    def distributions(self, rollout: Rollout) -> np.ndarray:
        """Whole rows [T, VOCAB]."""
        return self.rows[[int(rollout.prompt_ids[-1]), *rollout.token_ids[:-1]]]

    def answer(self, rollout: Rollout, top_k: bool) -> Rollout:
        rows = self.distributions(rollout)
        asked = np.empty((TOKENS, 0), np.int32) if rollout.support_ids is None else rollout.support_ids
        ids = np.full((TOKENS, asked.shape[1] + (TOP_K if top_k else 0)), -1, np.int32)
        ids[:, : asked.shape[1]] = asked
        if top_k:
            for row, best in enumerate(np.argsort(-rows, axis=1)[:, :TOP_K]):
                ids[row, asked.shape[1] :] = [-1 if token in asked[row] else token for token in best]
        logprobs = np.where(ids >= 0, np.log(np.take_along_axis(rows, ids.clip(min=0), axis=1)), -np.inf)
        outside = np.ones_like(rows)
        for row, named in enumerate(ids):
            outside[row, named[named >= 0]] = 0.0
        with np.errstate(divide="ignore"):
            tail = np.log((rows * outside).sum(1))
        uniform = np.log(rows * VOCAB)
        return replace(
            rollout,
            teacher=self.name,
            teacher_logprobs=np.log(rows[np.arange(TOKENS), rollout.token_ids]).astype(np.float32),
            support_ids=ids,
            support_logprobs=logprobs.astype(np.float32),
            tail_logprobs=tail.astype(np.float32),
            reverse_kl=(-uniform.mean(1)).astype(np.float32),
            forward_kl=(rows * uniform).sum(1).astype(np.float32),
        )


class StudentOnly:
    """A sampler whose rollouts no teacher has seen."""

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        async for rollouts in ToyTeacher("none", 99).sample(requests):
            empty = dict.fromkeys(COLUMNS)

            yield [replace(rollout, teacher="", **empty) for rollout in rollouts]


def config(loss: str = "forward_kl", pool: str = "mixture", **teachers: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "toy"},
            "student": {"model": {"type": "tiny"}},
            "teachers": {name: {"model": TINY} for name in ("a", "b", "c")},
            "rollout": {"teachers": teachers, "sampler": pool},
            "loss": {"type": loss},
        }
    )


PROMPTS = [Prompt(index, np.array([index % VOCAB], np.int32), f"text {index}", domain="xyz"[index % 3]) for index in range(12)]


def requests(count: int = 12) -> list[SampleRequest]:
    return [SampleRequest(index, index, PROMPTS[index].token_ids, 0.2, index, TOKENS) for index in range(count)]


def toys() -> list[ToyTeacher]:
    return [ToyTeacher("a", 1), ToyTeacher("b", 2, pause=3), ToyTeacher("c", 3)]


def team(settings: Config, teachers: list[ToyTeacher]) -> TeacherTeam:
    return TeacherTeam(settings, teachers, PROMPTS, VOCAB)


async def read(stream: AsyncGenerator[list[Rollout]]) -> list[Rollout]:
    return sorted([rollout async for part in stream for rollout in part], key=lambda rollout: rollout.sample_id)


async def both(one: TeacherTeam, sampler: Any = None) -> list[Rollout]:
    return await read(one.score(await read((sampler or one).sample(requests()))))


def mean_of(rows: list[np.ndarray], weights: Sequence[float], kind: str) -> np.ndarray:
    """The ensemble's distribution over all ids, [T, VOCAB]."""
    if kind == "arithmetic":
        return sum(w * row for w, row in zip(weights, rows, strict=True))  # type: ignore[return-value]
    product = np.prod([row**w for w, row in zip(weights, rows, strict=True)], axis=0)
    return product / product.sum(1, keepdims=True)


def check_target(rollout: Rollout, rows: list[np.ndarray], weights: Sequence[float], kind: str) -> None:
    """The recorded target against whole rows: bucket by bucket."""
    assert rollout.support_ids is not None
    assert rollout.support_logprobs is not None
    for step in range(TOKENS):
        ids = rollout.support_ids[step][rollout.support_ids[step] >= 0]
        outside = np.setdiff1d(np.arange(VOCAB), ids)
        buckets = [np.append(row[step][ids], row[step][outside].sum()) for row in rows]
        distribution = mean_of([bucket[None] for bucket in buckets], weights, kind)[0]
        got = np.append(rollout.support_logprobs[step][: len(ids)], rollout.tail_logprobs[step])  # type: ignore[index]
        np.testing.assert_allclose(np.exp(got), distribution, atol=1e-6)
        at_token = distribution[list(ids).index(rollout.token_ids[step])]
        assert rollout.teacher_logprobs is not None
        assert rollout.teacher_logprobs[step] == pytest.approx(np.log(at_token), abs=1e-5)


async def test_routing_sends_every_prompt_to_its_teacher_alone() -> None:
    teachers = toys()
    one = team(config(type="route", map={"x": "a", "y": "b", "z": "a"}), teachers)
    assert not one.scores
    rollouts = await read(one.sample(requests()))
    assert [rollout.sample_id for rollout in rollouts] == list(range(12))
    assert [rollout.teacher for rollout in rollouts] == ["a", "b", "a"] * 4
    assert teachers[2].drawn == []
    assert all(not teacher.questions for teacher in teachers)


async def test_routed_scoring_of_students_samples_asks_the_one_teacher_once() -> None:
    teachers = toys()
    one = team(config(type="route", pool="student", map={"x": "a", "y": "b", "z": "c"}), teachers)
    rollouts = await both(one, StudentOnly())
    for rollout in rollouts:
        teacher = teachers["xyz".index(PROMPTS[rollout.prompt_id].domain or "")]
        assert rollout.teacher == teacher.name
        np.testing.assert_array_equal(rollout.teacher_logprobs, teacher.answer(rollout, True).teacher_logprobs)
    assert [len(teacher.questions) for teacher in teachers] == [4, 4, 4]


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("forward_kl", "arithmetic"),
        ("skew_reverse_kl", "arithmetic"),
        ("reverse_kl", "geometric"),
        ("mse_logit", "geometric"),
        ("minillm", "geometric"),
        ("lmops", "geometric"),
        ("per_decision", "geometric"),
    ],
)
async def test_an_ensembles_target_is_the_mean_that_the_loss_asks_for(loss: str, kind: str) -> None:
    teachers = toys()
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    rollouts = await both(team(config(loss, type="ensemble", weights=weights), teachers))
    assert [rollout.teacher for rollout in rollouts] == ["a", "b", "c"] * 4
    shares = [0.25, 0.5, 0.25]
    for rollout in rollouts:
        check_target(rollout, [teacher.distributions(rollout) for teacher in teachers], shares, kind)
        for name in ("reverse_kl", "forward_kl"):
            each = [getattr(teacher.answer(rollout, False), name) for teacher in teachers]
            np.testing.assert_allclose(getattr(rollout, name), np.average(each, axis=0, weights=shares), rtol=1e-5)
    # One prefill where it did not sample, and one more for the union.
    for teacher in teachers:
        counts = Counter(sample_id for sample_id, _, _ in teacher.questions)
        assert all(count == (1 if sample_id in teacher.drawn else 2) for sample_id, count in counts.items())
        assert all(top_k == (asked == 0) for _, asked, top_k in teacher.questions)


async def test_an_ensemble_on_the_samplers_support_takes_one_prefill_at_the_others() -> None:
    teachers = toys()
    rollouts = await both(team(config(type="ensemble", support="sampler", sampler="first"), teachers))
    assert teachers[0].questions == []
    for teacher in teachers[1:]:
        assert sorted(teacher.questions) == [(index, TOP_K, False) for index in range(12)]
    for rollout in rollouts:
        sampled = teachers[0].answer(replace(rollout, support_ids=None), True)
        np.testing.assert_array_equal(rollout.support_ids, sampled.support_ids)
        expected = mean_of([teacher.distributions(rollout) for teacher in teachers], [1 / 3] * 3, "arithmetic")
        at = np.take_along_axis(expected, rollout.support_ids, axis=1)  # type: ignore[arg-type]
        np.testing.assert_allclose(np.exp(rollout.support_logprobs), at, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.05, 0.3])
async def test_confident_teachers_weigh_more_whatever_token_was_sampled(temperature: float) -> None:
    """By the entropies over all top ids, with the tail spread over the others: as one id, a flat teacher would look sure."""
    teachers = toys()
    settings = config(type="ensemble", pool="student", confidence_temperature=temperature, teachers=["c", "a"])
    rows_with_a_token_of_its_own = 0
    for rollout in await both(team(settings, teachers), StudentOnly()):
        assert rollout.teacher in ("a", "c")
        assert rollout.support_ids is not None
        assert rollout.support_logprobs is not None
        distributions = [teacher.distributions(rollout) for teacher in (teachers[0], teachers[2])]
        for step, token in enumerate(rollout.token_ids):
            ids = rollout.support_ids[step][rollout.support_ids[step] >= 0]
            top = sorted({*np.concatenate([np.argsort(-each[step])[:TOP_K] for each in distributions]).tolist()})
            assert set(ids) == {*top, token}
            outside = VOCAB - len(top)
            tails = [1.0 - each[step][top].sum() for each in distributions]
            entropies = [
                -(each[step][top] * np.log(each[step][top])).sum() - (tail * np.log(tail / outside) if outside else 0.0)
                for each, tail in zip(distributions, tails, strict=True)
            ]
            shares = np.exp(-np.array(entropies) / temperature)
            shares /= shares.sum()
            expected = sum(share * each[step][ids] for share, each in zip(shares, distributions, strict=True))
            np.testing.assert_allclose(np.exp(rollout.support_logprobs[step][: len(ids)]), expected, atol=1e-5)
            rows_with_a_token_of_its_own += token not in top
    assert teachers[1].questions == []
    assert rows_with_a_token_of_its_own > 5


@pytest.mark.parametrize("when", ["before", "sampling", "scoring"])
async def test_a_teacher_that_goes_away_is_left_out_and_nothing_is_lost_or_doubled(when: str) -> None:
    teachers = toys()
    one = team(config(type="ensemble", missing="renormalise", weights={"a": 1.0, "b": 2.0, "c": 3.0}), teachers)
    gone = teachers[1]
    if when == "before":
        gone.availability.lose("all replicas died")
    seen: list[Rollout] = []
    async for part in one.sample(requests()):
        seen += part
        if when == "sampling" and len(gone.drawn) == 2 and not gone.stuck:
            gone.stuck = True
            asyncio.get_running_loop().call_later(0.01, gone.availability.lose, "all replicas died")
    assert sorted(rollout.sample_id for rollout in seen) == list(range(12))
    if when == "scoring":
        gone.stuck = True
        asyncio.get_running_loop().call_later(0.01, gone.availability.lose, "all replicas died")
    rollouts = await read(one.score(seen))
    assert [rollout.sample_id for rollout in rollouts] == list(range(12))
    for rollout in rollouts:
        kept = [teachers[0], teachers[2]]
        if when != "before" and rollout.teacher == "b":
            continue  # sampled by the one that went away: what it recorded may count
        check_target(rollout, [teacher.distributions(rollout) for teacher in kept], [0.25, 0.75], "arithmetic")
    gone.availability.restore()
    gone.stuck = False
    assert "b" in {rollout.teacher for rollout in await read(one.sample(requests()))}


async def test_a_missing_teacher_ends_the_run_where_the_settings_say_so() -> None:
    for settings in (
        config(type="ensemble", missing="stop"),
        config(type="route", missing="stop", weights={"a": 1.0, "b": 1.0}),
    ):
        teachers = toys()
        teachers[1].stuck = True
        asyncio.get_running_loop().call_later(0.01, teachers[1].availability.lose, "teacher b: no replica for 120 s")
        with pytest.raises(EngineError, match=r"teacher b: no replica for 120 s; rollout\.teachers\.missing=stop"):
            await both(team(settings, teachers))


async def test_a_missing_teacher_is_waited_for_by_default() -> None:
    teachers = toys()
    teachers[1].availability.lose("all replicas died")
    rollouts = await both(team(config(type="ensemble"), teachers))
    for rollout in rollouts:
        check_target(rollout, [teacher.distributions(rollout) for teacher in teachers], [1 / 3] * 3, "arithmetic")


async def test_no_teacher_left_is_an_error_with_all_reasons() -> None:
    teachers = toys()
    for teacher in teachers:
        teacher.availability.lose(f"teacher {teacher.name} died")
    with pytest.raises(EngineError, match="teacher a died; teacher b died; teacher c died"):
        await read(team(config(type="ensemble", missing="renormalise", sampler="first"), teachers).sample(requests(1)))


async def test_metrics_are_means_by_teacher_since_the_last_call() -> None:
    teachers = toys()
    one = team(config("reverse_kl", type="ensemble"), teachers)
    rollouts = await both(one)
    found = one.metrics()
    for teacher in teachers:
        each = np.concatenate([teacher.answer(rollout, False).reverse_kl for rollout in rollouts])  # type: ignore[misc]
        assert found[f"teacher/{teacher.name}/reverse_kl"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert found["teacher_disagreement"] > 0
    assert one.metrics() == {}
    await both(one.with_fresh_metrics())
    assert one.metrics() == {}


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({"type": "route"}, "takes one of map, rules, weights, and 0 are given"),
        ({"type": "route", "map": {"x": "d"}}, "rollout.teachers names d, but the teachers are a, b, c"),
        ({"type": "route", "weights": {"a": 1}, "default": "b"}, "rollout.teachers.default"),
        ({"type": "route", "rules": [{"pattern": "(", "teacher": "a"}]}, "not a regular expression"),
        ({"type": "ensemble", "teachers": ["a", "a"]}, "each once"),
        ({"type": "ensemble", "weights": {"z": 1}}, "names z"),
        ({"type": "ensemble", "weights": {"a": 1}, "confidence_temperature": 1}, "remove weights"),
        ({"type": "vote"}, "rollout.teachers"),
    ],
)
def test_settings_that_contradict_are_refused(teachers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**teachers)


def test_several_teachers_need_to_be_told_apart() -> None:
    tree = {
        "run": {"name": "toy"},
        "student": {"model": {"type": "tiny"}},
        "teachers": {name: {"model": TINY} for name in ("a", "b")},
    }
    with pytest.raises(ConfigError, match=r"set rollout\.teachers\.type to route or ensemble"):
        parse_config(tree)
    sampler = {"rollout": {"sampler": "student", "teachers": {"type": "ensemble", "support": "sampler"}}}
    with pytest.raises(ConfigError, match=r"rollout\.teachers\.support=union"):
        parse_config(tree | sampler)


async def test_the_reward_of_an_ensemble_is_the_mean_of_its_teachers() -> None:
    """log g + log Z is sum_i w_i log p_i, also where a domain has one teacher, in one batch with the others."""
    teachers = toys()
    shares = {"x": {"a": 1.0}, "y": {"b": 1.0, "c": 3.0}, "z": {"a": 1.0, "b": 1.0}}
    rollouts = await both(team(config("minillm", type="ensemble", domain_weights=shares), teachers))
    for rollout in rollouts:
        of_domain = shares["xyz"[rollout.prompt_id % 3]]
        logs = {teacher.name: np.log(teacher.distributions(rollout)[range(TOKENS), rollout.token_ids]) for teacher in teachers}
        mean = sum(share * logs[name] for name, share in of_domain.items()) / sum(of_domain.values())
        assert rollout.teacher_logprobs is not None
        assert rollout.log_z is not None
        np.testing.assert_allclose(rollout.teacher_logprobs + rollout.log_z, mean, atol=1e-5)
        assert (rollout.log_z == 0).all() == (len(of_domain) == 1)
    batch = rollouts_to_batch(rollouts, step=1)
    assert batch.columns["log_z"][batch.loss_mask].shape == (12 * TOKENS,)
    routed = team(config(type="route", pool="student", map={"x": "a", "y": "b", "z": "c"}), teachers)
    assert all(rollout.log_z is None for rollout in await both(routed, StudentOnly()))


class PrefixTeacher(ToyTeacher):
    """A teacher of the enumerated world, of whose rows it records the likeliest id."""

    def __init__(self, name: str, world: ToyWorld, rows: torch.Tensor) -> None:
        super().__init__(name, 0)
        self.world, self.by_prefix = world, rows

    def distributions(self, rollout: Rollout) -> np.ndarray:
        return np.exp(self.world.rows_before(self.by_prefix, rollout.token_ids.tolist()))

    def answer(self, rollout: Rollout, top_k: bool) -> Rollout:
        rows, tokens = np.log(self.distributions(rollout)), rollout.token_ids
        top = np.argsort(-rows, axis=1)[:, :1].astype(np.int32)
        ids = top if rollout.support_ids is None else rollout.support_ids
        outside = np.ones_like(rows)
        for row, named in enumerate(ids):
            outside[row, named[named >= 0]] = 0.0
        logprobs = np.where(ids >= 0, np.take_along_axis(rows, ids.clip(min=0).astype(np.int64), axis=1), -np.inf)
        return replace(
            rollout,
            teacher=self.name,
            teacher_logprobs=rows[np.arange(len(tokens)), tokens].astype(np.float32),
            support_ids=ids,
            support_logprobs=logprobs.astype(np.float32),
            tail_logprobs=np.log((np.exp(rows) * outside).sum(1)).astype(np.float32),
        )


async def test_vopds_baseline_on_a_union_does_not_depend_on_the_token() -> None:
    """Its expected gradient is that of the KL at the sampled prefixes, of which whole rows give it exactly."""
    world = ToyWorld(3)
    other = torch.randn(world.teacher.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log_softmax(-1)
    teachers = [PrefixTeacher("a", world, world.teacher), PrefixTeacher("b", world, other)]
    settings = config("vopd", pool="student", type="ensemble", teachers=["a", "b"])
    one = TeacherTeam(settings, teachers, [Prompt(0, np.zeros(1, np.int32), "text")], VOCAB)
    scored = await read(one.score(world.rollouts(0.0)))
    found = world.expected_of_records(settings.loss, scored, 0.0)
    world.teacher = (0.5 * (world.teacher + other)).log_softmax(-1)
    exact = world.expected_gradient(ReverseKLLoss(type="reverse_kl"), 0.0)
    assert (found - exact).norm() / exact.norm() < 1e-5
