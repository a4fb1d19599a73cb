"""Watch over a whole run: one that does not advance says who waits for whom, and ends, although every part looks alive.

The parts have deadlines of their own, which are shorter and know a way on. This is the last one, for what they do not see. It
also bounds what has no deadline of its own: the connection to a cluster, and the end of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from kdray.errors import TrainingError, ended_with
from kdray.rollouts.race import first_of

Result = TypeVar("Result")

STACKS = "stuck.txt"
"""File in the run's `logs/`: what was waited for, and the stack of every task and thread."""

logger = logging.getLogger(__name__)

_WRITE_S = 5.0
"""Longest time for writing down why a run ends: its file system or terminal may be what hangs."""
_RESUME = "continue from the last checkpoint with --resume"
_FRAMES = 4
"""Innermost calls of a thread that are named."""


@dataclass(frozen=True)
class _Countdown:
    """Part of the process that has to end in time."""

    what: str
    limit_s: float
    over_at: float
    exit_code: int


class Watchdog:
    """Thread that ends a run without progress; a context manager around the run and its teardown.

    A thread, since the event loop itself may stand still. `watch` ends the run by an error; if the process is still there after
    `grace_s`, because what hangs cannot be shut down either, it is ended with exit code 1.
    """

    def __init__(self, limit_s: float, grace_s: float, logs: Path, remedy: str = _RESUME) -> None:
        """Args: limit_s: longest time without progress; grace_s: longest teardown; logs: folder of STACKS; remedy: what to do
        once it has ended."""
        self.advanced_at: Callable[[], float] = lambda: 0.0
        """Returns the time of the latest progress, by `time.monotonic`."""
        self.waits_for: Callable[[], Sequence[str]] = list
        """Returns who is waited for, a line each."""
        self.on_event: Callable[..., None] = lambda kind, **fields: None
        self._limit_s = limit_s
        self._grace_s = grace_s
        self._logs = logs
        self._remedy = remedy
        self._over = threading.Event()
        self._stuck: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._began = time.monotonic()
        self._countdown: _Countdown | None = None

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()

    async def watch(self) -> None:
        """Wait without end. Raises: TrainingError naming who is waited for, once the run has not advanced for too long."""
        self._began = time.monotonic()
        self._stuck = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        await self._stuck

    async def over(self, work: Awaitable[Result]) -> Result:
        """Return the result of work. Raises: TrainingError as in `watch`, once the work has been cancelled and has ended."""
        return await first_of(work, self.watch(), clean_up_s=self._grace_s)

    def heard(self) -> None:
        """Note progress beside that of `advanced_at`."""
        self._began = time.monotonic()

    def must_end(self, what: str, within_s: float | None = None, exit_code: int = 1) -> None:
        """End the process with `exit_code` if `what` lasts too long: until `ended`, the next `must_end`, or the block's end.

        Args: what: a noun with its article; within_s: None is `grace_s`.
        """
        limit_s = self._grace_s if within_s is None else within_s
        self._countdown = _Countdown(what, limit_s, time.monotonic() + limit_s, exit_code)

    def before_closing(
        self, what: str, within_s: float | None = None
    ) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
        """For `ExitStack.push`: `what` must end, from when the stack begins to close what it opened earlier.

        The exit code is that of the error which ends the block. Without one it is 1: the caller has not got its result yet.
        """

        def begin(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
            self.must_end(what, within_s, ended_with(error) or 1)

        return begin

    def ended(self) -> None:
        """Stop the countdown of `must_end`: what follows has deadlines of its own."""
        self._countdown = None

    # ------------------------------------------------------------------------------------------------------ inside

    def _run(self) -> None:
        told = False
        while not self._over.wait(min(5.0, self._limit_s / 10, self._grace_s / 10)):
            countdown = self._countdown
            if countdown is not None and time.monotonic() > countdown.over_at:
                _in_daemon_thread(self._tell_end, countdown)
                os._exit(countdown.exit_code)
            # Before `watch` there is no run yet: waiting for room, say, has its own limit.
            if not told and self._loop is not None and self._idle_s() > self._limit_s:
                told = True
                self.must_end("the end of a run that hangs")
                with contextlib.suppress(RuntimeError):
                    # The loop may have been closed: the run is at its end, and hangs there.
                    self._loop.call_soon_threadsafe(self._end)

    def _idle_s(self) -> float:
        return time.monotonic() - max(self._began, self.advanced_at())

    def _end(self) -> None:
        """Write down who waits for whom, and end `watch` with that."""
        waits = list(self.waits_for())
        for line in waits:
            logger.error("the run does not advance; it waits for %s", line)
        # Not in the thread that writes: it sees no tasks.
        _in_daemon_thread(self._write, [*waits, *_stacks_of_tasks()])
        idle_s = round(self._idle_s(), 1)
        found = "; ".join(waits) or "nothing that it knows of"
        assert self._stuck is not None
        if not self._stuck.done():
            reason = (
                f"no step and no answer for {idle_s:.0f} s (cluster.stuck_run_after_s={self._limit_s:g}). The run waits for "
                f"{found}. {self._logs / STACKS} has the stacks; {self._remedy}"
            )
            self._stuck.set_exception(TrainingError(reason))
        # Last: a full disk must not keep the run from ending.
        self.on_event("run_stuck", idle_s=idle_s, waits_for=waits)

    def _tell_end(self, countdown: _Countdown) -> None:
        """Say why the process ends, on the terminal and in the file."""
        waits = [*self.waits_for(), *_waiting_threads()]
        reason = (
            f"{countdown.what} lasted longer than {countdown.limit_s:.0f} s, and could not be shut down: the process ends with "
            f"{countdown.exit_code}; it waits for"
        )
        with contextlib.suppress(OSError):
            print("\n  ".join([f"kdray: {reason}", *waits]), file=sys.stderr, flush=True)
        # A run that has not begun has no folder, and leaves none.
        if self._loop is not None:
            self._write([reason, *waits])

    def _write(self, lines: Sequence[str]) -> None:
        """Append lines and the stacks of all threads to the file. One that cannot be written is no reason to go on."""
        with contextlib.suppress(OSError):
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / STACKS).open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in (time.strftime("%Y-%m-%d %H:%M:%S"), *lines)))
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)


def _in_daemon_thread(function: Callable[..., None], *arguments: object) -> None:
    """Call what writes, but go on after `_WRITE_S`: it may never return."""
    thread = threading.Thread(target=function, args=arguments, name="watchdog's words", daemon=True)
    thread.start()
    thread.join(_WRITE_S)


def _stacks_of_tasks() -> list[str]:
    found = []
    for task in asyncio.all_tasks():
        stack = io.StringIO()
        task.print_stack(file=stack)
        found.append(stack.getvalue().rstrip("\n"))
    return found


def _waiting_threads() -> list[str]:
    """Threads that the interpreter waits for at its end, and the innermost calls of each, a line each."""
    frames = sys._current_frames()
    found = []
    for thread in threading.enumerate():
        if not thread.daemon and thread.ident in frames:
            calls = [
                f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{line})"
                for frame, line in traceback.walk_stack(frames[thread.ident])
            ]
            found.append(f"thread {thread.name}, in {' < '.join(calls[:_FRAMES])}")
    return found
