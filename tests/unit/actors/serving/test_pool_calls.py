"""Calls of a pool to replicas that fail or are slow: every sample once, whoever answers. No Ray: replicas are generators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.serving.hedging import CallTimes
from actors.serving.pool import ReplicaPool, _Part
from actors.serving.replica_choice import CallRoute
from actors.serving.spec import EngineSpec, RunHandles
from actors.vllm_plugin.record_table import Passes
from kdray.config import ClusterSettings, VLLMTeacherSettings
from kdray.errors import EngineError, TeacherGone
from kdray.rollouts.arrow import rollouts_to_table
from kdray.types import Rollout, SampleRequest
from tests.support.fakes import BigramWorld

WORLD = BigramWorld()
Replica = Callable[[list[int]], AsyncGenerator[pa.Table]]


def rollout(sample_id: int) -> Rollout:
    request = SampleRequest(sample_id, sample_id, np.array([1], np.int32), 0.2, sample_id, 4, 0)
    return WORLD.draw(request, 0, scored=True)


class Answer:
    """What Serve's handle gives: a stream that can be cancelled."""

    def __init__(self, stream: AsyncGenerator[pa.Table]) -> None:
        self._stream = stream
        self.cancelled = False

    def __aiter__(self) -> AsyncGenerator[pa.Table]:
        return self._stream

    def cancel(self) -> None:
        self.cancelled = True


async def answers(ids: list[int]) -> AsyncGenerator[pa.Table]:
    for sample_id in ids:
        yield rollouts_to_table([rollout(sample_id)])


async def dies(ids: list[int]) -> AsyncGenerator[pa.Table]:
    """After its first rollout."""
    yield rollouts_to_table([rollout(ids[0])])
    raise RuntimeError("the replica died")


async def hangs(ids: list[int]) -> AsyncGenerator[pa.Table]:
    """After its first rollout."""
    yield rollouts_to_table([rollout(ids[0])])
    await asyncio.Event().wait()


async def silent(ids: list[int]) -> AsyncGenerator[pa.Table]:
    await asyncio.Event().wait()
    yield


async def dies_late(ids: list[int]) -> AsyncGenerator[pa.Table]:
    """Once a copy has had the time to answer something."""
    await asyncio.sleep(0.2)
    raise RuntimeError("the replica died late")
    yield


async def answers_late(ids: list[int]) -> AsyncGenerator[pa.Table]:
    await asyncio.sleep(0.2)
    yield rollouts_to_table([rollout(sample_id) for sample_id in ids])


