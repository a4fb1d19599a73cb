"""Races between some work and what may end it early."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection
from typing import Any, TypeVar

Result = TypeVar("Result")


class Stopped(Exception):
    """The work was not done when what may end it came."""


async def first_of(work: Awaitable[Result], stop: Awaitable[Any], clean_up_s: float = 0.0) -> Result:
    """The result of `work`, unless `stop` ends before it; where both have ended, the work's counts.

    Work that is given up, here or because the caller is cancelled, is cancelled itself. A future given as `stop` stays the
    caller's, to be raced again.
    Args: clean_up_s: longest time that work which was given up is waited for.
    Raises: Stopped where `stop` ended first; what `stop` raised, where it failed; what `work` raised.
    """
    task, ending = asyncio.ensure_future(work), asyncio.ensure_future(stop)
    try:
        await asyncio.wait({task, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            ending.result()
            raise Stopped
        return task.result()
    finally:
        if ending is not stop:
            ending.cancel()
        if not task.done():
            task.cancel()
            if clean_up_s:
                await asyncio.wait({task}, timeout=clean_up_s)


async def all_of(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait until all have ended, or one has failed; they stay the caller's. Raises: what the failed one raised."""
    if tasks:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in ended:
            task.result()
