"""A run ends where a replica refuses weights of the student, or of the teacher that is made from it."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from actors.weights.store import WeightStore
from cluster.runner import Runner
from kdray.checks.parity import Verdict
from kdray.errors import TrainingError
from tests.support.local_actors import Handle

REFUSED = Verdict(3, 0.5, 1e-3)


@pytest.mark.parametrize(("whose", "named"), [("weights", "of small was"), ("average", "of its teacher was")])
async def test_a_refused_version_ends_the_run_after_a_checkpoint(whose: str, named: str) -> None:
    stores = {"weights": WeightStore(), "average": WeightStore()}
    events: list[tuple[str, dict[str, Any]]] = []
    runner: Any = Runner.__new__(Runner)
    runner._stores = SimpleNamespace(**{name: Handle(store) for name, store in stores.items()})
    runner._config = SimpleNamespace(student=SimpleNamespace(model="small"))
    runner.reporter = SimpleNamespace(event=lambda kind, **fields: events.append((kind, fields)))
    runner.stop = asyncio.Event()

    async def phases() -> dict[str, Any]:
        report = stores[whose].report if whose == "weights" else stores[whose].report_teacher
        await report(REFUSED)
        await asyncio.wait_for(runner.stop.wait(), 5)
        raise TrainingError("stopped at step 2 after writing a checkpoint")

    with pytest.raises(TrainingError, match=rf"version 3 {named} refused twice: .* stopped at step 2 after writing"):
        await runner._watched(phases())
    assert [kind for kind, _ in events] == ["version_refused"]
    assert events[0][1]["gap"] == 0.5


async def test_a_run_that_ends_leaves_no_error_of_the_watch_behind() -> None:
    """asyncio prints what nobody fetched, as a traceback on the user's terminal."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    runner: Any = Runner.__new__(Runner)
    runner._stores = SimpleNamespace(weights=Handle(WeightStore()), average=None)
    runner._config = SimpleNamespace(student=SimpleNamespace(model="small"))

    async def phases() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"steps": 1}

    assert await runner._watched(phases()) == {"steps": 1}
    await asyncio.sleep(0.01)
    gc.collect()
    assert not told
