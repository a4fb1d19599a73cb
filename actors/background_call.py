"""Blocking calls in a daemon thread that does not keep the process alive: next to an asyncio loop, or with a deadline.

`asyncio.to_thread` uses the loop's executor, which `asyncio.run` joins without a timeout: a call that waits for a cluster to
place something would keep a failed or interrupted run alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any


def in_daemon_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Run `function(*arguments)` in a daemon thread; the future resolves to its result or exception."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = function(*arguments)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):
            # The loop may be closed by now; then nobody waits for the result.
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name=getattr(function, "__name__", "call"), daemon=True).start()
    return future


def within(limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `function(*arguments)` in a daemon thread, and wait for its result; blocks.

    Raises: TimeoutError if there is none after `limit_s`, when the call goes on unwatched; what the function raises.
    """
    found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            found.put((function(*arguments), None))
        except BaseException as raised:
            found.put((None, raised))

    threading.Thread(target=work, name=getattr(function, "__name__", "call"), daemon=True).start()
    try:
        result, error = found.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError(f"no result within {limit_s:g} s") from None
    if error is not None:
        raise error
    return result
