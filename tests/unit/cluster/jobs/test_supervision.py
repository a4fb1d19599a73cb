"""A run that fails, is resumed by itself, and is left alone where a resume would not help. Runs are small scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.jobs import supervision
from cluster.jobs.supervision import Absence, Advance, Supervisor, newest_step
from kdray.errors import MAY_PASS

# Each start takes the next of the ends that it is given: the steps that it makes, then an exit code or a signal.
_RUN = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
starts = folder / "starts"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
    file.write(json.dumps(sys.argv[3:]) + "\\n")
step, end = json.loads(sys.argv[2])[number]
if step is not None:
    (folder / "config.yaml").touch()
if step:
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": step}) + "\\n" + '{"ste')
if end == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    (folder / "waits").touch()
    time.sleep(60)
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_FIRST_WAIT_S", 0.01)


def supervised(folder: Path, *ends: tuple[int | None, int], resume: bool = False) -> tuple[int, list[list[str]], list[str]]:
    """Exit code, the options of every start, and what was told."""
    told: list[str] = []
    command = [sys.executable, "-c", _RUN, str(folder), json.dumps(ends)]
    code = Supervisor(command, folder, told.append).supervise(resume)
    return code, [json.loads(line) for line in (folder / "starts").read_text().splitlines()], told


def test_a_run_is_resumed_while_its_steps_advance(tmp_path: Path) -> None:
    code, starts, told = supervised(tmp_path / "r", (3, 1), (5, -9), (9, 1), (12, 0))
    assert code == 0
    assert starts == [[], ["--resume"], ["--resume"], ["--resume"]]
    assert "ended with 1 at step 3" in told[0]
    assert "was ended by signal 9 at step 5" in told[1]


def test_a_step_that_fails_twice_ends_the_supervision_with_1(tmp_path: Path) -> None:
    code, starts, told = supervised(tmp_path / "r", (3, 1), (7, -11), (7, 1), (9, 0))
    assert (code, len(starts)) == (1, 3)
    assert told[-1] == "supervision: the run failed at step 7 once more, and is not resumed again"


def test_a_kill_that_repeats_is_a_failure_of_the_run_not_a_signal_of_the_user(tmp_path: Path) -> None:
    assert supervised(tmp_path / "r", (4, -9), (4, -9))[0] == 1


AWAY, OUTAGE = 2 + MAY_PASS, 1 + MAY_PASS
"""A node that is not there at a start; a storage that went away during the run."""


def test_a_run_waits_for_what_is_away_as_long_as_it_takes(tmp_path: Path) -> None:
    """The same step fails many times, and once for a reason of its own."""
    code, starts, told = supervised(tmp_path / "r", (3, OUTAGE), *[(3, AWAY)] * 5, (3, 1), (3, AWAY), (9, 0))
    assert (code, len(starts)) == (0, 9)
    assert told[0] == "supervision: the run ended as something that it needs is away at step 3; it is resumed in 0 s"
    assert "ended with 1 at step 3" in told[6]


@pytest.mark.parametrize(("end", "code"), [(AWAY, 2), (OUTAGE, 1)])
def test_what_is_away_when_a_run_would_begin_ends_it(tmp_path: Path, end: int, code: int) -> None:
    assert supervised(tmp_path / "r", (None, end), (9, 0))[:2] == (code, [[]])


def test_a_resume_waits_from_its_first_start_on(tmp_path: Path) -> None:
    """As a job that takes the place of one whose machine is gone: its lease is still there."""
    code, starts, _ = supervised(tmp_path / "r", (None, AWAY), (9, 0), resume=True)
    assert (code, starts) == (0, [["--resume"], ["--resume"]])


def test_what_stays_away_for_a_day_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_LONGEST_ABSENCE_S", 0.0)
    code, starts, told = supervised(tmp_path / "r", (3, 1), (3, AWAY), (9, 0))
    assert (code, len(starts)) == (2, 2)
    assert told[-1] == "supervision: nothing was trained for 0 hours; it is not tried again"


def test_an_absence_begins_anew_once_a_step_was_made() -> None:
    absence = Absence()
    day = supervision._LONGEST_ABSENCE_S
    assert absence.may_wait(0.0, 3, 0)
    waited = absence.wait_s
    assert absence.may_wait(0.9 * day, 3, 0)
    assert absence.wait_s > waited
    assert absence.may_wait(1.1 * day, 4, 0)
    assert absence.wait_s == waited
    assert not absence.may_wait(2.2 * day, 4, 0)


@pytest.mark.parametrize("code", [2, 130])
def test_a_wrong_setting_and_an_interrupt_are_not_resumed(tmp_path: Path, code: int) -> None:
    assert supervised(tmp_path / "r", (3, code), (9, 0))[:2] == (code, [[]])


def test_a_start_without_a_folder_is_repeated_as_it_was(tmp_path: Path) -> None:
    code, starts, _ = supervised(tmp_path / "r", (None, 1), (5, 1), (9, 0))
    assert (code, starts) == (0, [[], [], ["--resume"]])


def test_a_signal_reaches_the_run_once_and_ends_the_supervision(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    driver = (
        "import sys; from pathlib import Path; from cluster.jobs.supervision import Supervisor\n"
        "sys.exit(Supervisor(sys.argv[2:], Path(sys.argv[1]), print).supervise(False))"
    )
    command = [sys.executable, "-c", _RUN, str(folder), json.dumps([(3, "waits"), (9, 0)])]
    process = subprocess.Popen([sys.executable, "-c", driver, str(folder), *command])
    deadline = time.monotonic() + 30
    while not (folder / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 130
    assert len((folder / "starts").read_text().splitlines()) == 1


def test_a_step_that_failed_before_the_newest_may_not_fail_again_either() -> None:
    advance = Advance()
    assert [advance.may_resume(step) for step in (57, 55, 56)] == [True, True, True]
    waited = advance.wait_s
    assert not advance.may_resume(55)
    assert advance.may_resume(80), "the run came further than ever"
    assert advance.wait_s < waited
    assert advance.may_resume(55)


def test_a_supervised_phase_advances_without_a_step(tmp_path: Path) -> None:
    line = '{"kind": "checkpoint", "step": %d, "phase": "sft", "phase_step": %d}\n'
    places = []
    for phase_step in (50, 100, 100):
        (tmp_path / "events.jsonl").write_text(line % (0, phase_step))
        places.append((newest_step(tmp_path), newest_step(tmp_path, "phase_step")))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    places.append((newest_step(tmp_path), newest_step(tmp_path, "phase_step")))
    assert places == [(0, 50), (0, 100), (0, 100), (1, 100)]
    advance = Advance()
    assert [advance.may_resume(*place) for place in places] == [True, True, False, True]


def test_the_newest_step_is_read_from_files_that_a_kill_has_cut(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 8, "lo')
    assert newest_step(tmp_path) == 7
    (tmp_path / "events.jsonl").write_text('{"kind": "checkpoint", "step": 12}\n{"kind": "retry", "step": 99}\n')
    assert newest_step(tmp_path) == 12
