"""Records of finished requests on the engine's side, read from its workers in few calls.

A call comes between two forward passes and delays the next one by about a millisecond, however many records it fetches.
Requests end one by one, so those that end close to each other share a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from actors.vllm_plugin.record_table import Passes, Record, read_records

EVERY_S = 0.03
"""Shortest time from one call to the next."""

Wanted = tuple[str, int]
"""Key of a request, and the number of its positions."""


class RecordReader:
    """Reader of the records of one engine. All calls belong to one asyncio loop."""

    def __init__(self, call: Callable[..., Awaitable[list[Any]]]) -> None:
        """Args: call: calls a method of `WorkerExtension` on all workers, and returns their answers in the order of ranks."""
        self._call = call
        self._waiting: list[tuple[Wanted, asyncio.Future[Record]]] = []
        self._reading: asyncio.Task[None] | None = None
        self.passes = Passes()
        """Forward passes of the engine until the latest call."""

    async def read(self, wanted: Sequence[Wanted]) -> list[Record]:
        """Records of finished requests, in their order. Raises: the exception of the call that fetched them."""
        loop = asyncio.get_running_loop()
        records: list[asyncio.Future[Record]] = [loop.create_future() for _ in wanted]
        self._waiting += zip(wanted, records, strict=True)
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_all())
        return await asyncio.gather(*records)

    async def drop(self, keys: Sequence[str]) -> None:
        """Discard the records of requests that nobody will read."""
        await self._call("kdray_drop", keys)

    async def _read_all(self) -> None:
        try:
            while waiting := [(each, record) for each, record in self._waiting if not record.done()]:
                # Those that are done were given up by their readers, and the worker may have discarded their records.
                self._waiting = []
                await self._read_some(waiting)
                await asyncio.sleep(EVERY_S)
        finally:
            self._waiting, self._reading = [], None

    async def _read_some(self, waiting: Sequence[tuple[Wanted, asyncio.Future[Record]]]) -> None:
        try:
            # The first tensor-parallel rank's; the others record nothing.
            answer, *_ = await self._call("kdray_take", [each for each, _ in waiting])
            found, self.passes = read_records(answer)
            for (_, record), columns in zip(waiting, found, strict=True):
                if not record.done():
                    record.set_result(columns)
        except Exception as error:
            for _, record in waiting:
                if not record.done():
                    record.set_exception(error)
