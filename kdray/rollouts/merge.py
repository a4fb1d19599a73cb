"""Merging of asynchronous streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Hashable
from contextlib import aclosing
from typing import Generic, NamedTuple, TypeVar

Tag = TypeVar("Tag", bound=Hashable)
Item = TypeVar("Item")


class _Ended(NamedTuple):
    error: Exception | None


class Merged(Generic[Tag, Item]):
    """Items of several streams, tagged with their stream, in order of arrival; streams may be added during iteration.

    `async with Merged() as merged: merged.add(tag, stream)`, then `async for tag, item in merged`. It ends once all streams
    have ended and raises the first failure of any; leaving the block closes streams that are still running.
    """

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[tuple[Tag, Item] | _Ended] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0

    def add(self, tag: Tag, stream: AsyncGenerator[Item]) -> None:
        """Add a stream to the merge."""
        self._running += 1
        self._tasks.add(asyncio.create_task(self._read(tag, stream)))

    def watch(self, work: Awaitable[None]) -> None:
        """End the merge if `work` fails; its success, or that it is still running, has no effect."""
        self._tasks.add(asyncio.create_task(self._guard(work)))

    async def __aenter__(self) -> Merged[Tag, Item]:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __aiter__(self) -> Merged[Tag, Item]:
        return self

    async def __anext__(self) -> tuple[Tag, Item]:
        while self._running:
            arrived = await self._arrived.get()
            if not isinstance(arrived, _Ended):
                return arrived
            if arrived.error is not None:
                raise arrived.error
            self._running -= 1
        raise StopAsyncIteration

    async def _read(self, tag: Tag, stream: AsyncGenerator[Item]) -> None:
        error = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    self._arrived.put_nowait((tag, item))
        except Exception as failure:
            error = failure
        self._arrived.put_nowait(_Ended(error))

    async def _guard(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            self._arrived.put_nowait(_Ended(error))
