"""Interrupts of a run: SIGINT, SIGTERM and SIGHUP as calls in its event loop, and the time that is left after one; and that
loop, also inside a running one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ELSEWHERE: list[tuple[asyncio.AbstractEventLoop, Callable[[], object]]] = []
"""Interrupts of loops outside the main thread, to which Python delivers no signals."""


@contextlib.contextmanager
def on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` in the running loop for every SIGINT, SIGTERM or SIGHUP received within the block.

    SIGHUP, the end of the terminal, stays ignored where it is, as under nohup.
    Outside the main thread, for every one received while the main thread waits in `run_coroutine`.
    """
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        entry = (loop, act)
        _ELSEWHERE.append(entry)
        try:
            yield
        finally:
            _ELSEWHERE.remove(entry)
        return
    numbers = _heeded()
    for number in numbers:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class Grace:
    """Time between a signal to stop and the kill that follows it, at whose end this process ends whatever it does."""

    def __init__(self, seconds: float, tell: Callable[[str], object]) -> None:
        """Args: tell: called in a thread with the reason, if the time ran out."""
        self._seconds = seconds
        self._tell = tell

    def begin(self, time_to_stop: float) -> str | None:
        """Begin the time. Args: time_to_stop: expected, seconds. Returns: why there is no room for a checkpoint, if there is
        none."""
        usable = self._seconds - min(_LAST_S, _LAST_SHARE * self._seconds)
        # In another thread the process is somebody else's, as a notebook's.
        if threading.current_thread() is threading.main_thread():
            clock = threading.Timer(usable, self._end)
            clock.daemon = True
            clock.start()
        if time_to_stop <= usable * _FITS:
            return None
        return (
            f"the rest of the step and a checkpoint take about {time_to_stop:.0f} s, which do not fit into "
            f"cluster.grace_s={self._seconds:g}"
        )

    def _end(self) -> None:
        # The disk may be what hangs.
        telling = threading.Thread(target=self._tell, args=(f"cluster.grace_s={self._seconds:g} is over",), daemon=True)
        telling.start()
        telling.join(_TELL_S)
        os._exit(_INTERRUPTED)


_INTERRUPTED = 130
_LAST_S, _LAST_SHARE = 2.0, 0.1
"""Part of the time in which the process itself ends."""
_FITS = 0.8
"""Share of the time that the expected stop may take: the end of the pools comes after it."""
_TELL_S = 1.0


def _heeded() -> list[signal.Signals]:
    return [number for number in _NUMBERS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def run_coroutine(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to the end, blocking: as `asyncio.run`, or in another thread if this one runs a loop, as in a
    notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdray") as thread, _signals_passed_on():
        return thread.submit(asyncio.run, work).result()


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Forward this thread's signals to the loops outside it; only the main thread receives any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: object) -> None:
        for loop, act in _ELSEWHERE:
            loop.call_soon_threadsafe(act)

    before = {number: signal.signal(number, pass_on) for number in _heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