class Rig:
    """A pool whose calls go to these replicas, one after the other; every call is slow at once where `slow`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *replicas: Replica, slow: bool = True, retries: int = 2, **cluster_: Any
    ) -> None:
        monkeypatch.setattr("actors.serving.pool._LOOK_FOR_SLOW_EVERY_S", 0.02)
        self.events: list[str] = []
        settings = VLLMTeacherSettings.model_validate({"model": "m", "replicas": 2})
        spec = EngineSpec("mixture", "m", "s", 5, (4,), 64, teacher="t")
        cluster = ClusterSettings(**cluster_)
        self.pool = ReplicaPool(
            "t", spec, settings, cluster, RunHandles(), retries, on_event=lambda kind, **fields: self.events.append(kind)
        )
        self.pool.replicas_serving = 2
        self.times = self.pool._times["sample"]
        monkeypatch.setattr(CallTimes, "is_slow", lambda times, call, now: slow)
        self.sent: list[tuple[list[int], CallRoute, Answer, float]] = []
        self._replicas = list(replicas)

    def _call(self, ids: list[int], route: CallRoute) -> Any:
        answer = Answer(self._replicas.pop(0)(ids))
        self.sent.append((ids, route, answer, time.monotonic()))
        return answer

    async def ask(self, count: int = 4) -> list[int]:
        """The samples that arrived, in order of their ids."""
        wanted = dict.fromkeys(range(count), 4)
        part = _Part("sample", self._call, asyncio.Queue(), wanted, time.monotonic(), self.pool._count_passes)
        await asyncio.wait_for(self.pool._persist(part), 20)
        return sorted(each.sample_id for _ in range(part.arrived.qsize()) for each in part.arrived.get_nowait())


async def test_the_rest_of_a_slow_call_comes_from_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, hangs, answers)
    assert await rig.ask() == [0, 1, 2, 3]
    (ids, first, answer, _), (copied, copy, _, _) = rig.sent
    assert (ids, copied) == ([0, 1, 2, 3], [1, 2, 3]), "what had come is not drawn again"
    assert (first.instead_of, copy.instead_of) == (None, first.ticket)
    assert answer.cancelled, "the slow replica goes on drawing"
    assert (rig.pool.hedged, rig.pool.retried, rig.events) == (3, 0, ["hedge"])
    assert not rig.times._running
    assert not rig.times._took, "what a copy answered tells nothing of the first"


async def test_a_call_that_stops_in_the_middle_is_resumed_by_another_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, hangs, answers, slow=False, request_silence_s=0.2)
    assert await rig.ask() == [0, 1, 2, 3]
    (_, first, answer, sent), (copied, copy, _, resent) = rig.sent
    assert (copied, copy.instead_of) == ([1, 2, 3], first.ticket), "what had come is drawn again, or by the same replica"
    assert resent - sent > 0.2
    assert answer.cancelled
    assert (rig.events, rig.pool.retried, rig.pool.hedged) == (["request_lost"], 3, 0)
    assert rig.pool.waits_for() == []
    assert rig.pool._patience["sample"].silence_s(4) == 0.2, "the time of a lost call tells nothing of the next"


async def test_a_single_replica_that_lost_a_call_gets_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, hangs, answers, slow=False, request_silence_s=0.2)
    rig.pool.replicas_serving = 1
    assert await rig.ask() == [0, 1, 2, 3]
    assert rig.sent[0][2].cancelled
    assert rig.events == ["request_lost", "retry"]


async def test_a_call_that_every_replica_loses_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, silent, silent, silent, silent, slow=False, request_silence_s=0.1, retries=1)
    with pytest.raises(EngineError, match=r"in 2 attempts: no replica said anything of 4 rollouts for 0.1 s"):
        await rig.ask()


async def test_a_call_is_not_lost_while_no_replica_serves_or_its_answers_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def trickles(ids: list[int]) -> AsyncGenerator[pa.Table]:
        for sample_id in ids:
            await asyncio.sleep(0.2)
            yield rollouts_to_table([rollout(sample_id)])

    rig = Rig(monkeypatch, trickles, slow=False, request_silence_s=0.4)
    assert await rig.ask() == [0, 1, 2, 3], "0.8 s in all, and never silent for 0.4"
    assert rig.events == []
    rig = Rig(monkeypatch, answers_late, slow=False, request_silence_s=0.1)
    rig.pool.replicas_serving = 0
    asking = asyncio.create_task(rig.ask())
    await asyncio.sleep(0.15)
    assert "pool t (0 replicas serve): 4 rollouts in 1 calls" in rig.pool.waits_for()[0]
    assert await asking == [0, 1, 2, 3]
    assert rig.events == []


@pytest.mark.parametrize(
    ("first", "copy"), [(dies_late, answers_late), (answers_late, dies), (answers_late, answers_late), (answers_late, answers)]
)
async def test_whoever_of_the_two_answers_counts_once(monkeypatch: pytest.MonkeyPatch, first: Replica, copy: Replica) -> None:
    rig = Rig(monkeypatch, first, copy)
    assert await rig.ask() == [0, 1, 2, 3]
    assert len(rig.sent) == 2
    assert rig.pool.retried == 0


async def test_the_teachers_share_of_the_passes_is_of_the_answers_since_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def counts(ids: list[int]) -> AsyncGenerator[pa.Table]:
        for sample_id, passes in zip(ids, (Passes(10, 2), Passes(), Passes(30, 8)), strict=True):
            yield passes.added_to(rollouts_to_table([rollout(sample_id)]))

    rig = Rig(monkeypatch, counts, answers, slow=False)
    assert await rig.ask(3) == [0, 1, 2]
    assert rig.pool.take_teacher_share() == 10 / 40
    await rig.ask(1)
    assert rig.pool.take_teacher_share() is None, "its answers report no pass"


async def test_where_both_fail_the_call_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, dies_late, dies, answers)
    assert await rig.ask() == [0, 1, 2, 3]
    assert rig.events == ["hedge", "retry"]
    assert rig.sent[2][0] == [1, 2, 3]


async def test_the_error_after_the_last_attempt_is_that_of_the_first_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, dies_late, dies, retries=0)
    with pytest.raises(EngineError, match=r"could not serve 3 rollouts in 1 attempts: the replica died late"):
        await rig.ask()


async def test_attempts_that_bring_something_refill_the_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long call outlives many replicas: three attempts fail here, where one retry is allowed."""
    monkeypatch.setattr("actors.serving.pool._FIRST_PAUSE_S", 0.01)
    rig = Rig(monkeypatch, dies, dies, dies, answers, slow=False, retries=1)
    assert await rig.ask() == [0, 1, 2, 3]
    assert rig.events == ["retry"] * 3
    rig = Rig(monkeypatch, dies, dies, dies_late, dies_late, answers, slow=False, retries=2)
    with pytest.raises(EngineError, match=r"could not serve 2 rollouts in 3 attempts: the replica died late"):
        await rig.ask()
    assert rig.events == ["retry"] * 3


