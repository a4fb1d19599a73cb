"""Interrupts of a run: SIGINT, SIGTERM and SIGHUP as calls in its event loop; and that loop, also inside a running one."""

from __future__ import annotations

import asyncio
import contextlib
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
