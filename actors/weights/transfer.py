"""Student weights from rank 0's device to a replica's, without the store in between: who asks, who answers, who has gone.

Pulling stays the protocol: a replica that is behind asks here, rank 0 (`actors.weights.sender`) serves one ask after the other
with the newest version that it has published. Both talk through the store, since neither knows the other; the weights go from
rank 0 to the replica's workers by vLLM's weight-transfer engines. Every transfer has a communicator of its own, so that a
replica that is late, new or started again is like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.weights.store import WeightStore
from kdray.errors import EngineError

_BEAT_S = 1.0
_GONE_S = 20.0
"""Silence after which a replica, which asks for its next turn every `_BEAT_S`, counts as gone."""
_ATTEMPTS = 3


@dataclass(frozen=True)
class Ask:
    """A replica that wants weights."""

    at_least: int
    """Oldest version that will do."""
    num_workers: int
    """Processes that the weights go to."""
    timeout_s: float
    """Longest time that the transfer may take, once it has begun."""


@dataclass(frozen=True)
class Turn:
    """What a replica is to do next."""

    kind: Literal["connect", "receive", "end"]
    info: dict[str, Any] = field(default_factory=dict)
    """connect, receive: vLLM's init info or update info."""
    version: int = -1
    """receive: of the weights that come."""
    error: str | None = None
    """end: why the transfer failed; None where it did not."""


@dataclass
class _Talk:
    ask: Ask
    seen: float
    turn: Turn | None = None
    """Given to the replica, or about to be."""
    taken: bool = False
    answered: bool = False
    error: str | None = None

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.seen


class TransferStore(WeightStore):
    """A store of versions without buckets, through which replicas and rank 0 arrange each transfer."""

    def __init__(self) -> None:
        super().__init__()
        self._talks: dict[int, _Talk] = {}
        self._asks = 0
        self._failures: list[str] = []
        self._moved = asyncio.Condition()

    async def ask(self, ask: Ask) -> int:
        """A replica asks for weights; returns the number of the transfer."""
        async with self._moved:
            self._asks += 1
            self._talks[self._asks] = _Talk(ask, time.monotonic())
            self._moved.notify_all()
            return self._asks

    async def turn(self, number: int) -> Turn | None:
        """What the replica is to do next in a transfer; None where that is nothing yet: it asks again, as a sign of life."""
        async with self._moved:
            talk = self._talks.get(number)
            if talk is None:
                return Turn("end", error="rank 0 gave this replica up")
            talk.seen = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_S):
                    await self._moved.wait_for(lambda: talk.turn is not None and not talk.taken)
            if talk.turn is None or talk.taken:
                return None
            talk.taken = True
            if talk.turn.kind == "end":
                self._talks.pop(number, None)
            return talk.turn

    async def answer(self, number: int, error: str | None) -> None:
        """The replica has done its turn; or not, and why."""
        async with self._moved:
            if (talk := self._talks.get(number)) is not None:
                talk.answered, talk.error = True, error
                self._moved.notify_all()

    async def enter(self) -> None:
        """Rank 0 has started, again perhaps: transfers that it had begun are over."""
        for number in [number for number, talk in self._talks.items() if talk.turn is not None]:
            await self.end(number, "the student's ranks started again")

    async def asked(self) -> tuple[int, Ask]:
        """The oldest transfer that is not over, once there is one; rank 0 serves it and calls `end`."""
        async with self._moved:
            while True:
                gone = [number for number, talk in self._talks.items() if talk.silent_s > _GONE_S]
                for number in gone:
                    del self._talks[number]
                for number, talk in self._talks.items():
                    if talk.turn is None or talk.turn.kind != "end":
                        return number, talk.ask
                await self._moved.wait()

    async def order(self, number: int, turn: Turn) -> str | None:
        """Have the replica do something and wait until it has; returns what went wrong, None where nothing did."""
        async with self._moved:
            talk = self._talks.get(number)
            if talk is None:
                return "the replica has gone"
            talk.turn, talk.taken, talk.answered = turn, False, False
            self._moved.notify_all()
            while not talk.answered:
                if talk.silent_s > _GONE_S:
                    return f"the replica has not been heard of for {talk.silent_s:.0f} s"
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_BEAT_S):
                        await self._moved.wait()
            return talk.error

    async def end(self, number: int, error: str | None) -> None:
        """A transfer is over."""
        async with self._moved:
            if error is not None:
                self._failures.append(error)
            if (talk := self._talks.get(number)) is not None:
                talk.turn, talk.taken = Turn("end", error=error), False
                self._moved.notify_all()

    async def take_failures(self) -> list[str]:
        """Why transfers failed since the last call."""
        failures, self._failures = self._failures, []
        return failures


async def receive(store: Any, ask: Ask, do: Callable[[Turn], Awaitable[None]]) -> None:
    """Get weights that are new enough, as a replica. Args: store: the TransferStore's handle; do: what obeys a turn.

    A transfer that failed before any weight came is asked for again.
    Raises: EngineError where some weights may have come and others not, or after the last attempt.
    """
    reason: str | None = None
    for _ in range(_ATTEMPTS):
        begun, reason = await _receive_once(store, ask, do)
        if reason is None:
            return
        if begun:
            raise EngineError(f"the weights did not come whole: {reason}")
    raise EngineError(f"{_ATTEMPTS} transfers of weights in a row failed, the last one because {reason}")


async def _receive_once(store: Any, ask: Ask, do: Callable[[Turn], Awaitable[None]]) -> tuple[bool, str | None]:
    """Whether weights were on their way, and why they did not arrive; None where they did."""
    number = await store.ask.remote(ask)
    begun, doing = False, None
    try:
        while True:
            turn = await store.turn.remote(number)
            if turn is None:
                continue
            if turn.kind == "end":
                return begun, turn.error
            begun = begun or turn.kind == "receive"
            # Beside the signs of life.
            doing = asyncio.create_task(_obey(store, number, turn, do))
    finally:
        if doing is not None and not doing.done():
            doing.cancel()


async def _obey(store: Any, number: int, turn: Turn, do: Callable[[Turn], Awaitable[None]]) -> None:
    reason = None
    try:
        await do(turn)
    except Exception as error:
        # Rank 0 ends the transfer with it, and the replica then fails or asks again.
        reason = f"{type(error).__name__}: {error}"
    await store.answer.remote(number, reason)
