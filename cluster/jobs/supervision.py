"""Supervision of a run: a process that starts it, and resumes it after a failure for as long as its steps advance.

The run is a process of its own, so that every way in which it may end is one that a resume gets past: an error, a kill, a loop
that stands still. Exit codes are the run's: 0, 2 and 130 end the supervision, 1 and any death by a signal are failures. A run
that had begun, and ends since something outside of it is away (a node, the storage, the cluster's head), is started again until
that is back.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from tenacity import RetryCallState, Retrying, retry_if_result, sleep_using_event

from kdray.errors import MAY_PASS, SUPERVISED

_INTERRUPTED = 130
_FIRST_WAIT_S = 10.0
_LONGEST_WAIT_S = 600.0
_LONGEST_ABSENCE_S = 86_400.0
"""Time without a step after which what is away counts as gone."""
_TAIL_BYTES = 2**16
_PR_SET_PDEATHSIG = 1


class Advance:
    """Decision to resume: a place in the run may fail once."""

    def __init__(self) -> None:
        self._failed_at: list[tuple[int, ...]] = []
        """Places of the failures since a run last came further than any before."""

    def may_resume(self, *place: int) -> bool:
        """Register a failure. Args: place: the newest step that was made, and of a phase in it; later ones are greater.

        Returns: False if there was a failure there already.
        """
        if place in self._failed_at:
            return False
        if all(place > earlier for earlier in self._failed_at):
            self._failed_at.clear()
        self._failed_at.append(place)
        return True

    @property
    def wait_s(self) -> float:
        """Time until the next start, longer with every failure that came no further."""
        return _growing(len(self._failed_at))


class Absence:
    """Decision to start again while something is away: for a day without a step."""

    def __init__(self) -> None:
        self._place: tuple[int, ...] = ()
        self._since = 0.0
        self._starts = 0

    def may_wait(self, now: float, *place: int) -> bool:
        """Register an end. Args: now: seconds; place: as for `Advance`."""
        if place > self._place or not self._starts:
            self._place, self._since, self._starts = place, now, 0
        self._starts += 1
        return now - self._since < _LONGEST_ABSENCE_S

    @property
    def wait_s(self) -> float:
        """Time until the next start, longer with every one in vain."""
        return _growing(self._starts)


def _growing(count: int) -> float:
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(count - 1, 16))


class Supervisor:
    """A run's process, its signals, and its starts."""

    def __init__(self, command: Sequence[str], run_folder: Path, tell: Callable[[str], object]) -> None:
        """Args: command: starts the run; `--resume` is added once it has a folder; tell: shows a line."""
        self._command = list(command)
        self._run_folder = run_folder
        self._tell = tell
        self._advance = Advance()
        self._absence = Absence()
        self._interrupted = threading.Event()
        self._run: subprocess.Popen[bytes] | None = None

    def supervise(self, resume: bool) -> int:
        """Run it to its end; returns the exit code. Args: resume: the first start continues an earlier run."""
        self._resume = resume
        numbers = [each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            code: int = Retrying(
                retry=retry_if_result(self._is_failure_to_resume),
                wait=lambda state: self._wait_s(_code_of(state)),
                sleep=sleep_using_event(self._interrupted),
                before_sleep=self._tell_wait,
            )(self._once)
            code = code - MAY_PASS if _may_pass(code) else code
            return code if code in (0, 2, _INTERRUPTED) else 1
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _once(self) -> int:
        """Start the run and wait for its end; returns its exit code, 130 if it was interrupted, negative for other signals."""
        if self._interrupted.is_set():
            return _INTERRUPTED
        flag = ["--resume"] if self._resume and "--resume" not in self._command else []
        # Out of the terminal's foreground group: Ctrl-C comes here alone, and is passed on once.
        environment = os.environ | {SUPERVISED: "1"}
        self._run = subprocess.Popen([*self._command, *flag], process_group=0, preexec_fn=_end_with_parent, env=environment)
        if self._interrupted.is_set():
            self._run.send_signal(signal.SIGTERM)
        code = self._run.wait()
        return _INTERRUPTED if self._interrupted.is_set() and code < 0 else code

    def _is_failure_to_resume(self, code: int) -> bool:
        if code in (0, 2, _INTERRUPTED) or self._interrupted.is_set():
            return False
        step = newest_step(self._run_folder)
        place = step, newest_step(self._run_folder, "phase_step")
        # A start that failed before it wrote its config is repeated as it was.
        self._resume = self._resume or (self._run_folder / "config.yaml").is_file()
        if _may_pass(code):
            # Before a run has begun, its settings are more likely wrong.
            if self._resume and not self._absence.may_wait(time.monotonic(), *place):
                self._tell(f"supervision: nothing was trained for {_LONGEST_ABSENCE_S / 3600:.0f} hours; it is not tried again")
                return False
            return self._resume
        if self._advance.may_resume(*place):
            return True
        self._tell(f"supervision: the run failed at step {step} once more, and is not resumed again")
        return False

    def _tell_wait(self, state: RetryCallState) -> None:
        code = _code_of(state)
        how = f"ended with {code}" if code > 0 else f"was ended by signal {-code}"
        if _may_pass(code):
            how = "ended as something that it needs is away"
        step, wait_s = newest_step(self._run_folder), self._wait_s(code)
        self._tell(f"supervision: the run {how} at step {step}; it is resumed in {wait_s:.0f} s")

    def _wait_s(self, code: int) -> float:
        return self._absence.wait_s if _may_pass(code) else self._advance.wait_s

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._interrupted.set()
        if self._run is not None and self._run.poll() is None:
            self._run.send_signal(number)


def _code_of(state: RetryCallState) -> int:
    assert state.outcome is not None
    code: int = state.outcome.result()
    return code


def _may_pass(code: int) -> bool:
    return code - MAY_PASS in (1, 2)


def supervise_command(arguments: Sequence[str], run_folder: Path, resume: bool, tell: Callable[[str], object]) -> int:
    """Supervise the command `kdray` with these arguments; returns the exit code."""
    return Supervisor([sys.executable, "-m", "cluster.cli", *arguments], run_folder, tell).supervise(resume)


def newest_step(run_folder: Path, key: str = "step") -> int:
    """Newest step that a run has made, or number of its newest checkpoint if that is higher, as in fine-tuning; 0 without.

    Args: key: `phase_step` for the newest checkpoint's step in a supervised phase; 0 if it is in none.
    """
    # Lines of metrics have no step of a supervised phase.
    made = _last(run_folder / "metrics.jsonl", lambda line: True, key)
    return max(made, _last(run_folder / "events.jsonl", _is_checkpoint, key))


def _is_checkpoint(line: dict[str, object]) -> bool:
    return line.get("kind") == "checkpoint"


def _last(path: Path, counts: Callable[[dict[str, object]], bool], key: str) -> int:
    """Number by this key in the last line that counts, near the end of a file of JSON lines; 0 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for text in reversed(lines):
        try:
            line = json.loads(text)
        except ValueError:
            # The kill may have cut the last line, and the tail the first.
            continue
        if isinstance(line, dict) and counts(line):
            found = line.get(key)
            return found if isinstance(found, int) else 0
    return 0


def _end_with_parent() -> None:
    """Let the system end this process if the supervisor is killed: a job that is stopped must not leave its run behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
