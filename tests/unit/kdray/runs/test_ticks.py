"""What goes on before a run shows itself is said at once, and again while it lasts."""

from __future__ import annotations

import re
import time

import pytest

from kdray.runs import ticks
from kdray.runs.ticks import Opening


def until(lines: list[str], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(lines) < count:
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)


def test_each_part_is_told_and_how_long_it_has_been_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticks, "EVERY_S", 0.05)
    lines: list[str] = []
    with Opening(lines.append) as opening:
        opening.begin("loading libraries")
        assert lines == ["loading libraries"], "at once"
        until(lines, 2)
        opening.begin("starting Ray")
        until(lines, 5)
        opening.begin(None)
        told = len(lines)
        time.sleep(0.2)
        assert len(lines) - told <= 1, "something else shows itself"
    assert re.fullmatch(r"still loading libraries: \d+ s", lines[1])
    assert "starting Ray" in lines
    assert re.fullmatch(r"still starting Ray: \d+ s", lines[-1])


def test_a_command_with_an_output_of_its_own_tells_only_what_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticks, "EVERY_S", 0.05)
    lines: list[str] = []
    with Opening(lines.append, announce=False) as opening:
        opening.begin("checking models and data")
        assert lines == []
        until(lines, 1)
    assert all(re.fullmatch(r"still checking models and data: \d+ s", line) for line in lines)
