"""The one pass is exact: through the real vLLM engine, against Hugging Face forwards, before and after weight updates."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from scipy.stats import chisquare

from actors.serving.engine import TeacherEngine
from actors.student.hidden_state_loss import load_output_head
from actors.weights.scratch import process_folder
from kdray.config.environments import EnvironmentSettings
from kdray.errors import EngineError
from kdray.rollouts.columns import rollout_columns, unscored, value_of, with_columns
from kdray.rollouts.environments import EnvironmentSampler, Reply
from kdray.types import Prompt, Rollout, SampleRequest
from tests.integration.conftest import EOS, VOCAB, TinyModels
from tests.support.pools import engine_spec

# float32 on both sides; different kernels add in different orders.
TOLERANCE = 1e-4


@dataclass
class Pair:
    engine: TeacherEngine
    teacher: Path
    student: Path
    newer: Path


# Tied and untied students take different paths through vLLM's weight packing: both have to survive an update.
@pytest_asyncio.fixture(scope="module", loop_scope="session", params=[False, True], ids=["untied", "tied"])
async def pair(request: pytest.FixtureRequest, tiny_models: TinyModels) -> AsyncIterator[Pair]:
    tied = request.param
    # The teacher's embedding is padded beyond the shared vocabulary, as real families pad theirs.
    teacher = tiny_models.make("teacher", 3, 128, rows=VOCAB + 5, seed=1)
    student = tiny_models.make(f"student-{tied}", 2, 64, tied=tied, seed=2)
    newer = tiny_models.make(f"newer-{tied}", 2, 64, tied=tied, seed=3)
    spec = engine_spec(
        teacher,
        student,
        teacher="wise",
        record_hidden=True,
        max_num_seqs=32,
        # Prompts of up to 150 tokens in chunks of 64, and a KV cache too small for 32 of them: chunking and preemption.
        max_num_batched_tokens=64,
        engine_args={"num_gpu_blocks_override": 36},
    )
    engine = TeacherEngine(spec)
    await engine.start()
    yield Pair(engine, teacher, student, newer)
    await engine.close()


def _requests(count: int, seed: int = 0, alphas: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)) -> list[SampleRequest]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(2, VOCAB, size=96)
    requests = []
    for index in range(count):
        own = rng.integers(2, VOCAB, size=rng.integers(1, 54))
        # Every other prompt starts with the same 96 tokens, so that the prefix cache has something to hit.
        prompt = np.concatenate([shared, own]) if index % 2 else own
        requests.append(
            SampleRequest(
                sample_id=index,
                prompt_id=index,
                prompt_ids=prompt.astype(np.int32),
                alpha=alphas[index % len(alphas)],
                seed=int(rng.integers(0, 2**63)),
                max_new_tokens=int(rng.integers(1, 60)),
            )
        )
    return requests


async def _draw(engine: TeacherEngine, requests: list[SampleRequest]) -> dict[int, Rollout]:
    rollouts = [rollout async for part in engine.sample(requests) for rollout in part]
    assert sorted(rollout.sample_id for rollout in rollouts) == sorted(request.sample_id for request in requests)
    return {rollout.sample_id: rollout for rollout in rollouts}


def _close(name: str, got: np.ndarray | None, want: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got is not None, name
    assert np.max(np.abs(got - want.numpy()), initial=0.0) < tolerance, name


def _check(rollout: Rollout, teacher: torch.Tensor, student: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Every recorded column of a rollout against full rows of both models."""
    at = torch.from_numpy(rollout.token_ids).long().unsqueeze(1)
    p, q = teacher.gather(1, at).squeeze(1), student.gather(1, at).squeeze(1)
    mixture = (rollout.alpha * p.double().exp() + (1 - rollout.alpha) * q.double().exp()).log()
    _close("log p", rollout.teacher_logprobs, p, tolerance)
    _close("log q", rollout.student_logprobs, q, tolerance)
    _close("log m", rollout.mixture_logprobs, mixture, tolerance)
    ids = torch.from_numpy(np.array(rollout.support_ids)).long()
    used = ids >= 0
    ids = ids.where(used, ids[:, :1])
    logprobs = torch.from_numpy(np.array(rollout.support_logprobs))
    assert (logprobs - teacher.gather(1, ids))[used].abs().max() < tolerance, "support"
    # Values, not ids: where two tokens tie to within rounding, either may be the last of the top k.
    assert (logprobs[:, :8] - teacher.topk(8).values).abs().max() < tolerance, "teacher top-8"
    union = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, ids, True)
    left_out = student.masked_fill(union, -torch.inf).max(1).values
    assert (left_out <= student.topk(4).values[:, -1] + tolerance).all(), "student top-4"
    assert torch.equal(union.sum(1), used.sum(1)), "no id twice"
    _close("tail", rollout.tail_logprobs, teacher.masked_fill(union, -torch.inf).logsumexp(1), tolerance)
    _close("reverse KL", rollout.reverse_kl, (student.exp() * (student - teacher)).sum(1), tolerance)
    _close("forward KL", rollout.forward_kl, (teacher.exp() * (teacher - student)).sum(1), tolerance)


