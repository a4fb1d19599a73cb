"""Watch over a whole run: one that does not advance says who waits for whom, and ends, although every part looks alive.

The parts have deadlines of their own, which are shorter and know a way on. This is the last one, for what they do not see.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from kdray.errors import TrainingError

STACKS = "stuck.txt"
"""File in the run's `logs/`: what was waited for, and the stack of every task and thread."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Thread that ends a run without progress; a context manager around the run and its teardown.

    A thread, since the event loop itself may stand still. `watch` ends the run by an error; if the process is still there after
    `grace_s`, because what hangs cannot be shut down either, it is ended with exit code 1.
    """

    def __init__(self, limit_s: float, grace_s: float, logs: Path) -> None:
        """Args: limit_s: longest time without progress; grace_s: longest teardown after that; logs: folder of STACKS."""
        self.advanced_at: Callable[[], float] = lambda: 0.0
        """Returns the time of the latest progress, by `time.monotonic`."""
        self.waits_for: Callable[[], Sequence[str]] = list
        """Returns who is waited for, a line each."""
        self.on_event: Callable[..., None] = lambda kind, **fields: None
        self._limit_s = limit_s
        self._grace_s = grace_s
        self._logs = logs
        self._over = threading.Event()
        self._stuck: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._began = time.monotonic()

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

    # ------------------------------------------------------------------------------------------------------ inside

    def _run(self) -> None:
        while not self._over.wait(min(5.0, self._limit_s / 10)):
            # Before `watch` there is no run yet: waiting for room, say, has its own limit.
            if self._loop is not None and self._idle_s() > self._limit_s:
                with contextlib.suppress(RuntimeError):
                    # The loop may have been closed: the run is at its end, and hangs there.
                    self._loop.call_soon_threadsafe(self._end)
                if not self._over.wait(self._grace_s):
                    self._write([f"the process could not be shut down within {self._grace_s:.0f} s"])
                    print("kdray: the run hangs, and could not be shut down: its process ends", file=sys.stderr, flush=True)
                    os._exit(1)
                return

    def _idle_s(self) -> float:
        return time.monotonic() - max(self._began, self.advanced_at())

    def _end(self) -> None:
        """Write down who waits for whom, and end `watch` with that."""
        waits = list(self.waits_for())
        for line in waits:
            logger.error("the run does not advance; it waits for %s", line)
        path = self._write(waits, with_tasks=True)
        idle_s = round(self._idle_s(), 1)
        found = "; ".join(waits) or "nothing that it knows of"
        assert self._stuck is not None
        if not self._stuck.done():
            reason = (
                f"no step and no answer for {idle_s:.0f} s (cluster.stuck_run_after_s={self._limit_s:g}). The run waits for "
                f"{found}. {path} has the stacks; continue from the last checkpoint with --resume"
            )
            self._stuck.set_exception(TrainingError(reason))
        # Last: a full disk must not keep the run from ending.
        self.on_event("run_stuck", idle_s=idle_s, waits_for=waits)

    def _write(self, lines: Sequence[str], with_tasks: bool = False) -> Path:
        """Append lines and stacks to the file; returns its path. A file that cannot be written is no reason to go on."""
        path = self._logs / STACKS
        with contextlib.suppress(OSError):
            self._logs.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in (time.strftime("%Y-%m-%d %H:%M:%S"), *lines)))
                if with_tasks:
                    for task in asyncio.all_tasks():
                        stack = io.StringIO()
                        task.print_stack(file=stack)
                        file.write(stack.getvalue())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        return path
