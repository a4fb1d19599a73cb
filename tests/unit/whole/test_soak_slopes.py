"""The slope of a soak's series, and its verdict, on series that are made for it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.soak.leaks import installed, plant
from tests.soak.slopes import Slope, combined, slope
from tests.soak.soak import _EXPECTED, TOO_SHORT, Part, Planted, anonymous, report, report_planted, verdict

PERIOD_S = 5.0
ALLOWED = 6.0


FLAT = dict.fromkeys(_EXPECTED, 100.0)


def times(minutes: float) -> np.ndarray:
    return np.arange(0.0, 60 * minutes, PERIOD_S)


def noise(count: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    """Noise of which values that follow each other are alike, with an outlier now and then, as of memory that is in use for a
    moment."""
    draw = np.random.default_rng(seed)
    found = np.zeros(count)
    for index in range(1, count):
        found[index] = 0.7 * found[index - 1] + draw.normal(0.0, size)
    found[draw.random(count) < 0.02] += 40 * size
    return found


def fit(minutes: float, values: np.ndarray) -> Slope:
    found = slope(list(times(minutes)), list(values))
    assert found is not None
    return found


def test_a_flat_series_with_noise_and_outliers_is_flat() -> None:
    for seed in range(20):
        when = times(120)
        found = fit(120, 900.0 + noise(len(when), seed))
        assert not found.grows(ALLOWED)
        assert found.is_flat(ALLOWED)
        assert found.level == pytest.approx(900.0, abs=2.0)


def test_a_leak_of_a_mib_a_minute_is_found_in_minutes() -> None:
    for seed in range(20):
        when = times(10)
        found = fit(10, 900.0 + noise(len(when), seed, size=0.4) + when / 60.0)
        assert found.grows(ALLOWED)
        assert found.per_hour == pytest.approx(60.0, rel=0.35)


def test_a_leak_that_takes_two_weeks_to_matter_is_found_in_hours() -> None:
    # 12 MiB an hour, 4 GiB in two weeks: the stretches of before let 12 MiB pass.
    when = times(180)
    found = fit(180, 900.0 + noise(len(when)) + 12.0 * when / 3600)
    assert found.grows(ALLOWED)
    assert found.low < 12.0 < found.high


def test_a_step_at_the_start_is_no_growth() -> None:
    when = times(60)
    found = fit(60, 900.0 + noise(len(when)) + np.where(when < 400, 0.0, 50.0))
    assert not found.grows(ALLOWED)


def test_a_sawtooth_is_no_growth() -> None:
    when = times(120)
    found = fit(120, 900.0 + noise(len(when), size=0.1) + (when % 170.0) / 10.0)
    assert not found.grows(ALLOWED)


def test_a_short_noisy_series_is_neither() -> None:
    when = times(3)
    found = fit(3, 900.0 + noise(len(when), size=20.0))
    assert not found.grows(ALLOWED)
    assert not found.is_flat(ALLOWED)
    assert slope([0.0, 5.0, 10.0], [1.0, 1.0, 1.0]) is None


def test_what_comes_late_is_fitted_from_there() -> None:
    part = Part()
    for when in times(60):
        part.add(when, {"driver": 100.0} | ({"board": 30.0} if when > 1200 else {}))
    found, growing, undecided = verdict([part])
    assert (found["board"].per_hour, found["driver"].per_hour) == (0.0, 0.0)
    assert not growing
    assert not undecided


def test_parts_together_say_more_than_each() -> None:
    found = combined([Slope(10.0, 5.0, 15.0, 900.0), Slope(14.0, 9.0, 19.0, 950.0)])
    assert (found.per_hour, found.level) == (12.0, 950.0)
    assert found.high - found.low == pytest.approx(10.0 / 2**0.5)
    # A part without noise counts, and does not make the others' noise vanish into nothing.
    found = combined([Slope(0.0, 0.0, 0.0, 10.0), Slope(1.0, -50.0, 50.0, 10.0)])
    assert found.per_hour == pytest.approx(0.0, abs=1e-3)


def test_the_parts_of_a_resumed_soak_are_other_processes(capsys: pytest.CaptureFixture[str]) -> None:
    # The second start begins lower: together they would look like one that shrinks.
    parts = []
    for level in (950.0, 900.0):
        part = Part(steps=100)
        for when in times(30):
            part.add(when, FLAT | {"engine": level + 20.0 * when / 3600})
        parts.append(part)
    found, growing, _ = verdict(parts)
    assert found["engine"].per_hour == pytest.approx(20.0)
    assert growing == ["engine"]
    assert report(parts) == 1
    assert "engine                   " in capsys.readouterr().out


@pytest.mark.parametrize("leaks", [True, False])
def test_a_planted_leak_must_be_found(leaks: bool, capsys: pytest.CaptureFixture[str]) -> None:
    part = Part(steps=10)
    for when in times(10):
        part.add(when, FLAT | {"driver": 100.0 + (when / 60 if leaks else 0.0)})
    assert report_planted(Planted(["driver"], 10, 1.0), part) == (0 if leaks else 1)
    assert ("driver was found" in capsys.readouterr().out) is leaks
    assert report_planted(Planted(["driver", "shm"], 10, 1.0), part) == 1
    assert "/dev/shm was NOT FOUND" in capsys.readouterr().out
    assert report([part]) == (1 if leaks else 0)


def test_leaks_are_planted_in_processes_that_run_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDRAY_TEST_MARKER", "leaks")
    script = "import os, time; os.fork(); print('forked', flush=True); time.sleep(60)"
    with installed():
        command = [sys.executable, "-c", script]
        started = [subprocess.Popen([*command, role], stdout=subprocess.PIPE, text=True) for role in ("asked", "spared")]
        try:
            for process in started:
                assert process.stdout is not None
                assert [process.stdout.readline() for _ in range(2)] == ["forked\n"] * 2
            asked, spared = ([each.pid, *(child.pid for child in psutil.Process(each.pid).children())] for each in started)
            settled = {pid: anonymous(pid) for pid in (*asked, *spared)}
            plant({"asked": ["memory", "folder"]}, 300.0, tmp_path)
            wait_until(lambda: all(anonymous(pid) > settled[pid] + 15 for pid in asked))
            assert all(anonymous(pid) < settled[pid] + 5 for pid in spared)
            wait_until(lambda: 10 * 2**20 in [file.stat().st_size for file in tmp_path.glob("leak-*")])
        finally:
            for each in [child for process in started for child in psutil.Process(process.pid).children()]:
                each.kill()
            for process in started:
                process.kill()
                process.wait()
    assert "KDRAY_TEST_LEAKS" not in os.environ


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_cannot_be_told_or_was_not_found_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    long, short, without = Part(steps=10), Part(steps=10), Part(steps=10)
    for when in times(60):
        long.add(when, FLAT)
        without.add(when, {name: level for name, level in FLAT.items() if name != "rank"})
    for when, value in zip(times(3), noise(len(times(3)), size=20.0), strict=True):
        short.add(when, FLAT | {"driver": 100.0 + value})
    assert report([long]) == 0
    assert report([short]) == TOO_SHORT
    assert report([without]) == 1
    assert "not measured, or too seldom: rank" in capsys.readouterr().out


def test_a_part_that_grows_is_found_beside_one_that_does_not_move() -> None:
    parts = []
    for per_hour in (0.0, 60.0):
        part = Part(steps=100)
        for when, wobble in zip(times(30), noise(len(times(30)), seed=3), strict=True):
            part.add(when, FLAT | {"run folder": 100.0 + (per_hour * when / 3600 + 0.1 * wobble if per_hour else 0.0)})
        parts.append(part)
    assert verdict(parts)[1] == ["run folder"]


def test_memory_is_what_a_process_has_allocated_and_no_file_that_it_maps(tmp_path: Path) -> None:
    size = 64 * 2**20
    file = tmp_path / "library"
    file.write_bytes(b"x" * size)
    before = anonymous(os.getpid())
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[at] for at in range(0, size, mmap.PAGESIZE)) > 0
        assert anonymous(os.getpid()) - before < 8
    held = b"x" * size
    assert 56 < anonymous(os.getpid()) - before < 72
    del held
    with pytest.raises(psutil.NoSuchProcess):
        anonymous(2**22 + 1)