class Ids:
    """Turns as ids, which an environment answers with others; the model pauses at every fifth id."""

    pause_ids = tuple(range(2, VOCAB, 5))
    pauses = "x"

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))

    def encode(self, text: str) -> np.ndarray:
        return np.array(text.split(), dtype=np.int32)

    def start(self, prompt: Prompt, seed: int) -> Ids:
        return self

    def reply(self, turn: str) -> Reply | None:
        *_, last = map(int, turn.split())
        return Reply(" ".join(str(3 + (last + step) % 7) for step in range(last % 4))) if last % 3 else None


async def test_turns_with_an_environment_are_exact(pair: Pair, tiny_models: TinyModels) -> None:
    """Each draw goes on from what the environment wrote; the columns are those of the whole text in one forward."""
    requests = [replace(request, max_new_tokens=24) for request in _requests(24, seed=9)]
    prompts = {request.prompt_id: Prompt(request.prompt_id, request.prompt_ids) for request in requests}
    settings = EnvironmentSettings(type="ids", max_turns=4, max_reply_tokens=3)
    sampler = EnvironmentSampler(pair.engine, Ids(), settings, Ids(), prompts)
    rollouts = [rollout async for part in sampler.sample(requests) for rollout in part]
    assert sorted(rollout.sample_id for rollout in rollouts) == list(range(24))
    assert sum(rollout.has_context for rollout in rollouts) > 12
    assert {"stop", "length"} >= {rollout.finish_reason for rollout in rollouts}
    again = [unscored(rollout) for rollout in rollouts]
    scored = {rollout.sample_id: rollout async for part in pair.engine.score(again) for rollout in part}
    for rollout in rollouts:
        teacher = tiny_models.log_rows(pair.teacher, rollout.prompt_ids, rollout.token_ids)
        student = tiny_models.log_rows(pair.student, rollout.prompt_ids, rollout.token_ids)
        drawn = torch.from_numpy(rollout.is_target)
        _check(_at(rollout, rollout.is_target), teacher[drawn], student[drawn])
        _check(_at(scored[rollout.sample_id], rollout.is_target), teacher[drawn], student[drawn])
    repeated = {rollout.sample_id: rollout async for part in sampler.sample(requests) for rollout in part}
    for rollout in rollouts:
        np.testing.assert_array_equal(rollout.token_ids, repeated[rollout.sample_id].token_ids)


def _at(rollout: Rollout, chosen: np.ndarray) -> Rollout:
    """The rollout with some of its tokens alone."""
    values = {column.name: value_of(rollout, column.name) for column in rollout_columns()}
    return with_columns(rollout, {name: None if value is None else value[chosen] for name, value in values.items()})


async def test_recorded_columns_are_exact_under_load(pair: Pair, tiny_models: TinyModels) -> None:
    """Unequal lengths, chunked prefill, prefix hits, preemption, mixed alphas; every position, the last one included."""
    before = await pair.engine.stats()
    requests = _requests(96)
    rollouts = await _draw(pair.engine, requests)
    head = load_output_head(str(pair.teacher))
    for request in requests:
        rollout = rollouts[request.sample_id]
        teacher = tiny_models.log_rows(pair.teacher, rollout.prompt_ids, rollout.token_ids)
        student = tiny_models.log_rows(pair.student, rollout.prompt_ids, rollout.token_ids)
        _check(rollout, teacher, student)
        assert (rollout.student_versions == 0).all()
        assert rollout.teacher_hidden is not None
        rows = torch.from_numpy(rollout.teacher_hidden.astype(np.float32)) @ head.weight.T
        # Half precision on the way is what separates these rows from the teacher's own.
        assert (rows[:, :VOCAB].log_softmax(-1) - teacher).abs().max() < 0.03
        ended = rollout.token_ids[-1] == EOS
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.token_ids) == request.max_new_tokens
        assert EOS not in rollout.token_ids[:-1]
    after = await pair.engine.stats()
    assert after["cached_tokens"] > before["cached_tokens"], "no prefix-cache hit: the test does not test what it says"
    assert after["readmitted"] > before["readmitted"], "nothing was preempted: the test does not test what it says"
    assert after["held"] == 0, "records of finished requests are given away"


