"""Parts whose room others took after the reservation was let go are waited for, but not for ever. No Ray is started."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.planning import reservation
from cluster.planning.placement import Bundle, Node
from cluster.planning.reservation import await_placed
from kdray.config import ClusterSettings
from kdray.errors import CapacityError

TEACHER = Bundle("teacher a", "teachers.a.replicas", 1, {"CPU": 4.0})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass with each look, one a look."""
    seconds = [0.0]

    async def look(period_s: float) -> None:
        seconds[0] += period_s

    monkeypatch.setattr(reservation, "time", type("Clock", (), {"monotonic": staticmethod(lambda: seconds[0])}))
    monkeypatch.setattr(reservation.asyncio, "sleep", look)
    return seconds


def _free(monkeypatch: pytest.MonkeyPatch, cpus: float) -> None:
    monkeypatch.setattr(reservation, "free_nodes", lambda held: [Node({"CPU": cpus})])


def _wait(unplaced: Any, wait_s: float, events: list[tuple[str, dict[str, Any]]]) -> None:
    settings = ClusterSettings(wait_s=wait_s)
    asyncio.run(await_placed(unplaced, settings, lambda kind, **fields: events.append((kind, fields))))


@pytest.mark.parametrize(("wait_s", "ends_s"), [(100.0, 100), (0.0, 60)])
def test_who_waits_in_vain_ends_with_what_is_missing(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, wait_s: float, ends_s: float
) -> None:
    _free(monkeypatch, cpus=3)
    events: list[tuple[str, dict[str, Any]]] = []
    with pytest.raises(CapacityError, match=rf"^cluster.wait_s={wait_s:g}: .* teachers.a.replicas: .* needs 4 CPU .*--resume"):
        _wait(lambda: [TEACHER], wait_s, events)
    assert clock[0] == pytest.approx(ends_s, abs=2)
    assert [kind for kind, _ in events] == ["waiting_for_room"] * ((ends_s - 1) // 15)
    assert "teachers.a.replicas" in events[0][1]["missing"]


def test_where_there_is_room_a_slow_start_is_no_reason_to_end(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, cpus=4)
    events: list[tuple[str, dict[str, Any]]] = []
    _wait(lambda: [TEACHER] if clock[0] < 500 else [], 100.0, events)
    assert clock[0] >= 500
    assert not events


def test_room_that_comes_back_in_time_is_enough(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, cpus=0)
    events: list[tuple[str, dict[str, Any]]] = []
    _wait(lambda: [TEACHER] if clock[0] < 50 else [], 100.0, events)
    assert [fields["waited_s"] for _, fields in events] == [15, 30, 45]
