"""Thread in which a tracker works that waits for a network or a disk, so that the run does not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdray.config import Config
from kdray.runs.tracking.trackers import Tracker

LONGEST = 10_000
"""Calls that may wait. A tracker that is so far behind will not catch up, and the calls take memory."""

PATIENCE_S = 90.0
"""Longest wait for the calls that are left when the run ends."""


class Background:
    """`Tracker` that passes its calls, in order, to another one in a daemon thread.

    An error of that tracker is raised by the next call, and its later calls are dropped.
    """

    def __init__(self, tracker: Tracker, longest: int = LONGEST, patience_s: float = PATIENCE_S) -> None:
        self._tracker = tracker
        self._patience_s = patience_s
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(longest)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="kdray-tracker", daemon=True)

    def start(self, config: Config, folder: Path) -> None:
        self._thread.start()
        self._pass(lambda: self._tracker.start(config, folder))

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        copy = dict(metrics)
        self._pass(lambda: self._tracker.log(step, copy, phase))

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        copy = dict(fields)
        self._pass(lambda: self._tracker.event(kind, copy))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Wait for what is left. Raises: TimeoutError if that takes longer than the patience."""
        self._pass(lambda: self._tracker.close(summary))
        self._pass(None)
        self._thread.join(self._patience_s)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(f"not done {self._patience_s:g} s after the end of the run; what is left is dropped")

    def _pass(self, call: Callable[[], None] | None) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            raise TimeoutError(f"{self._calls.maxsize} calls behind the run") from None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            # Raised in the run's thread, where `Trackers` reports it.
            except Exception as error:
                self._error = error
                return
