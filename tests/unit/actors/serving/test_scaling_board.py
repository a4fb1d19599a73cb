"""The board of autoscaling: what the driver, the replicas and the policy tell each other through it."""

from __future__ import annotations

import pytest

from actors.serving import scaling_board
from actors.serving.scaling_board import ScalingBoard


async def test_waits_are_counted_by_pool_from_when_they_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(scaling_board.time, "monotonic", lambda: now)
    board = ScalingBoard()
    assert await board.waiting("a") == 0.0
    await board.note_waiting("a", 2.0)
    now += 3.0
    assert (await board.waiting("a"), await board.waiting("b")) == (5.0, 0.0)
    await board.note_waiting("a", None)
    now += 4.0
    assert await board.waiting("a") == 5.0
    now += 100.0
    assert await board.waiting("a") == 0.0, "older than the window"


async def test_the_newest_size_counts() -> None:
    board = ScalingBoard()
    assert await board.target("a") is None
    await board.note_target("a", 2, "the trainer waited")
    await board.note_target("a", 3, "a request has queued")
    assert (await board.target("a"), await board.target("b")) == ((3, "a request has queued"), None)