async def test_at_alpha_0_the_teacher_scores_what_the_student_drew_alone(pair: Pair, tiny_models: TinyModels) -> None:
    """Every column as under the one pass, prefix hits included, with few passes of the teacher."""
    before = await pair.engine.stats()
    requests = _requests(48, seed=9, alphas=(0.0,))
    rollouts = await _draw(pair.engine, requests)
    after = await pair.engine.stats()
    for request in requests:
        rollout = rollouts[request.sample_id]
        rows = (tiny_models.log_rows(model, rollout.prompt_ids, rollout.token_ids) for model in (pair.teacher, pair.student))
        _check(rollout, *rows)
        assert rollout.teacher_hidden is not None
        assert rollout.teacher == "wise"
    assert after["cached_tokens"] > before["cached_tokens"], "no prefix-cache hit: the test does not test what it says"
    rested = (after["steps"] - after["teacher_steps"]) - (before["steps"] - before["teacher_steps"])
    assert rested > 20, "the teacher ran in every pass"
    # The latest answer reports them, as far as it came before the last pass.
    assert before["steps"] < pair.engine.records.passes.steps <= after["steps"]
    assert pair.engine.records.passes.teacher_steps < pair.engine.records.passes.steps - rested / 2
    assert after["held"] == 0


async def test_same_request_draws_the_same_tokens(pair: Pair) -> None:
    requests = _requests(24, seed=5)
    first = await _draw(pair.engine, requests)
    second = await _draw(pair.engine, list(reversed(requests)))
    for sample_id, rollout in first.items():
        assert np.array_equal(rollout.token_ids, second[sample_id].token_ids)


@pytest.mark.parametrize("alpha", [0.2, 0.5])
async def test_token_frequencies_follow_the_mixture(pair: Pair, tiny_models: TinyModels, alpha: float) -> None:
    await _check_frequencies(pair, tiny_models, pair.student, alpha)


async def _check_frequencies(pair: Pair, tiny_models: TinyModels, student: Path, alpha: float) -> None:
    """First and second token of many draws against alpha p + (1 - alpha) q from Hugging Face (chi-square)."""
    prompt = np.array([5, 9, 33, 20], dtype=np.int32)
    requests = [SampleRequest(index, 0, prompt, alpha, seed=1_000_003 * index + 17, max_new_tokens=2) for index in range(3000)]
    rollouts = list((await _draw(pair.engine, requests)).values())

    def distribution(prefix: np.ndarray) -> np.ndarray:
        p, q = (tiny_models.log_rows(folder, prefix, np.array([0])).double().exp()[0] for folder in (pair.teacher, student))
        return (alpha * p + (1 - alpha) * q).numpy()

    first = np.array([rollout.token_ids[0] for rollout in rollouts])
    assert _p_value(first, distribution(prompt)) > 1e-3
    favourite = int(np.bincount(first[first != EOS]).argmax())
    second = np.array([rollout.token_ids[1] for rollout in rollouts if rollout.token_ids[0] == favourite])
    assert len(second) > 200
    assert _p_value(second, distribution(np.append(prompt, favourite).astype(np.int32))) > 1e-3
    # The test has power: neither model alone explains the draws.
    for folder in (pair.teacher, student):
        alone = tiny_models.log_rows(folder, prompt, np.array([0])).double().exp()[0].numpy()
        assert _p_value(first, alone) < 1e-6


def _p_value(tokens: np.ndarray, distribution: np.ndarray) -> float:
    """Chi-square p-value, rare tokens pooled so that every expected count is at least 5."""
    distribution = distribution / distribution.sum()
    counts = np.bincount(tokens, minlength=len(distribution)).astype(float)
    expected = distribution * len(tokens)
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float(chisquare(counts[keep], expected[keep]).pvalue)


