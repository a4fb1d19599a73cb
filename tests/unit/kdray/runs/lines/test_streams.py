"""Files of lines as streams: cut at a step, read in constant memory, damaged lines named."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdray.errors import DataError
from kdray.runs.ledger import NOT_FINITE, Ledger, ledger_line
from kdray.runs.lines.occurrences import Occurrences
from kdray.runs.lines.streams import drop_later_steps, drop_torn_line, end_of_step, next_step

numbers = st.integers(-3, 12)
rows = st.tuples(numbers, st.integers(1, 6)).map(lambda pair: [*range(pair[0], sum(pair))])


@given(st.lists(st.one_of(st.lists(numbers, max_size=5), rows)))
def test_occurrences_are_those_of_a_counter(added: list[list[int]]) -> None:
    found, wanted = Occurrences(), Counter(number for each in added for number in each)
    for each in added:
        assert found.add(each) == (each == [*range(each[0], each[0] + len(each))] if each else True)
    assert {number: times for begin, end, times in found.ranges() for number in range(begin, end)} == wanted
    assert [number for begin, end in found.missing(0, 10) for number in range(begin, end)] == [
        number for number in range(10) if not wanted[number]
    ]
    assert found.repeated == sum(times - 1 for times in wanted.values())
    assert found.total == sum(wanted.values())


def lines(path: Path, steps: list[int], torn: str = "") -> Path:
    path.write_text("".join(json.dumps({"step": step, "x": [step] * 3}) + "\n" for step in steps) + torn)
    return path


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("torn", ["", '{"step": 9, "x"', '{"step": 2, "x"'])
@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
def test_later_steps_are_cut_off(tmp_path: Path, step: int, kept: list[int], torn: str) -> None:
    path = lines(tmp_path / "x", [1, 2, 3, 4], torn)
    before = path.stat().st_ino
    drop_later_steps(path, step, lambda: None)
    assert steps_in(path) == kept
    assert path.stat().st_ino == before, "in place: the lines that stay are not written again"


def test_lines_in_another_order_are_kept_one_by_one(tmp_path: Path) -> None:
    path = lines(tmp_path / "x", [1, 3, 2, 4, 2], '{"st')
    with pytest.raises(DataError, match="the line of step 2 stands after that of step 3"):
        end_of_step(path, 2)
    drop_later_steps(path, 2, lambda: None)
    assert steps_in(path) == [1, 2, 2]


def test_a_driver_that_lost_the_run_cuts_nothing(tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("lost")

    for steps in ([1, 2, 3], [1, 3, 2]):
        path = lines(tmp_path / "x", steps)
        with pytest.raises(RuntimeError):
            drop_later_steps(path, 2, lost)
        assert steps_in(path) == steps
        assert [each.name for each in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("bad", ["{", '{"step": "1"}', "[1]", "{}", '{"step": 1, "x": [}'])
def test_a_damaged_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "x"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    for work in (lambda: end_of_step(path, 2), lambda: drop_later_steps(path, 2, lambda: None)):
        with pytest.raises(DataError, match=r"x:2: not valid JSON, or no line of this file: .*; remove the line"):
            work()


def test_the_next_line_is_read_at_its_place(tmp_path: Path) -> None:
    path = lines(tmp_path / "x", [1, 2], '{"step": 3}')
    end, last = end_of_step(path, 1)
    assert (last, next_step(path, end), next_step(path, end_of_step(path, 2)[0]), next_step(path, 10**6)) == (1, 2, None, None)


@pytest.mark.parametrize("tail", ["", "x", "x" * 3_000_000])
def test_a_torn_line_of_any_length_goes(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "x"
    for whole in ("", '{"step": 1}\n'):
        path.write_text(whole + tail)
        drop_torn_line(path)
        assert path.read_text() == whole
    drop_torn_line(tmp_path / "none")


def test_memory_does_not_grow_with_the_ledger(tmp_path: Path) -> None:
    """A resume and the count at the end, over 13 MB in which a line has 13 KB."""
    path, size, steps = tmp_path / "ledger.jsonl", 1024, 1200
    with path.open("w") as file:
        for step in range(1, steps + 1):
            ids = [*range((step - 1) * size, step * size)]
            dropped = dict.fromkeys(ids, NOT_FINITE) if step == 7 else None
            file.write(json.dumps(ledger_line(step, ids, dropped, {"tokens": [5] * size})) + "\n")
    ledger = Ledger(path)
    tracemalloc.start()
    try:
        ledger.truncate(steps - 10)
        assert ledger.not_finite_steps() == [7]
        assert ledger.check(steps - 10, size) == (0, 0)
        assert ledger.check(steps, size) == (10 * size, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 10e6
    assert peak < 1e6, f"{peak / 1e6:.1f} MB"
