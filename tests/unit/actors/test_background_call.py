"""Blocking calls of the driver: none of them keeps its process alive."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.background_call import in_daemon_thread
from actors.serving import pool as pools
from actors.serving.pool import ReplicaPool
from actors.serving.spec import EngineSpec, RunHandles
from cluster.planning import reservation
from cluster.planning.placement import Bundle
from cluster.planning.reservation import await_placed
from kdray.config import ClusterSettings, VLLMTeacherSettings

ROOT = Path(__file__).parents[3]


async def test_the_result_or_the_error_of_a_call_comes_back() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    assert await in_daemon_thread(divmod, 7, 3) == (2, 1)
    with pytest.raises(ValueError, match="wrong"):
        await in_daemon_thread(fail)


def test_a_loop_ends_without_a_call_that_hangs() -> None:
    never = threading.Event()

    async def leave() -> None:
        in_daemon_thread(never.wait, 30)
        await asyncio.sleep(0)

    began = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - began < 20
    never.set()


async def test_serve_and_ray_are_asked_in_such_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    daemons: list[bool] = []

    def note(value: Any) -> Any:
        daemons.append(threading.current_thread().daemon)
        return value

    monkeypatch.setattr(pools, "applications", lambda: note({}))
    spec = EngineSpec("mixture", "m", "s", 5, (4,), 64, teacher="t")
    settings = VLLMTeacherSettings.model_validate({"model": "m"})
    await ReplicaPool("t", spec, settings, ClusterSettings(), RunHandles(), 0)._watch()
    assert daemons == [True]
    monkeypatch.setattr(reservation, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": lambda _: asyncio.sleep(0)}))
    monkeypatch.setattr(reservation, "_missing", lambda waiting: note(None))
    unplaced = [[Bundle("teacher a", "teachers.a.replicas", 1, {"CPU": 4.0})], []]
    await await_placed(lambda: note(unplaced.pop(0)), ClusterSettings(), lambda kind, **_: None)
    assert daemons == [True] * 4


def test_the_driver_leaves_nothing_to_an_executor_that_asyncio_waits_for() -> None:
    drivers = [path for path in (ROOT / "cluster").rglob("*.py") if path.parent.name != "diagnosis"]
    drivers += [ROOT / "actors/serving/pool.py", ROOT / "actors/student/group.py", ROOT / "actors/serve_controller.py"]
    assert [path.name for path in drivers if "to_thread(" in path.read_text(encoding="utf-8")] == []
