"""Actor handles and object references without Ray, for tests of code that calls actors."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.weights.store import WeightStore


class Handle:
    """An actor handle over an object of this process, whose methods are async."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.target, name)
        # An actor's method begins without being awaited.
        return type("Method", (), {"remote": staticmethod(lambda *given: asyncio.ensure_future(method(*given)))})


def reference(value: Any = None, error: Exception | None = None) -> asyncio.Future[Any]:
    """A reference to an object, or to one that is lost with an error."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
    return future


class ReportingStore(WeightStore):
    """A store that says when it was told of lost weights."""

    def __init__(self) -> None:
        super().__init__()
        self.reported = asyncio.Event()

    async def report_lost(self) -> None:
        await super().report_lost()
        self.reported.set()
