"""The watch over a run's actors, without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RpcError

from actors import driver_actor
from actors.driver_actor import ActorWatch
from kdray.errors import TrainingError
from tests.support.local_actors import Handle


class Actor:
    """An actor that answers until it is told otherwise."""

    def __init__(self) -> None:
        self.asked = 0
        self.fault: Exception | None = None
        self.stands_still = False

    async def __ray_ready__(self) -> bool:
        self.asked += 1
        if self.stands_still:
            await asyncio.Event().wait()
        if self.fault is not None:
            raise self.fault
        return True


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_actor, "_ASK_EVERY_S", 0.01)


async def watched(watch: ActorWatch, within_s: float = 2.0) -> Any:
    try:
        return await asyncio.wait_for(watch.watch(), within_s)
    finally:
        watch.close()


async def test_a_killed_actor_is_named() -> None:
    alive, killed = Actor(), Actor()
    watch = ActorWatch(60.0)
    watch.add("the store", Handle(alive))
    watch.add("the mailbox", Handle(killed))
    asyncio.get_running_loop().call_later(0.05, setattr, killed, "fault", ActorDiedError())
    with pytest.raises(TrainingError, match=r"the mailbox is gone: .*--resume"):
        await watched(watch)
    assert alive.asked > 1


async def test_an_actor_that_stands_still_is_named_after_the_limit() -> None:
    actor = Actor()
    watch = ActorWatch(0.1)
    watch.add("the registry", Handle(actor))
    asyncio.get_running_loop().call_later(0.05, setattr, actor, "stands_still", True)
    with pytest.raises(TrainingError, match=r"the registry has not answered for cluster\.stuck_after_s=0\.1 s"):
        await watched(watch)


async def test_a_start_may_take_longer_than_an_answer() -> None:
    actor = Actor()
    actor.stands_still = True
    watch = ActorWatch(0.05)
    watch.add("the store", Handle(actor))
    with pytest.raises(TimeoutError):
        await watched(watch, 0.3)


async def test_an_actor_that_cannot_be_reached_for_a_moment_is_not_lost() -> None:
    actor = Actor()
    actor.fault = ActorUnavailableError("its node is away", b"0" * 16)
    watch = ActorWatch(60.0)
    watch.add("the store", Handle(actor))
    with pytest.raises(TimeoutError):
        await watched(watch, 0.3)
    assert actor.asked > 3


async def test_an_actor_that_is_ended_on_purpose_is_not_missed() -> None:
    actor = Actor()
    watch = ActorWatch(60.0)
    watch.add("the mailbox", Handle(actor))
    watch.remove("the mailbox")
    watch.remove("the mailbox")
    actor.fault = ActorDiedError()
    with pytest.raises(TimeoutError):
        await watched(watch, 0.2)


@pytest.mark.parametrize("fault", [ActorUnavailableError("its node is away", b"0" * 16), RpcError("timed out")])
async def test_an_actor_that_cannot_be_reached_any_more_is_named_after_the_limit(fault: Exception) -> None:
    actor = Actor()
    watch = ActorWatch(0.2)
    watch.add("the store", Handle(actor))
    asyncio.get_running_loop().call_later(0.05, setattr, actor, "fault", fault)
    with pytest.raises(
        TrainingError, match=r"the store could not be reached for cluster\.stuck_after_s=0\.2 s: .*(away|timed out)"
    ):
        await watched(watch, 20.0)


async def test_what_goes_wrong_in_asking_does_not_end_the_watch() -> None:
    actor = Actor()
    watch = ActorWatch(60.0)
    watch.add("the store", Handle(actor))
    loop = asyncio.get_running_loop()
    loop.call_later(0.05, setattr, actor, "fault", RpcError("timed out"))
    loop.call_later(0.15, setattr, actor, "fault", None)
    loop.call_later(0.25, setattr, actor, "fault", ActorDiedError())
    with pytest.raises(TrainingError, match="the store is gone"):
        await watched(watch, 20.0)
