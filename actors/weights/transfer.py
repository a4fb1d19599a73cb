"""Direct transfer of student weights from rank 0's device to a replica's: requests, turns and failures.

The protocol remains a pull: a replica that is behind sends a request, and rank 0 (`actors.weights.sender`) serves the requests
in order with its newest published version. Both communicate through the store, since neither knows the other; the weights go
from rank 0 to the replica's workers by vLLM's weight-transfer engines. Every transfer has its own communicator, so late, new
and restarted replicas need no special treatment.
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
"""Silence after which a replica, which polls for its next turn every `_BEAT_S`, counts as lost."""
_ATTEMPTS = 3


@dataclass(frozen=True)
class Ask:
    """Request of a replica for weights."""

    at_least: int
    """Oldest acceptable version."""
    num_workers: int
    """Number of processes that receive the weights."""
    timeout_s: float
    """Maximum duration of the transfer once it has begun."""


@dataclass(frozen=True)
class Turn:
    """Next action of a replica."""

    kind: Literal["connect", "receive", "end"]
    info: dict[str, Any] = field(default_factory=dict)
    """connect, receive: vLLM's init info or update info."""
    version: int = -1
    """receive: version of the weights to be received."""
    error: str | None = None
    """end: reason of failure; None if the transfer succeeded."""


@dataclass
class _Talk:
    ask: Ask
    seen: float
    turn: Turn | None = None
    """Turn of the replica, fetched or about to be."""
    taken: bool = False
    answered: bool = False
    error: str | None = None

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.seen


class TransferStore(WeightStore):
    """Store of versions without buckets, through which replicas and rank 0 coordinate transfers."""

    def __init__(self) -> None:
        super().__init__()
        self._talks: dict[int, _Talk] = {}
        self._asks = 0
        self._failures: list[str] = []
        self._moved = asyncio.Condition()

    async def ask(self, ask: Ask) -> int:
        """Request weights, as a replica; returns the number of the transfer."""
        async with self._moved:
            self._asks += 1
            self._talks[self._asks] = _Talk(ask, time.monotonic())
            self._moved.notify_all()
            return self._asks

    async def turn(self, number: int) -> Turn | None:
        """Next turn of the replica in a transfer; None if there is none yet: polling it also serves as a heartbeat."""
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
        """Report the replica's turn as done, or failed with a reason."""
        async with self._moved:
            if (talk := self._talks.get(number)) is not None:
                talk.answered, talk.error = True, error
                self._moved.notify_all()

    async def enter(self) -> None:
        """Register rank 0 after a start or restart: transfers that it had begun are aborted."""
        for number in [number for number, talk in self._talks.items() if talk.turn is not None]:
            await self.end(number, "the student's ranks started again")

    async def asked(self) -> tuple[int, Ask]:
        """Wait for the oldest unfinished transfer; rank 0 serves it and calls `end`."""
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
        """Give the replica a turn and wait until it is done; returns the error, None if there is none."""
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
        """End a transfer."""
        async with self._moved:
            if error is not None:
                self._failures.append(error)
            if (talk := self._talks.get(number)) is not None:
                talk.turn, talk.taken = Turn("end", error=error), False
                self._moved.notify_all()

    async def take_failures(self) -> list[str]:
        """Reasons of the transfers that failed since the last call."""
        failures, self._failures = self._failures, []
        return failures


async def receive(store: Any, ask: Ask, do: Callable[[Turn], Awaitable[None]]) -> None:
    """Receive weights that are new enough, as a replica. Args: store: the TransferStore's handle; do: executes a turn.

    A transfer that failed before any weight arrived is requested again.
    Raises: EngineError if only some weights may have arrived, or after the last attempt.
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
    """Run a transfer; returns whether weights were already being sent, and the reason of failure, None on success."""
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
            # In addition to the heartbeats.
            doing = asyncio.create_task(_execute(store, number, turn, do))
    finally:
        if doing is not None and not doing.done():
            doing.cancel()


async def _execute(store: Any, number: int, turn: Turn, do: Callable[[Turn], Awaitable[None]]) -> None:
    reason = None
    try:
        await do(turn)
    except Exception as error:
        # Rank 0 then ends the transfer, and the replica fails or requests again.
        reason = f"{type(error).__name__}: {error}"
    await store.answer.remote(number, reason)
