"""Events read one line at a time: what is kept of many, and what is summed up."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from kdray.errors import DataError
from kdray.runs.folder import RunFolder
from kdray.runs.lines.events import FREQUENT, NEWEST, each_event, read_events


def write(path: Path, events: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def test_the_newest_of_frequent_kinds_stay_in_their_places(tmp_path: Path) -> None:
    many = [{"kind": "retry", "rollouts": 2, "number": number} for number in range(NEWEST + 7)]
    events = [{"kind": "start"}, *many[:-1], {"kind": "checkpoint"}, many[-1], {"no": "kind"}]
    found = read_events(write(tmp_path / "events.jsonl", events))
    assert found.kept == [{"kind": "start"}, *many[7:-1], {"kind": "checkpoint"}, many[-1], {"no": "kind"}]
    assert found.counts == {"start": 1, "retry": NEWEST + 7, "checkpoint": 1, "None": 1}
    assert found.rollouts == {"retry": 2 * (NEWEST + 7)}


def test_of_other_kinds_all_are_kept(tmp_path: Path) -> None:
    events = [{"kind": "checkpoint", "step": step} for step in range(2 * NEWEST)]
    assert "checkpoint" not in FREQUENT
    assert read_events(write(tmp_path / "events.jsonl", events)).kept == events


def test_no_file_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl").kept == []


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"a": "\xff"}'])
def test_a_line_that_cannot_be_read_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"kind": "start"}\n' + line + b'\n{"kind": "torn')
    with pytest.raises(DataError, match=r"events\.jsonl:2: "):
        read_events(tmp_path / "events.jsonl")


def test_memory_does_not_grow_with_calls(tmp_path: Path) -> None:
    """A hedge or a retry is an event a call: a run of 100,000 steps may have 400,000."""
    path = tmp_path / "events.jsonl"
    line = json.dumps(
        {"time": "2026-12-01T00:00:00.000+00:00", "kind": "hedge", "pool": "main", "call": "sample", "rollouts": 3}
    )
    path.write_text('{"kind": "start", "directory": "/here"}\n' + (line + "\n") * 50_000)
    tracemalloc.start()
    try:
        assert read_events(path).counts["hedge"] == 50_000
        assert [event["kind"] for event in each_event(path)][:2] == ["start", "hedge"]
        (tmp_path / "config.yaml").write_text(CONFIG)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        read_events(path)
        RunFolder(tmp_path).load_config()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 8 * 2**20, "all events are held at once: some 40 MiB"


CONFIG = """
run: {name: x}
student: {model: {type: tiny}}
teachers: {t: {model: {type: tiny}}}
"""
