"""Races between work and a signal to stop it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, TypeVar

from kdray.errors import first_reason

Result = TypeVar("Result")
Other = TypeVar("Other")


class Stopped(Exception):
    """The stop came before the work was done."""


async def first_of(work: Awaitable[Result], stop: Awaitable[Any], clean_up_s: float = 0.0) -> Result:
    """Return the result of `work`, unless `stop` ends before it; if both have ended, the result of `work` wins.

    Unfinished work is cancelled, as it is if the caller is cancelled. A future passed as `stop` is not cancelled, so that the
    caller can race it again.
    Args: clean_up_s: longest time to wait for cancelled work.
    Raises: Stopped if `stop` ended first; the exception of `stop`, if it failed; the exception of `work`.
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
    """Wait until all have ended or one has failed; none is cancelled. Raises: the exception of the failed one."""
    if tasks:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in ended:
            task.result()


async def both(one: Coroutine[Any, Any, Result], other: Coroutine[Any, Any, Other]) -> tuple[Result, Other]:
    """Return the results of two calls that run side by side. Raises: the first failure, which cancels the other."""
    try:
        async with asyncio.TaskGroup() as tasks:
            first, second = tasks.create_task(one), tasks.create_task(other)
    except BaseExceptionGroup as group:
        raise first_reason(group) from group
    return first.result(), second.result()


async def once(condition: Callable[[], bool], every_s: float) -> None:
    """Return once the condition holds, as seen every so many seconds: a signal to stop for `first_of`."""
    while not condition():  # noqa: ASYNC110 - such as a flag that another library sets
        await asyncio.sleep(every_s)
