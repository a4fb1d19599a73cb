"""The loop of a rank, without Ray: what ranks that start again do before the next command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.student import rank as module
from actors.student.mailbox import Command
from actors.student.trainer import Phase
from kdray.config import MiniLLMLoss

PHASE = Phase("distill", "student", None, MiniLLMLoss(), 1e-3, 10)


class Mailbox:
    """An actor whose calls have their results at once."""

    def __getattr__(self, name: str) -> Any:
        results = {"start": (4, PHASE, "step-000007"), "command": Command("stop")}
        return SimpleNamespace(remote=lambda *given: results.get(name))


class Outlet:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def publish(self, version: int) -> None:
        self.sent.append(("student", version))

    def renew(self, version: int, decay: float) -> None:
        self.sent.append(("average", version, decay))

    def flush(self) -> None:
        self.sent.append("flushed")


@pytest.mark.parametrize("average", [None, object()])
def test_ranks_that_start_again_publish_their_checkpoint_the_average_first(
    average: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that has a version of the student must find the average that belongs to it."""
    context = SimpleNamespace(current_actor=None)
    monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda result: result, get_runtime_context=lambda: context))
    began: list[Any] = []
    config: Any = SimpleNamespace(mailbox=Mailbox(), average=average)
    trainer: Any = SimpleNamespace(rank=0, steps_done=7)
    files: Any = SimpleNamespace(start_phase=lambda *given: began.append(given))
    outlet: Any = Outlet()
    module.run_log(config, trainer, files, outlet)
    assert began == [(PHASE, Path("step-000007"))]
    first = [] if average is None else [("average", 7, 1.0)]
    assert outlet.sent == [*first, ("student", 7), "flushed"]
