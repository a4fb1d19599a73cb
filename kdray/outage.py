"""Whether a teacher can be asked now, and the wait for the moment when it cannot."""

from __future__ import annotations

import asyncio

from kdray.errors import TeacherGone


class Outage:
    """Begins with a reason when a teacher has no replica left that could answer, and ends when one serves again.

    A final one does not pass by itself: a replica that came back was turned away, and the next will be too.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._begun = asyncio.Event()
        self._final = asyncio.Event()

    def begin(self, reason: str, final: bool = False) -> None:
        self.reason = reason
        self._begun.set()
        if final:
            self._final.set()

    def end(self) -> None:
        self.reason = None
        self._begun.clear()
        self._final.clear()

    async def interrupt(self, only_final: bool = False) -> None:
        """Wait until it begins. Raises: TeacherGone with the reason, then."""
        await (self._final if only_final else self._begun).wait()
        raise TeacherGone(self.reason or "the teacher cannot be asked")
