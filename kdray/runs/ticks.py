"""Signs of life while a run says nothing: every so often, what it is at and for how long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

EVERY_S = 10.0


class Ticks:
    """A thread that calls `tell` with what goes on and its seconds so far, whenever nothing was said for `EVERY_S`.

    `closed` ends it; a thread that is not closed does not keep the process alive.
    """

    def __init__(self, tell: Callable[[str, float], None]) -> None:
        self._tell = tell
        self._what: str | None = None
        self._since = self._said_at = monotonic()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kdray-ticks", daemon=True)
        self._thread.start()

    def begin(self, what: str | None) -> None:
        """Start an activity; None: nothing that a user would wait for."""
        with self._changed:
            self._what, self._since = what, monotonic()
            self._said_at = self._since
            self._changed.notify()

    def now(self, what: str) -> None:
        """Describe how far the current activity has come."""
        with self._changed:
            self._what = what

    def said(self) -> None:
        """Something was said."""
        with self._changed:
            self._said_at = monotonic()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        # `tell` may itself be the caller.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                silent = monotonic() - self._said_at
                if self._what is None or silent < EVERY_S:
                    self._changed.wait(None if self._what is None else EVERY_S - silent)
                    continue
                what, seconds = self._what, monotonic() - self._since
                self._said_at = monotonic()
            self._tell(what, seconds)


class Opening:
    """What goes on before a run shows itself, and for how long: a line for each part, and one every so often within it.

    Args: say: shows a line.
          announce: say also what begins, not only what goes on for long.
    """

    def __init__(self, say: Callable[[str], object], announce: bool = True) -> None:
        self._say, self._announce = say, announce
        self._ticks = Ticks(self._tick)

    def __enter__(self) -> Opening:
        return self

    def __exit__(self, *_: object) -> None:
        self._ticks.close()

    def begin(self, what: str | None) -> None:
        """From now on, this goes on; None: something that shows itself."""
        if what is not None and self._announce:
            self._say(what)
        self._ticks.begin(what)

    def _tick(self, what: str, seconds: float) -> None:
        self._say(f"still {what}: {seconds:.0f} s")
