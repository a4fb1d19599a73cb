"""The start and the end of a run's pools, when what they wait for hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from actors.background_call import in_daemon_thread
from cluster import assembly
from cluster.assembly import _closed, _served
from kdray.config import ClusterSettings
from kdray.errors import CapacityError, EngineError


async def test_a_teardown_that_hangs_is_told_and_left() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    never = threading.Event()
    closing = {"main": in_daemon_thread(never.wait), "other": in_daemon_thread(lambda: None)}
    await asyncio.wait_for(_closed(closing, 0.2, lambda kind, **fields: events.append((kind, fields))), 30)
    ((kind, found),) = events
    assert (kind, found["waited_for"], found["waited_s"]) == ("teardown_stuck", ["main"], pytest.approx(0.2, abs=5))
    assert found["reasons"] == {"main": "not closed within cluster.teardown_s=0.2"}
    never.set()


async def test_a_teardown_that_fails_is_told_and_does_not_hide_why_the_run_ends() -> None:
    def fail() -> None:
        # As Serve does by itself.
        raise TimeoutError("weren't deleted after 60s")

    events: list[tuple[str, dict[str, Any]]] = []
    closing = {"main": in_daemon_thread(fail), "other": in_daemon_thread(lambda: None)}
    await _closed(closing, 30, lambda kind, **fields: events.append((kind, fields)))
    ((kind, found),) = events
    assert (kind, found["waited_for"]) == ("teardown_stuck", ["main"])
    assert found["reasons"] == {"main": 'TimeoutError("weren\'t deleted after 60s")'}
    await _closed({}, 30, lambda kind, **fields: events.append((kind, fields)))
    assert len(events) == 1


class Pool:
    """A pool of which so many engines have failed; every look at it takes 20 ms of a clock of its own."""

    name = "main"

    def __init__(self, *failures: int) -> None:
        self._failures = list(failures)
        self.seconds = 0.0
        self.on_look: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.seconds

    async def watch_starts(self) -> int:
        self.seconds += 0.02
        self.on_look()
        return self._failures.pop(0) if len(self._failures) > 1 else self._failures[0]


async def start(
    monkeypatch: pytest.MonkeyPatch,
    pool: Pool,
    serves_after_s: float | None = None,
    placed: Exception | bool = True,
    **limits: float,
) -> list[tuple[str, dict[str, Any]]]:
    """Events of a start, by the pool's clock. Args: placed: whether its parts are, or why they cannot be."""
    monkeypatch.setattr(assembly, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(assembly, "_START_GRACE_S", 0.0)
    monkeypatch.setattr(assembly, "time", pool)
    loop = asyncio.get_running_loop()
    events: list[tuple[str, dict[str, Any]]] = []
    serving, placing = loop.create_future(), loop.create_future()

    def serve() -> None:
        if serves_after_s is not None and pool.seconds >= serves_after_s and not serving.done():
            serving.set_result(None)

    pool.on_look = serve
    if isinstance(placed, Exception):
        placing.set_exception(placed)
    elif placed:
        placing.set_result(None)
    settings = ClusterSettings(**{"start_timeout_s": 0.3, "wait_s": 0.0, **limits})
    work = _served(serving, placing, [pool], settings, lambda kind, **fields: events.append((kind, fields)))  # type: ignore[list-item]
    try:
        await asyncio.wait_for(work, 20)
    except EngineError as error:
        events.append(("error", {"reason": str(error)}))
    return events


async def test_a_start_that_hangs_ends_the_command_with_the_pool_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (stuck, found), (_, error) = await start(monkeypatch, Pool(0))
    assert (stuck, found["waited_for"]) == ("start_stuck", ["main"])
    assert found["waited_s"] == 0.3
    assert "replicas of main did not serve within" in error["reason"]
    assert "cluster.start_timeout_s=0.3" in error["reason"]


async def test_serve_s_controller_that_never_starts_a_replica_is_not_waited_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    events = await start(monkeypatch, Pool(0), placed=False)
    assert [kind for kind, _ in events] == ["start_stuck", "error"]


async def test_a_start_that_takes_long_enough_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await start(monkeypatch, Pool(0), serves_after_s=0.2) == []
    assert await start(monkeypatch, Pool(0), serves_after_s=0.6, placed=False, wait_s=10.0) == [], "nodes are still to come"


async def test_an_engine_that_fails_gives_the_next_one_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_later = Pool(*[0] * 10, 1)
    assert await start(monkeypatch, fails_later, serves_after_s=0.45) == []


async def test_parts_that_find_no_room_end_the_start_with_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapacityError, match="no room"):
        await start(monkeypatch, Pool(0), placed=CapacityError("no room"))
