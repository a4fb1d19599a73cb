"""Runs side by side, without Ray: the stores that each is given, and what they wait for of one another."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.serving.scaling_board import ScalingBoard
from actors.weights.store import WeightStore
from cluster import peer_runs
from cluster.parts import ConcurrentRuns, Pools
from cluster.peer_runs import _all_of, _interrupt, _stores
from cluster.runner import Runner
from kdray.config import Config, parse_config
from kdray.config.route import Route
from kdray.errors import Interrupted, TrainingError
from kdray.runs.watchdog import Watchdog
from kdray.teachers.peers import peer_configs
from tests.support.fakes import turns
from tests.support.local_actors import Handle

TINY = {"model": {"type": "tiny"}}
PEERS: dict[str, Any] = {
    "ada": {"type": "peer", "model": {"type": "tiny", "seed": 1}},
    "bob": {"type": "peer", "model": {"type": "tiny", "seed": 2}},
}


def config(tmp_path: Path, teachers: dict[str, Any], **sections: Any) -> Config:
    tree = {"run": {"name": "r", "output": str(tmp_path)}, "student": TINY, "teachers": teachers}
    return parse_config(tree | sections)


def stores(configs: dict[str, Config]) -> tuple[dict[str, Any], list[tuple[int, type]]]:
    """The stores of the runs, which are numbers here, and what was made."""
    numbers, made = count(), []

    def make(kind: type) -> int:
        made.append((next(numbers), kind))
        return made[-1][0]

    checked: Any = {name: SimpleNamespace(config=each, route=Route.of(each)) for name, each in configs.items()}
    return _stores(checked, make), made


@pytest.mark.parametrize(("grace_s", "time_to_stop", "at_once"), [(None, 60.0, False), (30.0, 10.0, False), (30.0, 60.0, True)])
def test_a_signal_ends_a_run_at_once_if_a_checkpoint_does_not_fit_into_its_grace(
    monkeypatch: pytest.MonkeyPatch, grace_s: float | None, time_to_stop: float, at_once: bool
) -> None:
    monkeypatch.setattr("threading.Timer.start", lambda self: None)
    ended: list[bool] = []
    told: list[tuple[str, list[str]]] = []
    runner: Any = SimpleNamespace(
        stop=asyncio.Event(),
        hurry=asyncio.Event(),
        pace=SimpleNamespace(time_to_stop=lambda: time_to_stop),
        reporter=SimpleNamespace(event=lambda kind, **fields: told.append((kind, list(fields)))),
    )
    _interrupt([runner], grace_s, lambda: ended.append(True))
    assert runner.stop.is_set()
    assert runner.hurry.is_set() == (grace_s is not None)
    assert ended == [True] * at_once
    assert told == [("interrupt_requested", ["without_checkpoint"] * at_once)]
    _interrupt([runner], grace_s, lambda: ended.append(True))
    assert len(ended) == at_once + 1, "a second signal ends it at once"


def test_signals_stop_every_run_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.Timer.start", lambda self: None)

    def full(kind: str, **fields: Any) -> None:
        raise OSError("no space left on device")

    ended: list[bool] = []
    runners: Any = [
        SimpleNamespace(stop=asyncio.Event(), hurry=asyncio.Event(), reporter=SimpleNamespace(event=full)) for _ in range(2)
    ]
    _interrupt(runners, None, lambda: ended.append(True))
    assert (all(runner.stop.is_set() for runner in runners), ended) == (True, [])
    _interrupt(runners, None, lambda: ended.append(True))
    assert ended == [True]


def test_a_run_alone_has_one_store(tmp_path: Path) -> None:
    found, made = stores({"": config(tmp_path, {"t": TINY})})
    assert made == [(0, WeightStore)]
    assert (found[""].weights, found[""].board, found[""].average, dict(found[""].teacher_weights)) == (0, None, None, {})


def test_an_average_has_a_store_of_its_own(tmp_path: Path) -> None:
    teacher = {"type": "self", "every": 1, "prompt_template": "{prompt}!"}
    found, made = stores({"": config(tmp_path, {"me": teacher}, rollout={"sampler": "student"}, loss={"type": "forward_kl"})})
    assert [kind for _, kind in made] == [WeightStore, WeightStore]
    assert (found[""].weights, found[""].average, dict(found[""].teacher_weights)) == (0, 1, {"me": 1})


def test_peers_teach_by_each_others_stores(tmp_path: Path) -> None:
    ensemble = {"rollout": {"teachers": {"type": "ensemble"}}, "loss": {"type": "forward_kl"}}
    main = config(tmp_path, PEERS, **ensemble)
    found, _ = stores({"": main} | peer_configs(main, {"ada": "a", "bob": "b"}, "s"))
    own = {name: each.weights for name, each in found.items()}
    assert len(set(own.values())) == 3
    assert dict(found[""].teacher_weights) == {"ada": own["ada"], "bob": own["bob"]}
    assert dict(found["ada"].teacher_weights) == {"student": own[""], "bob": own["bob"]}
    assert dict(found["bob"].teacher_weights) == {"student": own[""], "ada": own["ada"]}


def test_a_board_is_made_where_a_pool_that_runs_is_autoscaled(tmp_path: Path) -> None:
    scaling = {"autoscaling": {"max_replicas": 2}}
    _, made = stores({"": config(tmp_path, {"t": TINY | scaling})})
    assert (1, ScalingBoard) in made
    # Without sampler=student there is no such pool.
    _, made = stores({"": config(tmp_path, {"t": TINY}, rollout={"pool": scaling})})
    assert made == [(0, WeightStore)]
    by_student = {"rollout": {"pool": scaling, "sampler": "student"}, "loss": {"type": "forward_kl"}}
    _, made = stores({"": config(tmp_path, {"t": TINY}, **by_student)})
    assert (1, ScalingBoard) in made


async def test_a_control_waits_until_all_others_are_measured() -> None:
    beside = ConcurrentRuns(["", "ada", "bob"])
    beside.ranks_start("", list)
    beside.ranks_start("ada", lambda: ["the student ranks"])
    beside.ranks_start("ada", lambda: ["the student ranks"])
    assert beside.rank_groups == 2
    beside.ranks_end("")
    beside.ranks_end("bob")
    assert beside.rank_groups == 1
    waiting = asyncio.ensure_future(beside.others_measured(""))
    for run in ("", "ada"):
        beside.measured(run)
        await turns(3)
        assert not waiting.done()
    beside.measured("bob")
    await asyncio.wait_for(waiting, 1.0)
    await asyncio.wait_for(ConcurrentRuns([""]).others_measured(""), 1.0)


async def test_ranks_stay_until_all_runs_have_ended() -> None:
    beside = ConcurrentRuns(["", "ada"])
    beside.ended("ada")
    waiting = asyncio.ensure_future(beside.others_ended("ada"))
    await turns(3)
    assert not waiting.done()
    beside.ended("")
    await asyncio.wait_for(waiting, 1.0)
    await asyncio.wait_for(beside.others_ended(""), 1.0)


class StubRunner:
    """A run whose loop waits for an answer that never comes."""

    def __init__(self, reporter: Any) -> None:
        self.reporter = reporter

    async def run(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError


async def test_runs_of_which_none_advances_end_with_the_reason(tmp_path: Path) -> None:
    async def holds() -> None:
        await asyncio.Event().wait()

    events: list[str] = []
    reporter = SimpleNamespace(event=lambda kind, **fields: events.append(kind))
    beside = ConcurrentRuns([""])
    beside.ranks_start("", lambda: ["the student ranks, to finish `train` since 9 s"])
    pool: Any = SimpleNamespace(waits_for=lambda: ["pool main"], answered_at=7.0, awaited=lambda sample_ids: None)
    far: Any = SimpleNamespace(name="far")
    pools = Pools(sampler=pool, scorer=None, all=[pool], others=[far])
    beside.pools_serve(pools)
    assert beside.waits_for()[1:] == ["pool main"]
    pools.awaited([3, 4])
    assert beside.answered_at == 7.0
    with Watchdog(0.2, 60.0, tmp_path) as watchdog:
        watchdog.waits_for, watchdog.on_event = beside.waits_for, reporter.event
        lease: Any = SimpleNamespace(watch=holds)
        runners: Any = {"": StubRunner(reporter)}
        with pytest.raises(
            TrainingError,
            match="waits for the student ranks, to finish `train` since 9 s; pool main; 2 rollouts, of which far may",
        ):
            await asyncio.wait_for(_all_of(runners, lease, watchdog, beside.actors), 20)
    assert events == ["run_stuck", "failed"]


class Alive:
    """An actor that answers; `dead` does not."""

    def __init__(self, dead: bool = False) -> None:
        self.dead = dead

    async def __ray_ready__(self) -> None:
        if self.dead:
            raise ActorDiedError


async def holds() -> None:
    await asyncio.Event().wait()


class CallsTheDead:
    """A run that meets a lost actor by a call."""

    def __init__(self, reporter: Any, calls: bool) -> None:
        self.reporter = reporter
        self._calls = calls

    async def run(self) -> dict[str, Any]:
        if self._calls:
            raise ActorDiedError
        await holds()
        raise AssertionError


@pytest.mark.parametrize("calls", [True, False])
async def test_a_lost_actor_ends_the_run_and_is_named_even_if_nobody_calls_it(calls: bool) -> None:
    events: list[tuple[str, str]] = []
    reporter = SimpleNamespace(event=lambda kind, reason: events.append((kind, reason)))
    beside = ConcurrentRuns([""])
    beside.actors.add("the mailbox", Handle(Alive(dead=True)))
    beside.actors.add("the store", Handle(Alive()))
    still: Any = SimpleNamespace(watch=holds, must_end=lambda what, **_: None)
    runners: Any = {"": CallsTheDead(reporter, calls)}
    with pytest.raises(TrainingError, match="the mailbox is gone"):
        await asyncio.wait_for(_all_of(runners, still, still, beside.actors), 20)
    beside.actors.close()
    ((kind, reason),) = events
    assert kind == "failed"
    assert "the mailbox is gone" in reason


async def test_an_error_of_an_actor_that_is_not_the_runs_own_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_runs, "_NAMED_S", 0.1)
    reporter = SimpleNamespace(event=lambda kind, reason: None)
    beside = ConcurrentRuns([""])
    still: Any = SimpleNamespace(watch=holds, must_end=lambda what, **_: None)
    runners: Any = {"": CallsTheDead(reporter, calls=True)}
    told = r"^a process of the run was lost: [^\n]+; continue from the last checkpoint with --resume$"
    with pytest.raises(TrainingError, match=told):
        await asyncio.wait_for(_all_of(runners, still, still, beside.actors), 20)


async def test_ranks_stay_until_the_last_of_the_runs_has_ended_or_is_stopped() -> None:
    beside = ConcurrentRuns(["one", "two", "three"])
    runs: Any = [SimpleNamespace(_beside=beside, _name=name, stop=asyncio.Event()) for name in ("one", "two", "three")]
    waiting = [asyncio.create_task(Runner._await_others(run)) for run in runs[:2]]
    await turns(5)
    assert not any(task.done() for task in waiting)
    runs[0].stop.set()
    await asyncio.wait_for(waiting[0], 5)
    await asyncio.wait_for(Runner._await_others(runs[2]), 5)
    await asyncio.wait_for(waiting[1], 5)


@pytest.mark.parametrize(("error", "code"), [(None, 1), (Interrupted("asked to"), 130), (TrainingError("lost"), 1)])
async def test_the_end_of_the_runs_has_a_deadline_from_their_first_failure_on(error: Exception | None, code: int) -> None:
    told: list[tuple[str, int]] = []

    class Ends:
        reporter = SimpleNamespace(event=lambda kind, reason: told.append((kind, 0)))

        async def run(self) -> dict[str, Any]:
            if error is not None:
                raise error
            return {}

    lease: Any = SimpleNamespace(watch=holds)
    watchdog: Any = SimpleNamespace(watch=holds, must_end=lambda what, exit_code=1: told.append((what, exit_code)))
    runners: Any = {"": Ends()}
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        await asyncio.wait_for(_all_of(runners, lease, watchdog, ConcurrentRuns([""]).actors), 20)
    # Before anything is written: the file system of the run's folder may be what hangs.
    assert told[0] == (peer_runs._CLOSING, code)
