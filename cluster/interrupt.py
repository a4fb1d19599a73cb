"""Interrupts of a run: SIGINT and SIGTERM, as calls in its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` in the running loop for every SIGINT or SIGTERM that comes within the block."""
    loop = asyncio.get_running_loop()
    for number in _NUMBERS:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in _NUMBERS:
            loop.remove_signal_handler(number)