def _foreign(count: int, rng: np.random.Generator) -> list[Rollout]:
    """Sequences that no engine sampled, many longer than a chunk of prefill."""
    foreign = []
    for index in range(count):
        length = int(rng.integers(1, 90))
        foreign.append(
            Rollout(
                sample_id=index,
                prompt_id=index,
                prompt_ids=rng.integers(2, VOCAB, size=rng.integers(1, 120)).astype(np.int32),
                token_ids=rng.integers(1, VOCAB, size=length).astype(np.int32),
                mixture_logprobs=np.zeros(length, np.float32),
                student_logprobs=np.zeros(length, np.float32),
                student_versions=np.zeros(length, np.int32),
                alpha=0.0,
                finish_reason="length",
            )
        )
    return foreign


@pytest.mark.parametrize("top_k", [False, True])
async def test_log_p_at_ids_that_the_caller_names(pair: Pair, tiny_models: TinyModels, top_k: bool) -> None:
    """Other ids at every position, unused slots between them: exact values, in the caller's order, and an exact tail."""
    rng = np.random.default_rng(12)
    asked = {}
    rollouts = []
    for rollout in _foreign(30, rng):
        ids = np.stack([rng.permutation(VOCAB)[:7] for _ in rollout.token_ids]).astype(np.int32)
        ids[rng.random(ids.shape) < 0.3] = -1
        asked[rollout.sample_id] = ids
        rollouts.append(replace(rollout, support_ids=ids))
    scored = [rollout async for part in pair.engine.score(rollouts, top_k) for rollout in part]
    assert len(scored) == 30
    for rollout in scored:
        teacher = tiny_models.log_rows(pair.teacher, rollout.prompt_ids, rollout.token_ids)
        ids, logprobs = np.array(rollout.support_ids), np.array(rollout.support_logprobs)
        assert np.array_equal(ids[:, :7], asked[rollout.sample_id])
        assert ids.shape[1] == (7 + 8 + 4 if top_k else 7)
        used = ids >= 0
        want = teacher.gather(1, torch.from_numpy(ids.clip(min=0)).long()).numpy()
        assert np.abs(logprobs - want)[used].max() < TOLERANCE
        assert (logprobs[~used] == -np.inf).all()
        named = torch.zeros(len(ids), VOCAB + 1, dtype=torch.bool)
        named = named.scatter(1, torch.from_numpy(np.where(used, ids, VOCAB)).long(), True)[:, :VOCAB]
        assert torch.equal(named.sum(1), torch.from_numpy(used.sum(1))), "no id twice"
        _close("tail", rollout.tail_logprobs, teacher.masked_fill(named, -torch.inf).logsumexp(1))
        if top_k:
            left_out = teacher.masked_fill(named, -torch.inf).max(1).values
            assert (left_out <= teacher.topk(8).values[:, -1] + TOLERANCE).all(), "teacher top-8"


async def test_scores_by_prefill_agree(pair: Pair, tiny_models: TinyModels) -> None:
    """Sequences of other origin, scored in batches with chunked prefill: every position within 1e-3 of Hugging Face."""
    foreign = _foreign(40, np.random.default_rng(11))
    scored = [rollout async for part in pair.engine.score(foreign) for rollout in part]
    assert sorted(rollout.sample_id for rollout in scored) == list(range(40))
    for rollout in scored:
        teacher = tiny_models.log_rows(pair.teacher, rollout.prompt_ids, rollout.token_ids)
        student = tiny_models.log_rows(pair.student, rollout.prompt_ids, rollout.token_ids)
        at = torch.from_numpy(rollout.token_ids).long().unsqueeze(1)
        _close("log p", rollout.teacher_logprobs, teacher.gather(1, at).squeeze(1), 1e-3)
        _close("reverse KL", rollout.reverse_kl, (student.exp() * (student - teacher)).sum(1), 1e-3)
        assert rollout.teacher == "wise"
        assert (rollout.student_logprobs == 0).all(), "what the sampler recorded stays"


async def test_scoring_reads_the_prompts_of_a_group_once(pair: Pair, tiny_models: TinyModels) -> None:
    """Four responses to one prompt share its keys and values; sequences that are cached as a whole are computed again."""
    shared = (np.arange(98) % (VOCAB - 2) + 2).astype(np.int32)
    group = [replace(each, prompt_ids=shared) for each in _foreign(4, np.random.default_rng(14))]
    before = await pair.engine.stats()
    first = [rollout async for part in pair.engine.score(group) for rollout in part]
    after = await pair.engine.stats()
    assert after["cached_tokens"] - before["cached_tokens"] >= 2 * 96
    second = [rollout async for part in pair.engine.score(group) for rollout in part]
    for rollout in (*first, *second):
        teacher = tiny_models.log_rows(pair.teacher, rollout.prompt_ids, rollout.token_ids)
        at = torch.from_numpy(rollout.token_ids).long().unsqueeze(1)
        _close("log p", rollout.teacher_logprobs, teacher.gather(1, at).squeeze(1), 1e-3)
    assert (await pair.engine.stats())["held"] == 0


