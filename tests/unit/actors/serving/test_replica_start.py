"""Start of a replica around an engine that fails, or that is not compared with others."""

from __future__ import annotations

import logging
import logging.config
from logging.handlers import MemoryHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from actors.serving.registry import TeacherRegistry
from actors.serving.replica import TeacherReplica, kept_log_targets
from actors.serving.spec import EngineSpec, RunHandles
from kdray.errors import EngineError
from kdray.teachers.fingerprint import Fingerprint

SPEC = EngineSpec("teacher", "m", None, 5, (4,), 64, teacher="t")
FOUND = Fingerprint("m", None, "none", 5, "float32", (1, 2), (-1.0,))


class Actor:
    """The registry as its handle has it: every method has `remote`, which is awaited."""

    def __init__(self) -> None:
        self.registry = TeacherRegistry({})

    def __getattr__(self, name: str) -> Any:
        async def remote(*args: Any) -> Any:
            return getattr(self.registry, name)(*args)

        return SimpleNamespace(remote=remote)


class Engine:
    """An engine that fails where it is told to."""

    fails_in = ""
    dtype = "float32"
    checked_sizes: ClassVar[list[int]] = []
    closed = False
    asked: list[str]

    def __init__(self, spec: EngineSpec) -> None:
        type(self).asked = []

    async def start(self) -> None:
        self.asked.append("start")
        if self.fails_in == "start":
            raise ValueError("no such weight")

    async def fingerprint(self) -> Fingerprint:
        self.asked.append("fingerprint")
        if self.fails_in == "fingerprint":
            raise EngineError("log p is not finite")
        return FOUND

    async def close(self) -> None:
        type(self).closed = True


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Actor:
    monkeypatch.setattr("actors.serving.replica.TeacherEngine", Engine)
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: SimpleNamespace(deployment="main"))
    return Actor()


class Replica(TeacherReplica):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits the coroutine of its class; nothing does here."""


async def start(run: RunHandles) -> None:
    """Ray Serve's part."""
    replica = Replica.__new__(Replica)
    await Replica.__init__(replica, SPEC, run)  # type: ignore[misc]
    for task in (replica._watcher, replica._follower):
        if task is not None:
            task.cancel()


@pytest.mark.parametrize(("step", "cause"), [("start", "ValueError: no such weight"), ("fingerprint", "log p is not finite")])
async def test_a_failure_is_raised_and_reported_with_its_cause(
    actor: Actor, monkeypatch: pytest.MonkeyPatch, step: str, cause: str
) -> None:
    monkeypatch.setattr(Engine, "fails_in", step)
    monkeypatch.setattr(Engine, "closed", False)
    with pytest.raises(EngineError, match=f"^{cause}$"):
        await start(RunHandles(registry=actor))
    (failure,) = actor.registry.failures("main")
    assert (failure.cause, failure.may_heal) == (cause, False)
    assert Engine.closed, "its processes go on"
    assert actor.registry.longest_start_s("main") == 0, "it did not start"
    with pytest.raises(EngineError, match=f"^{cause}$"):
        await start(RunHandles() if step == "start" else RunHandles(registry=actor))


@pytest.mark.parametrize(("compared", "asked", "known"), [(True, ["start", "fingerprint"], ["t"]), (False, ["start"], [])])
async def test_replicas_of_a_changing_teacher_are_not_compared(
    actor: Actor, compared: bool, asked: list[str], known: list[str]
) -> None:
    await start(RunHandles(registry=actor, compared=compared))
    assert Engine.asked == asked
    assert list(actor.registry.known()) == known
    assert actor.registry.failures("main") == []
    took = actor.registry.longest_start_s("main")
    assert took > 0
    actor.registry.started("main", took / 2)
    assert actor.registry.longest_start_s("main") == took


async def test_an_engine_with_captured_graphs_is_checked_at_their_sizes(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(engine: Any, sizes: list[int]) -> None:
        if sizes:
            raise EngineError(f"wrong at one of {sizes}")

    monkeypatch.setattr("actors.serving.replica.check_batch_sizes", check)
    monkeypatch.setattr(Engine, "checked_sizes", [1, 8])
    with pytest.raises(EngineError, match=r"wrong at one of \[1, 8\]"):
        await start(RunHandles(registry=actor))
    assert Engine.asked == ["start"], "an engine that is not trusted must not become a reference for others"
    (failure,) = actor.registry.failures("main")
    assert "wrong at one of" in failure.cause


def test_logging_that_vllm_configures_anew_leaves_serves_buffers_their_files(tmp_path: Path) -> None:
    """Otherwise a replica keeps every line of its log for as long as it lives."""
    log, serve = tmp_path / "replica.log", logging.Logger("ray.serve")
    buffer = MemoryHandler(1, target=logging.FileHandler(log))
    serve.addHandler(buffer)
    with kept_log_targets(serve):
        # What `import vllm` does.
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
        serve.warning("while it starts")
    serve.warning("afterwards")
    assert buffer.buffer == []
    assert log.read_text() == "while it starts\nafterwards\n"
    buffer.close()
