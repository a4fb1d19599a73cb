"""Ray Serve's controller, standing still and dying, without Ray."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from actors import serve_controller
from actors.serve_controller import keep_alive, revive, start
from kdray.errors import KdrayError
from kdray.rollouts.race import once


class Cluster:
    """A Ray with one controller, which hangs until it is killed, or for ever."""

    def __init__(self, hangs: bool = False, heals: bool = True, runs: bool = True) -> None:
        self.hangs, self.heals, self.runs = hangs, heals, runs
        self.unavailable = 0
        self.slow = 0
        """Look-ups that take Ray too long."""
        self.killed: list[bool] = []
        self.asked = 0
        self.runtime_env: dict[str, Any] = {}
        self.gcs_address = "127.0.0.1:1"

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Cluster:
        return self

    def get_actor(self, name: str, namespace: str) -> Any:
        assert (name, namespace) == ("SERVE_CONTROLLER_ACTOR", "serve")
        if self.slow:
            self.slow -= 1
            raise GetTimeoutError("the GCS did not answer")
        if not self.runs:
            raise ValueError(name)
        return type("Handle", (), {"__ray_ready__": type("Method", (), {"remote": staticmethod(lambda: None)})})

    def get(self, reference: Any, timeout: float) -> None:
        self.asked += 1
        if self.unavailable:
            self.unavailable -= 1
            raise ActorUnavailableError("restarting", b"0" * 16)
        if self.hangs:
            time.sleep(timeout)
            raise GetTimeoutError

    def kill(self, handle: Any, no_restart: bool) -> None:
        self.killed.append(no_restart)
        self.hangs = not self.heals


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], Cluster]:
    def use(cluster: Cluster) -> Cluster:
        monkeypatch.setattr(serve_controller, "ray", cluster)
        monkeypatch.setattr(serve_controller, "_RESTARTS_S", 0.1)
        monkeypatch.setattr(serve_controller, "_ASK_EVERY_S", 0.01)
        return cluster

    return use


def test_one_that_answers_is_left_alone(on: Callable[[Cluster], Cluster]) -> None:
    cluster = on(Cluster())
    assert not revive(0.1)
    assert not cluster.killed
    assert not revive(0.1)


def test_where_serve_does_not_run_there_is_nobody_to_ask(on: Callable[[Cluster], Cluster]) -> None:
    cluster = on(Cluster(runs=False))
    assert not revive(0.1)
    assert cluster.asked == 0


def test_one_that_stands_still_is_killed_and_ray_restarts_it(on: Callable[[Cluster], Cluster]) -> None:
    cluster = on(Cluster(hangs=True))
    assert revive(0.1)
    # Killed for good, its pools would be gone, and those of other runs.
    assert cluster.killed == [False]
    assert not revive(0.1)


def test_one_that_restarts_already_is_waited_for(on: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = on(Cluster())
    cluster.unavailable = 1
    assert not revive(5.0)
    assert (cluster.asked, cluster.killed) == (2, [])


def test_one_that_does_not_come_back_is_said(on: Callable[[Cluster], Cluster]) -> None:
    on(Cluster(hangs=True, heals=False))
    with pytest.raises(KdrayError, match=r"cluster\.stuck_after_s=0\.1 s.*`serve shutdown`"):
        revive(0.1)


async def test_the_watch_tells_of_every_restart_and_goes_on(on: Callable[[Cluster], Cluster]) -> None:
    cluster = on(Cluster(hangs=True, heals=False))
    events: list[tuple[str, dict[str, Any]]] = []
    watching = asyncio.create_task(keep_alive(0.05, lambda kind, **fields: events.append((kind, fields))))
    await once(lambda: bool(events), 0.01)
    assert events[0][0] == "controller_stuck"
    cluster.heals = True
    await once(lambda: events[-1] == ("controller_restarted", {"silent_s": 0.05}), 0.01)
    watching.cancel()
    assert set(cluster.killed) == {False}


async def test_the_end_of_the_watch_ends_its_wait_and_restarts_nothing(
    on: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_controller, "_WAIT_S", 0.05)
    cluster = on(Cluster(hangs=True))

    def asks() -> bool:
        return any(thread.name == "revive" for thread in threading.enumerate())

    watching = asyncio.create_task(keep_alive(60.0, lambda kind, **fields: None))
    await once(lambda: cluster.asked > 1, 0.01)
    assert asks()
    watching.cancel()
    # Ray would wait for it when it is shut down.
    await asyncio.wait_for(once(lambda: not asks(), 0.01), 20)
    assert not cluster.killed


async def test_a_ray_that_is_slow_for_a_moment_does_not_end_the_watch(on: Callable[[Cluster], Cluster]) -> None:
    cluster = on(Cluster(hangs=True))
    cluster.slow = 3
    events: list[tuple[str, dict[str, Any]]] = []
    watching = asyncio.create_task(keep_alive(0.05, lambda kind, **fields: events.append((kind, fields))))
    await asyncio.wait_for(once(lambda: len(events) == 2, 0.01), 20)
    watching.cancel()
    (failed, found), (restarted, _) = events
    assert (failed, restarted) == ("watch_failed", "controller_restarted"), "told once"
    assert found["watched"] == "Ray Serve's controller"


@pytest.mark.parametrize(
    ("runtime_env", "runs", "apart"),
    [({}, False, False), ({"env_vars": {"A": "1"}}, True, False), ({"env_vars": {"A": "1"}}, False, True)],
    ids=["no job", "it runs", "job"],
)
def test_a_jobs_environment_is_kept_from_the_controller(
    on: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch, runtime_env: dict[str, Any], runs: bool, apart: bool
) -> None:
    commands: list[tuple[str, set[str]]] = []
    here: list[None] = []
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"A": "1"}}}')
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    monkeypatch.setattr(subprocess, "run", lambda command, env, **_: commands.append((command[-1], set(env))))
    monkeypatch.setattr(serve_controller, "start_here", lambda: here.append(None))
    on(Cluster(runs=runs)).runtime_env = runtime_env
    start()
    assert len(here) == 1
    assert [address for address, _ in commands] == ["127.0.0.1:1"] * apart
    for _, names in commands:
        assert "RAY_AUTH_TOKEN" in names
        assert "RAY_JOB_CONFIG_JSON_ENV_VAR" not in names


def test_why_serve_does_not_start_is_said(on: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_controller, "_APART", "raise SystemExit('no node answers')")
    on(Cluster(runs=False)).runtime_env = {"env_vars": {"A": "1"}}
    with pytest.raises(KdrayError, match="Ray Serve did not start: no node answers"):
        start()


def test_a_start_that_hangs_is_said(on: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    on(Cluster(runs=False))
    monkeypatch.setattr("ray.serve.start", lambda **_: never.wait(60))
    monkeypatch.setattr(serve_controller, "_STARTS_S", 0.2)
    with pytest.raises(KdrayError, match=r"Ray Serve did not start \(no result within 0\.2 s\): .*`serve shutdown`"):
        start()
    never.set()


def test_what_serve_says_of_its_start_is_kept(on: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("another version of Ray")

    on(Cluster(runs=False))
    monkeypatch.setattr("ray.serve.start", refuse)
    with pytest.raises(RuntimeError, match="another version of Ray"):
        start()