async def test_vllms_own_prompt_logprobs_agree_with_the_recorder(pair: Pair, tiny_models: TinyModels) -> None:
    """The fallback reads the same engine: log p, top ids and tail, up to what float32 leaves of a small tail."""
    foreign = _foreign(30, np.random.default_rng(13))
    recorded = {rollout.sample_id: rollout async for part in pair.engine.score(foreign) for rollout in part}
    engine = copy(pair.engine)
    engine.spec = replace(engine.spec, scoring="prompt_logprobs")
    plain = [rollout async for part in engine.score(foreign) for rollout in part]
    assert sorted(rollout.sample_id for rollout in plain) == list(range(30))
    for rollout in plain:
        reference = recorded[rollout.sample_id]
        teacher = tiny_models.log_rows(pair.teacher, rollout.prompt_ids, rollout.token_ids)
        at = torch.from_numpy(rollout.token_ids).long().unsqueeze(1)
        _close("log p", rollout.teacher_logprobs, teacher.gather(1, at).squeeze(1), 1e-3)
        assert rollout.support_logprobs is not None
        assert reference.support_logprobs is not None
        assert rollout.support_logprobs.shape[1] == 8
        assert np.abs(rollout.support_logprobs - reference.support_logprobs[:, :8]).max() < 1e-4
        named = torch.zeros(len(at), VOCAB, dtype=torch.bool).scatter(
            1, torch.from_numpy(rollout.support_ids.copy()).long(), True
        )
        tail = teacher.masked_fill(named, -torch.inf).logsumexp(1).exp().numpy()
        assert np.abs(np.exp(rollout.tail_logprobs) - tail).max() < 1e-5
        assert rollout.reverse_kl is None
    with pytest.raises(EngineError, match="scoring=recorder"):
        await anext(engine.score(plain))


async def test_sockets_are_where_they_go_with_the_process(pair: Pair) -> None:
    """vLLM removes none of them; the folder is, or is swept after a kill."""
    names = [Path(each.laddr) for each in psutil.Process().net_connections("unix")]
    assert {name.parent for name in names if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name.name)} == {
        process_folder()
    }


async def test_an_abandoned_stream_leaves_nothing_behind(pair: Pair) -> None:
    stream = pair.engine.sample(_requests(16, seed=9))
    await anext(stream)
    await stream.aclose()
    assert (await pair.engine.stats())["held"] == 0
    assert await _draw(pair.engine, _requests(4, seed=9))


async def test_requests_that_cannot_be_served_are_refused(pair: Pair) -> None:
    prompt = np.full(250, 7, dtype=np.int32)
    with pytest.raises(EngineError, match="the engine holds 256"):
        await anext(pair.engine.sample([SampleRequest(0, 0, prompt, 0.2, 1, 60)]))


async def test_update_is_exact_for_requests_in_flight_and_after(pair: Pair, tiny_models: TinyModels) -> None:
    """Last in this file: it changes the student. Old tokens keep the old distribution, new tokens get the new one."""
    rng = np.random.default_rng(4)
    requests = [
        SampleRequest(index, index, rng.integers(2, VOCAB, size=20).astype(np.int32), 0.2, 77 + index, 200)
        for index in range(48)
    ]
    task = asyncio.create_task(_draw(pair.engine, requests))
    await asyncio.sleep(0.3)
    await pair.engine.update_student([pair.newer / "model.safetensors"], 1)
    rollouts = await task
    spanning = 0
    for rollout in rollouts.values():
        versions = rollout.student_versions
        assert (np.diff(versions) >= 0).all()
        spanning += len(set(versions.tolist())) == 2
        teacher = tiny_models.log_rows(pair.teacher, rollout.prompt_ids, rollout.token_ids)
        old = tiny_models.log_rows(pair.student, rollout.prompt_ids, rollout.token_ids)
        new = tiny_models.log_rows(pair.newer, rollout.prompt_ids, rollout.token_ids)
        student = torch.where(torch.from_numpy(versions == 0).unsqueeze(1), old, new)
        _check(rollout, teacher, student)
    assert spanning > 0, "no rollout spanned the update: the test does not test what it says"
    for rollout in (await _draw(pair.engine, _requests(32, seed=6))).values():
        assert (rollout.student_versions == 1).all()
        teacher = tiny_models.log_rows(pair.teacher, rollout.prompt_ids, rollout.token_ids)
        _check(rollout, teacher, tiny_models.log_rows(pair.newer, rollout.prompt_ids, rollout.token_ids))
    await _check_frequencies(pair, tiny_models, pair.newer, 0.2)


