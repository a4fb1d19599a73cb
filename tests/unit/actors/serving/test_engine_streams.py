"""Streams of an engine's answers, without vLLM: what ends, what fails, and what a reader that is busy meets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from actors.serving.engine import EngineRequest, TeacherEngine
from actors.serving.spec import EngineSpec
from kdray.errors import EngineError
from tests.support.fakes import turns

Jobs = list[EngineRequest]


class ScriptedEngine:
    """Answers each request after so many turns, or fails."""

    def __init__(self, script: dict[str, int | Exception]) -> None:
        self.script = script
        self.running: set[str] = set()
        self.dead = False
        self.errored = False

    async def check_health(self) -> None:
        if self.dead:
            raise RuntimeError("see the stack trace above")

    async def collective_rpc(self, method: str, args: Any = ()) -> None:
        raise ValueError(f"{method} without workers")

    async def generate(self, prompt: Any, params: Any, key: str) -> AsyncGenerator[Any]:
        self.running.add(key)
        try:
            given = self.script[key]
            if isinstance(given, Exception):
                await turns(10)
                raise given
            await turns(given)
            yield SimpleNamespace(key=key, num_cached_tokens=0)
        finally:
            self.running.remove(key)


def engine(script: dict[str, int | Exception]) -> tuple[TeacherEngine, ScriptedEngine, Jobs]:
    found = TeacherEngine(EngineSpec("teacher", "model", None, 8, (1,), 16))
    found._engine = ScriptedEngine(script)
    return found, found._engine, [EngineRequest(key, [0], None) for key in script]


async def read(found: TeacherEngine, jobs: Jobs, busy: int = 0) -> list[str]:
    """Keys in the order they came. Args: busy: turns that the reader takes over each item."""
    keys = []
    async for batch in found._outputs(jobs):
        keys += [output.key for _, output in batch]
        await turns(busy)
    return keys


async def test_answers_come_as_they_end() -> None:
    found, _, jobs = engine({"slow": 9, "quick": 1, "next": 4})
    assert await read(found, jobs) == ["quick", "next", "slow"]


@pytest.mark.parametrize("busy", [0, 30])
async def test_a_request_that_fails_fails_the_stream_however_busy_its_reader(busy: int) -> None:
    found, inside, jobs = engine({"quick": 1, "bad": ValueError("bad"), "slow": 10**9})
    with pytest.raises(ValueError, match="bad"):
        await asyncio.wait_for(read(found, jobs, busy), 5.0)
    assert not inside.running


async def test_whatever_fails_in_a_dead_engine_is_said_to_be_its_death() -> None:
    found, inside, jobs = engine({"bad": ValueError("bad")})
    with pytest.raises(ValueError, match="kdray_stats without workers"):
        await found.check_progress()
    inside.dead = True
    for call in (found.check_progress(), found.stats(), found.check_health(), read(found, jobs)):
        with pytest.raises(EngineError, match="the engine of model died: see the stack trace above"):
            await call


async def test_a_reader_that_goes_away_ends_the_requests() -> None:
    found, inside, jobs = engine({"quick": 1, "slow": 10**9})
    stream = found._outputs(jobs)
    await anext(stream)
    await stream.aclose()
    assert not inside.running
