"""How a replica and rank 0 arrange a transfer through the store, with one of them gone or late. No Ray is started."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.weights import transfer
from actors.weights.transfer import Ask, TransferStore, Turn, receive
from kdray.errors import EngineError

ASK = Ask(at_least=3, num_workers=2, timeout_s=60.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_BEAT_S", 0.02)
    monkeypatch.setattr(transfer, "_GONE_S", 0.2)


def handle(store: TransferStore) -> Any:
    """The store as an actor's handle: `store.method.remote(...)`."""
    methods = {name: SimpleNamespace(remote=getattr(store, name)) for name in ("ask", "turn", "answer")}
    return SimpleNamespace(**methods)


class Replica:
    """Obeys, and remembers what."""

    def __init__(self, error: Exception | None = None) -> None:
        self.turns: list[Turn] = []
        self.error = error

    async def do(self, turn: Turn) -> None:
        self.turns.append(turn)
        if self.error is not None:
            raise self.error


async def serve(store: TransferStore) -> str | None:
    """As rank 0 serves one replica; what went wrong."""
    number, ask = await store.asked()
    assert ask == ASK
    for turn in (Turn("connect", {"port": 1}), Turn("receive", {"names": ["w"]}, version=5)):
        if (reason := await store.order(number, turn)) is not None:
            break
    await store.end(number, reason)
    return reason


async def test_turns_reach_the_replica_in_order_and_the_end_last() -> None:
    store, replica = TransferStore(), Replica()
    got = asyncio.create_task(receive(handle(store), ASK, replica.do))
    assert await serve(store) is None
    await got
    assert replica.turns == [Turn("connect", {"port": 1}), Turn("receive", {"names": ["w"]}, version=5)]
    assert await store.take_failures() == []


async def test_a_turn_that_takes_long_is_no_sign_of_death() -> None:
    store, turns = TransferStore(), []

    async def slowly(turn: Turn) -> None:
        await asyncio.sleep(0.5)
        turns.append(turn.kind)

    got = asyncio.create_task(receive(handle(store), ASK, slowly))
    assert await serve(store) is None
    await got
    assert turns == ["connect", "receive"]


async def test_what_fails_before_weights_come_is_asked_for_again_but_not_for_ever() -> None:
    store, replica = TransferStore(), Replica(OSError("no route"))
    got = asyncio.create_task(receive(handle(store), ASK, replica.do))
    for _ in range(3):
        assert "no route" in str(await serve(store))
    with pytest.raises(EngineError, match="3 transfers of weights in a row failed.*no route"):
        await got
    assert [turn.kind for turn in replica.turns] == ["connect"] * 3
    assert len(await store.take_failures()) == 3
    assert await store.take_failures() == []


async def test_weights_that_came_in_part_are_not_asked_for_again() -> None:
    store = TransferStore()

    async def do(turn: Turn) -> None:
        if turn.kind == "receive":
            raise RuntimeError("cut off")

    got = asyncio.create_task(receive(handle(store), ASK, do))
    await serve(store)
    with pytest.raises(EngineError, match="did not come whole: RuntimeError: cut off"):
        await got


async def test_a_replica_that_goes_ends_its_transfer_and_lets_the_next_one_be_served() -> None:
    store, gone, other = TransferStore(), Replica(), Replica()
    hanging = asyncio.Event()

    async def hang(turn: Turn) -> None:
        hanging.set()
        await asyncio.Event().wait()

    first = asyncio.create_task(receive(handle(store), ASK, hang))
    await asyncio.sleep(0)
    second = asyncio.create_task(receive(handle(store), ASK, other.do))
    served = asyncio.create_task(serve(store))
    await hanging.wait()
    first.cancel()
    assert "not been heard of" in str(await asyncio.wait_for(served, 2))
    assert await asyncio.wait_for(serve(store), 2) is None
    await second
    assert not gone.turns


async def test_an_ask_whose_replica_went_before_its_turn_is_passed_over() -> None:
    store, other = TransferStore(), Replica()
    await store.ask(ASK)
    await asyncio.sleep(0.3)
    second = asyncio.create_task(receive(handle(store), ASK, other.do))
    assert await asyncio.wait_for(serve(store), 2) is None
    await second


async def test_rank_0_that_starts_again_ends_what_it_had_begun_and_serves_what_waits() -> None:
    """Two replicas: one is told to connect when rank 0 dies, the other has not had a turn."""
    store, begun, waiting = TransferStore(), Replica(), Replica()
    first = asyncio.create_task(receive(handle(store), ASK, begun.do))
    number, _ = await store.asked()
    await store.order(number, Turn("connect"))
    second = asyncio.create_task(receive(handle(store), ASK, waiting.do))
    await asyncio.sleep(0.05)
    await store.enter()
    for _ in range(2):
        assert await asyncio.wait_for(serve(store), 2) is None
    await asyncio.wait_for(asyncio.gather(first, second), 2)
    assert [turn.kind for turn in begun.turns] == ["connect", "connect", "receive"]
    assert [turn.kind for turn in waiting.turns] == ["connect", "receive"]
    assert await store.take_failures() == ["the student's ranks started again"]
