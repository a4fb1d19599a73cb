"""What the ranks say, where Ray cannot reach their mailbox for a moment, or any more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RpcError

from actors.student import group
from actors.student.group import StudentGroup
from actors.student.mailbox import Mailbox
from kdray.config import TrainingSettings
from kdray.models.saving import TokenizerSource
from kdray.rollouts.race import once
from tests.support.local_actors import Handle


class Unreachable(Mailbox):
    """A mailbox whose first calls fail so."""

    def __init__(self, *faults: Exception) -> None:
        super().__init__(world_size=1, max_restarts=9)
        self.faults = list(faults)

    async def news(self, seen: int) -> list[tuple[str, dict[str, Any]]]:
        if self.faults:
            raise self.faults.pop(0)
        return await super().news(seen)


def ranks_of(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> tuple[StudentGroup, list[str]]:
    """Ranks, and the kinds of their events."""
    monkeypatch.setattr(group, "_RETRY_S", 0.01)
    events: list[str] = []
    ranks = StudentGroup(
        TrainingSettings(),
        8,
        0,
        TokenizerSource("tokenizer"),
        None,
        Path("run"),
        Path("ray"),
        on_event=lambda kind, **fields: events.append(kind),
    )
    ranks._mailbox = Handle(mailbox)
    return ranks, events


async def test_a_mailbox_that_is_away_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Unreachable(ActorUnavailableError("its node is away", b"0" * 16), RpcError("timed out"), ValueError("anything"))
    ranks, events = ranks_of(mailbox, monkeypatch)
    telling = asyncio.create_task(ranks._tell())
    await mailbox.lost("gone", counts=False)
    await asyncio.wait_for(once(lambda: "ranks_lost" in events, 0.01), 20)
    mailbox.faults.append(RpcError("timed out"))
    await mailbox.lost("gone again", counts=False)
    await mailbox.lost("and again", counts=False)
    await asyncio.wait_for(once(lambda: events.count("ranks_lost") == 3, 0.01), 20)
    telling.cancel()
    assert [kind for kind in events if kind != "ranks_lost"] == ["watch_failed"] * 2, "once for each time away"


async def test_a_mailbox_that_is_dead_is_left_to_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, events = ranks_of(Unreachable(ActorDiedError()), monkeypatch)
    await asyncio.wait_for(ranks._tell(), 20)
    assert not events
