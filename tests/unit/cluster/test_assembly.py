"""The end of a run's pools, when what closes them hangs."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from actors.background_call import in_daemon_thread
from cluster.assembly import _closed


async def test_a_teardown_that_hangs_is_told_and_left() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    never = threading.Event()
    closing = {"main": in_daemon_thread(never.wait), "other": in_daemon_thread(lambda: None)}
    await asyncio.wait_for(_closed(closing, 0.2, lambda kind, **fields: events.append((kind, fields))), 30)
    assert events == [("teardown_stuck", {"waited_for": ["main"], "waited_s": 0.2})]
    never.set()


async def test_a_teardown_that_fails_does_not_hide_why_the_run_ends() -> None:
    def fail() -> None:
        raise RuntimeError("gone")

    events: list[str] = []
    await _closed({"main": in_daemon_thread(fail)}, 30, lambda kind, **fields: events.append(kind))
    assert not events
    await _closed({}, 30, lambda kind, **fields: events.append(kind))