async def test_an_older_version_is_not_taken(pair: Pair, tiny_models: TinyModels) -> None:
    await pair.engine.update_student([pair.student / "model.safetensors"], 0)
    for rollout in (await _draw(pair.engine, _requests(4, seed=8))).values():
        assert (rollout.student_versions == 1).all()


async def test_a_teacher_that_changes_is_exact_after_its_update(pair: Pair, tiny_models: TinyModels) -> None:
    """Last: it changes the teacher. Its distribution is the new one; the student's stays; an older version is not taken."""
    newer = tiny_models.make("newer-teacher", 3, 128, rows=VOCAB + 5, seed=4)
    await pair.engine.update_teacher([newer / "model.safetensors"], 3)
    await pair.engine.update_teacher([pair.teacher / "model.safetensors"], 2)
    for rollout in (await _draw(pair.engine, _requests(24, seed=14))).values():
        teacher = tiny_models.log_rows(newer, rollout.prompt_ids, rollout.token_ids)
        _check(rollout, teacher, tiny_models.log_rows(pair.newer, rollout.prompt_ids, rollout.token_ids))
    scored = [rollout async for part in pair.engine.score(_foreign(6, np.random.default_rng(15))) for rollout in part]
    for rollout in scored:
        teacher = tiny_models.log_rows(newer, rollout.prompt_ids, rollout.token_ids)
        at = torch.from_numpy(rollout.token_ids).long().unsqueeze(1)
        _close("log p", rollout.teacher_logprobs, teacher.gather(1, at).squeeze(1), 1e-3)


@pytest.mark.full
@pytest.mark.parametrize("logits", ["model", "float32"])
async def test_float32_logits_of_a_half_precision_engine_are_not_rounded(logits: str, tiny_models: TinyModels) -> None:
    """Recorded log p against the exact product of the recorded hidden state and the head."""
    teacher = tiny_models.make("teacher", 3, 128, rows=VOCAB + 5, seed=1)
    student = tiny_models.make("student-half", 2, 64, seed=2)
    engine = TeacherEngine(engine_spec(teacher, student, dtype="bfloat16", logits=logits, record_hidden=True))
    try:
        await engine.start()
        rollouts = await _draw(engine, _requests(8, alphas=(0.2,)))
    finally:
        await engine.close()
    head = load_output_head(str(teacher)).weight.bfloat16().double()
    gaps = []
    for rollout in rollouts.values():
        assert rollout.teacher_hidden is not None
        states = torch.from_numpy(rollout.teacher_hidden.astype(np.float32)).bfloat16().double()
        rows = (states @ head.T)[:, :VOCAB].log_softmax(-1)
        exact = rows.gather(1, torch.from_numpy(rollout.token_ids).long().unsqueeze(1)).squeeze(1)
        gaps.append(np.abs(rollout.teacher_logprobs - exact.numpy()).max())
    assert max(gaps) < 1e-4 if logits == "float32" else max(gaps) > 1e-3, max(gaps)


@pytest.mark.full
async def test_each_model_runs_its_own_compiled_code(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models of one class in one engine, whose code vLLM would otherwise keep under one name in its cache."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    # The graphs of each model in files of their own, which is what vLLM falls back to.
    monkeypatch.setenv("VLLM_USE_MEGA_AOT_ARTIFACT", "0")
    teacher = tiny_models.make("teacher", 3, 128, rows=VOCAB + 5, seed=1)
    student = tiny_models.make("student-compiled", 3, 128, seed=2)
    # The second engine loads what the first one compiled.
    for _ in range(2):
        engine = TeacherEngine(engine_spec(teacher, student, teacher="wise", engine_args={"enforce_eager": False}))
        try:
            await engine.start()
            rollouts = await _draw(engine, _requests(12, alphas=(0.2, 0.0)))
        finally:
            await engine.close()
        assert os.listdir(tmp_path), "nothing was compiled"
        for rollout in rollouts.values():
            rows = (tiny_models.log_rows(model, rollout.prompt_ids, rollout.token_ids) for model in (teacher, student))
            _check(rollout, *rows)
