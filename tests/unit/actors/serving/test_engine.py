"""Requests that an engine refuses before it asks vLLM for anything, and answers of its workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from actors.serving.engine import TeacherEngine
from kdray.errors import EngineError, RequestRefused
from kdray.types import SampleRequest, Writer
from tests.support.pools import engine_spec

PROMPT = np.array([3, 4], np.int32)


def request(alpha: float, writer: Writer = "mixture") -> SampleRequest:
    return SampleRequest(5, 0, PROMPT, alpha, 1, 8, writer=writer)


@pytest.mark.parametrize("role", ["mixture", "teacher", "student"])
def test_no_replica_writes_in_the_datas_place(role: Literal["mixture", "teacher", "student"]) -> None:
    """A request for it has the alpha of the student's own draws, and is not one."""
    engine = TeacherEngine(engine_spec(Path("teacher"), Path("student"), role=role))
    own = {"mixture": 0.3, "teacher": 1.0, "student": 0.0}[role]
    engine._check(request(own))
    with pytest.raises(RequestRefused, match="sample 5 is to be the data's own answer"):
        engine._check(request(0.0, "data"))
    if role != "mixture":
        with pytest.raises(RequestRefused, match=rf"a {role}-only replica samples at alpha {own:g}, not 0\.3"):
            engine._check(request(0.3))


class Workers:
    """The workers of an engine, which answer every call with the same."""

    errored = False

    def __init__(self, *answers: dict[str, int]) -> None:
        self.answers = answers

    async def collective_rpc(self, method: str, args: Any = ()) -> list[dict[str, int]]:
        return list(self.answers)

    async def check_health(self) -> None:
        pass


def counters(draws: int, held: int = 0) -> dict[str, int]:
    return {"readmitted": 0, "held": held, "held_positions": held, "draws": draws}


async def test_ranks_that_drew_different_tokens_end_the_engine() -> None:
    engine = TeacherEngine(engine_spec(Path("teacher"), Path("student"), tensor_parallel_size=3))
    engine._engine = Workers(counters(-5, held=2), counters(-5), counters(-5))
    await engine.check_progress()
    assert (await engine.stats())["held"] == 2, "of the rank that records"
    engine._engine = Workers(counters(-5), counters(-5), counters(6))
    for check in (engine.check_progress, engine.check_health):
        with pytest.raises(EngineError, match="tensor-parallel ranks 0 and 2 of teacher drew different tokens"):
            await check()


class DyingWorkers:
    """The workers of an engine whose process dies while they work; vLLM notices, and leaves the call to them unanswered."""

    errored = False

    async def collective_rpc(self, method: str, args: Any = ()) -> list[dict[str, int]]:
        self.errored = True
        return await asyncio.Future()

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        await self.collective_rpc("pause")

    async def check_health(self) -> None:
        raise RuntimeError("see the stack trace above")


async def test_a_call_in_flight_fails_with_the_engine() -> None:
    engine = TeacherEngine(engine_spec(Path("teacher"), Path("student")))
    for call in (engine.stats, lambda: engine.update_student([], 1), lambda: engine.set_initial_version(2)):
        engine._engine = DyingWorkers()
        with pytest.raises(EngineError, match="died"):
            await asyncio.wait_for(call(), 10)
