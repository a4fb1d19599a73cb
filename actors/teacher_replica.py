"""The Ray Serve deployment that owns one engine: sample, score, health, the student version that it holds.

Tables of Arrow go in and out. A replica pulls new student weights by itself as soon as they are published, and before it
serves a request that asks for newer ones than it holds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pyarrow as pa

from actors.teacher_engine import EngineSpec, TeacherEngine
from actors.weight_sync import pull
from kdray.errors import EngineError
from kdray.records import rollouts_to_table, table_to_requests, table_to_rollouts
from kdray.types import SampleRequest

logger = logging.getLogger("ray.serve")

_WATCH_PERIOD_S = 0.5


class TeacherReplica:
    """One engine behind Ray Serve; a student-only engine of a rollout pool too."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, spec: EngineSpec, weights: Any | None
    ) -> None:
        """Start the engine. `weights` is the WeightStore's handle, None where the student never changes."""
        self._spec = spec
        self._weights = weights if spec.role != "teacher" else None
        self._engine = TeacherEngine(spec)
        self._sync_lock = asyncio.Lock()
        await self._engine.start()
        # The weights on disk are older than anything published: version 0 is the student at the start of the phase.
        if spec.role != "teacher":
            await self._engine.set_initial_version(-1 if self._weights is not None else 0)
        self._follower = asyncio.create_task(self._follow()) if self._weights is not None else None
        self._watcher = asyncio.create_task(self._watch())

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if self._follower is not None and self._follower.done():
            self._follower.result()
            raise EngineError("the replica stopped following student weights")
        await self._engine.check_health()

    async def sample(self, requests: pa.Table) -> AsyncGenerator[pa.Table]:
        """Draw every request of a table (`kdray.records.REQUEST_SCHEMA`); each item holds what ended since the last."""
        wanted: list[SampleRequest] = table_to_requests(requests)
        await self._reach(max(request.min_version for request in wanted))
        async with aclosing(self._engine.sample(wanted)) as stream:
            async for rollouts in stream:
                yield rollouts_to_table(rollouts)

    async def score(self, rollouts: pa.Table, min_version: int = -1) -> AsyncGenerator[pa.Table]:
        """Fill in the teacher's columns of rollouts sampled elsewhere.

        Args: min_version: oldest student version under which the exact KLs may be taken, where the engine holds a student.
        """
        await self._reach(min_version)
        async with aclosing(self._engine.score(table_to_rollouts(rollouts))) as stream:
            async for scored in stream:
                yield rollouts_to_table(scored)

    async def student_version(self) -> int:
        return self._engine.student_version

    async def _reach(self, version: int) -> None:
        """Return once the engine holds at least `version`."""
        if self._weights is None:
            return
        async with self._sync_lock:
            if self._engine.student_version < version:
                await self._pull(version)

    async def _pull(self, at_least: int) -> None:
        version, folder, paths = await pull(self._weights, at_least)
        try:
            await self._engine.update_student(paths, version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _follow(self) -> None:
        """Take every new version as soon as it is published."""
        assert self._weights is not None
        while True:
            # The wait holds no lock: requests that already have what they need go on meanwhile.
            await self._weights.newest.remote(self._engine.student_version + 1)
            await self._reach(self._engine.student_version + 1)

    async def _watch(self) -> None:
        """End this process as soon as its engine is dead or in an unknown state.

        A replica that lives on around a dead engine would fail every call for as many health checks as Serve wants to see;
        a dead one is replaced at once, and its callers ask the next.
        """
        while True:
            await asyncio.sleep(_WATCH_PERIOD_S)
            try:
                await self.check_health()
            except Exception:
                logger.exception("the engine of this replica failed; the replica ends")
                os._exit(1)

    async def __del__(self) -> None:
        for task in (getattr(self, "_watcher", None), getattr(self, "_follower", None)):
            if task is not None:
                task.cancel()
        await self._engine.close()