async def test_no_copy_is_sent_where_one_replica_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, answers_late)
    rig.pool.replicas_serving = 1
    assert await rig.ask() == [0, 1, 2, 3]
    assert (rig.pool.hedged, rig.events) == (0, [])


async def test_a_call_that_is_sent_again_is_timed_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from before its backoff, in which others are sent and answered."""
    rig = Rig(monkeypatch, dies, dies, answers, slow=False)
    began: list[float] = []
    begin = CallTimes.begin

    def noted(times: CallTimes, call: str, size: int, now: float) -> None:
        began.append(now)
        begin(times, call, size, now)

    monkeypatch.setattr(CallTimes, "begin", noted)
    assert await rig.ask() == [0, 1, 2, 3]
    actual = [at for _, _, _, at in rig.sent]
    assert actual[2] - actual[1] > 0.5, "there was no backoff: the test does not test what it says"
    assert all(abs(a - b) < 0.25 for a, b in zip(began, actual, strict=True))


def test_one_replica_or_mixed_hardware_is_not_hedged() -> None:
    def times(**settings: Any) -> dict[str, CallTimes]:
        spec = EngineSpec("teacher", "m", None, 5, (4,), 64, teacher="t")
        teacher = VLLMTeacherSettings.model_validate({"model": "m", **settings})
        return ReplicaPool("t", spec, teacher, ClusterSettings(), RunHandles(), 0)._times

    assert set(times(replicas=2)) == {"sample", "score"}
    assert times(autoscaling={"max_replicas": 2}), "it may grow"
    assert not times(replicas=1)
    assert not times(replicas=2, num_gpus=1, accelerator_types=["L4", "H100"])


class Deployment:
    """What Serve gives for a pool: every call goes to the next of these replicas, with the samples of its table."""

    def __init__(self, *replicas: Replica) -> None:
        self._replicas = list(replicas)
        self.sample = self
        self.answers: list[Answer] = []

    def options(self, stream: bool) -> Deployment:
        assert stream
        return self

    def remote(self, table: pa.Table, route: CallRoute) -> Answer:
        self.answers.append(Answer(self._replicas.pop(0)(table.column("sample_id").to_pylist())))
        return self.answers[-1]


def pool_of(*replicas: Replica, retries: int = 0) -> ReplicaPool:
    """Two calls for four samples."""
    settings = VLLMTeacherSettings.model_validate({"model": "m", "replicas": 2})
    spec = EngineSpec("mixture", "m", "s", 5, (4,), 64, teacher="t")
    pool = ReplicaPool("t", spec, settings, ClusterSettings(hedge_after=None), RunHandles(), retries)
    pool.connect(Deployment(*replicas))
    return pool


def requests(count: int = 4) -> list[SampleRequest]:
    return [SampleRequest(each, each, np.array([1], np.int32), 0.2, each, 4, 0) for each in range(count)]


async def drawn(pool: ReplicaPool) -> list[int]:
    return [each.sample_id async for part in pool.sample(requests()) for each in part]


async def test_calls_run_side_by_side_and_every_sample_comes_once() -> None:
    pool = pool_of(answers_late, answers)
    assert await drawn(pool) == [2, 3, 0, 1]
    assert not pool._awaited.owes


async def test_a_call_that_fails_ends_the_answer_and_the_other_calls() -> None:
    pool = pool_of(dies, hangs)
    with pytest.raises(EngineError, match="could not serve 1 rollouts in 1 attempts: the replica died"):
        await asyncio.wait_for(drawn(pool), 5.0)
    assert pool._handle.answers[1].cancelled
    assert not pool._awaited.owes


async def test_a_teacher_that_is_lost_for_good_ends_the_answer_and_one_that_may_return_does_not() -> None:
    pool = pool_of(hangs, answers)
    asking = asyncio.ensure_future(drawn(pool))
    await asyncio.sleep(0.05)
    pool.availability.lose("no replica for long")
    await asyncio.sleep(0.05)
    assert not asking.done()
    pool.availability.lose("turned away", final=True)
    with pytest.raises(TeacherGone, match="turned away"):
        await asyncio.wait_for(asking, 5.0)
    assert pool._handle.answers[0].cancelled


class Registry:
    """The run's registry, as an actor's handle: its teacher's replicas took so long to start."""

    def __init__(self, longest_start_s: float) -> None:
        self._answers = {"refused": [], "longest_start_s": longest_start_s}

    def __getattr__(self, name: str) -> Any:
        async def answer(teacher: str) -> Any:
            return self._answers[name]

        return SimpleNamespace(remote=answer)


