"""Interrupts of a run: SIGINT and SIGTERM, as calls in its event loop; and the loop itself, inside a running one too."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_ELSEWHERE: list[tuple[asyncio.AbstractEventLoop, Callable[[], object]]] = []
"""Interrupts of loops outside the main thread, which Python gives no signals."""


@contextlib.contextmanager
def on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` in the running loop for every SIGINT or SIGTERM that comes within the block.

    Outside the main thread, for every one that comes while the main thread waits in `run_coroutine`.
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
    for number in _NUMBERS:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in _NUMBERS:
            loop.remove_signal_handler(number)


def run_coroutine(work: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end, blocking: as `asyncio.run`, or in another thread where this one runs a loop, as a notebook does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdray") as thread, _signals_passed_on():
        return thread.submit(asyncio.run, work).result()


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Give signals that this thread gets to the loops outside it; other threads than the main one get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: object) -> None:
        for loop, act in _ELSEWHERE:
            loop.call_soon_threadsafe(act)

    before = {number: signal.signal(number, pass_on) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
