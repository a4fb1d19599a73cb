"""Replicas whose driver is dead, without Ray."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.serving import replica
from actors.serving.replica import TeacherReplica
from tests.support.local_actors import Handle


class Owner:
    """An actor that ends with the driver."""

    def __init__(self, alive: bool) -> None:
        self._alive = alive

    async def __ray_ready__(self) -> None:
        if not self._alive:
            raise ActorDiedError


def of(owner: Any) -> TeacherReplica:
    found = TeacherReplica.__new__(TeacherReplica)
    found._owner = owner
    return found


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(replica, "_DELETED_S", 0.1)
    monkeypatch.setattr(replica, "end_process", lambda: found.append("ended"))
    return found


async def test_an_orphan_deletes_its_pool_and_ends_even_if_serves_controller_stands_still(
    monkeypatch: pytest.MonkeyPatch, ended: list[str]
) -> None:
    never, asked = threading.Event(), []

    def delete() -> None:
        asked.append("deleted")
        never.wait()

    monkeypatch.setattr(replica, "_delete_pool", delete)
    await asyncio.wait_for(of(Handle(Owner(alive=False)))._check_owner(), 20)
    assert (asked, ended) == (["deleted"], ["ended"])
    never.set()


async def test_a_replica_with_a_living_owner_or_none_goes_on(monkeypatch: pytest.MonkeyPatch, ended: list[str]) -> None:
    monkeypatch.setattr(replica, "_delete_pool", lambda: ended.append("deleted"))
    await of(Handle(Owner(alive=True)))._check_owner()
    await of(None)._check_owner()
    assert not ended