@pytest.mark.parametrize(
    ("set_to", "longest_start_s", "patience_s"), [(None, 20.0, 120.0), (None, 900.0, 1800.0), (5.0, 900.0, 5.0)]
)
async def test_a_teacher_is_missing_once_another_replica_would_have_started(
    monkeypatch: pytest.MonkeyPatch, set_to: float | None, longest_start_s: float, patience_s: float
) -> None:
    events: list[str] = []
    settings = VLLMTeacherSettings.model_validate({"model": "m"})
    spec = EngineSpec("mixture", "m", "s", 5, (4,), 64, teacher="t")
    run, clock = RunHandles(registry=Registry(longest_start_s)), 1000.0
    monkeypatch.setattr("actors.serving.pool.time", SimpleNamespace(monotonic=lambda: clock))
    pool = ReplicaPool("t", spec, settings, ClusterSettings(), run, 0, set_to, lambda kind, **fields: events.append(kind))
    monkeypatch.setattr(pool, "_awaited", SimpleNamespace(owes=True))
    await pool._watch_availability(1)
    clock += 0.9 * patience_s
    await pool._watch_availability(0)
    assert events == []
    clock += 0.2 * patience_s
    await pool._watch_availability(0)
    assert events == ["teacher_missing"]


async def test_a_reader_that_goes_away_ends_the_calls() -> None:
    pool = pool_of(hangs, hangs)
    stream = pool.sample(requests())
    await anext(stream)
    await stream.aclose()
    assert all(answer.cancelled for answer in pool._handle.answers)
    assert not pool._awaited.owes
