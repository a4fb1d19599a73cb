"""A pool of real replicas on Ray Serve: weights reach it, and a replica that dies loses and doubles nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest_asyncio
import ray
import torch

from actors.serving.deployment import deploy
from actors.serving.pool import ReplicaPool
from actors.serving.spec import RunHandles
from actors.weights.store import WeightStore
from cluster.connect import start_local
from kdray.types import Rollout, SampleRequest
from tests.integration.conftest import VOCAB, TinyModels
from tests.support.pools import Events, engine_spec, replica_pool
from tests.support.runs import ENGINE


@dataclass
class Served:
    pool: ReplicaPool
    store: Any
    teacher: Path
    students: dict[int, Path]
    events: Events

    async def publish(self, version: int) -> None:
        """As rank 0 does it, in two buckets that split the model."""
        from safetensors.torch import load_file, save

        tensors = list(load_file(self.students[version] / "model.safetensors").items())
        half = len(tensors) // 2
        files = [np.frombuffer(save(dict(part)), dtype=np.uint8) for part in (tensors[:half], tensors[half:])]
        await self.store.commit.remote(version, [[ray.put(file)] for file in files])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(tiny_models: TinyModels) -> AsyncIterator[Served]:
    from ray import serve

    start_local(num_cpus=4, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    teacher = tiny_models.make("pool-teacher", 2, 64, seed=31)
    initial = tiny_models.make("pool-student", 2, 64, seed=32)
    students = {version: tiny_models.make(f"pool-student-{version}", 2, 64, seed=32 + version) for version in (3, 4)}
    store = ray.remote(WeightStore).options(num_cpus=0, max_concurrency=100).remote()
    events: Events = []
    pool = replica_pool(engine_spec(teacher, initial), events, RunHandles(weights=store))
    await asyncio.to_thread(deploy, [pool])
    yield Served(pool, store, teacher, students, events)
    await asyncio.to_thread(pool.delete)
    ray.shutdown()


def _requests(count: int, min_version: int, max_new_tokens: int = 60) -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    return [
        SampleRequest(
            index, index, rng.integers(2, VOCAB, size=12).astype(np.int32), 0.2, 5_000 + index, max_new_tokens, min_version
        )
        for index in range(count)
    ]


async def test_a_request_waits_for_the_version_it_needs(served: Served, tiny_models: TinyModels) -> None:
    """The replica holds older weights than asked for: it samples only once the version is published, and exactly."""

    async def draw() -> list[Rollout]:
        return [rollout async for part in served.pool.sample(_requests(16, min_version=3)) for rollout in part]

    task = asyncio.create_task(draw())
    await asyncio.sleep(1.0)
    assert not task.done(), "sampled with weights older than the bound"
    await served.publish(3)
    rollouts = await asyncio.wait_for(task, 60)
    assert sorted(rollout.sample_id for rollout in rollouts) == list(range(16))
    for rollout in rollouts:
        assert (rollout.student_versions == 3).all()
        student = tiny_models.log_rows(served.students[3], rollout.prompt_ids, rollout.token_ids)
        at = torch.from_numpy(rollout.token_ids.copy()).long().unsqueeze(1)
        assert np.abs(rollout.student_logprobs - student.gather(1, at).squeeze(1).numpy()).max() < 1e-4


async def test_a_killed_replica_loses_and_doubles_nothing(served: Served) -> None:
    """SIGKILL in mid-stream: the rest is drawn by the new replica, after it caught up; each sample once, as it would be."""
    requests = _requests(600, min_version=3)
    expected = {rollout.sample_id: rollout async for part in served.pool.sample(requests) for rollout in part}
    served.events.clear()
    arrived: list[Rollout] = []
    async for part in served.pool.sample(requests):
        if not arrived:
            (pid,) = _replica_pids("t")
            os.kill(pid, signal.SIGKILL)
        arrived += part
    assert sorted(rollout.sample_id for rollout in arrived) == list(range(600))
    assert any(event["kind"] == "retry" for event in served.events), "nothing was lost: the test does not test what it says"
    for rollout in arrived:
        assert np.array_equal(rollout.token_ids, expected[rollout.sample_id].token_ids)
        assert (rollout.student_versions == 3).all()
    assert served.pool.retried > 0


async def test_replicas_follow_new_versions_by_themselves(served: Served) -> None:
    await served.publish(4)
    for _ in range(100):
        rollouts = [rollout async for part in served.pool.sample(_requests(4, 0, max_new_tokens=2)) for rollout in part]
        if all((rollout.student_versions == 4).all() for rollout in rollouts):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the replica never took version 4")


async def test_a_replayed_version_changes_nothing(served: Served) -> None:
    await served.publish(3)
    version, _ = await served.store.newest.remote(0)
    assert version == 4


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(served: Served) -> AsyncIterator[tuple[ReplicaPool, Events]]:
    """Two replicas of the teacher, each known by some calls."""
    events: Events = []
    pool = replica_pool(engine_spec(served.teacher, teacher="pair"), events, teacher={"replicas": 2})
    await asyncio.to_thread(deploy, [pool])
    watcher = asyncio.create_task(pool.watch_replicas(0.3))
    # More calls than are remembered, of the size that the tests send: a call is slow only against the slowest, and the first
    # ones, to cold engines, are very slow on a busy machine.
    for _ in range(18):
        assert len(await _drawn(pool, 64)) == 64
    yield pool, events
    watcher.cancel()
    await asyncio.to_thread(pool.delete)


async def _drawn(pool: ReplicaPool, count: int) -> dict[int, list[int]]:
    requests = [replace(request, alpha=1.0) for request in _requests(count, 0)]
    return {rollout.sample_id: rollout.token_ids.tolist() async for part in pool.sample(requests) for rollout in part}


async def test_a_call_to_a_slow_replica_is_answered_by_another(pair: tuple[ReplicaPool, Events]) -> None:
    """An engine that stands still: its half comes from the other replica, as it would have come, and the next calls too."""
    pool, events = pair
    expected = await _drawn(pool, 64)
    assert not [event for event in events if event["kind"] == "hedge"], "nothing was slow"
    replica = psutil.Process(_replica_pids("pair")[0])
    (engine,) = (
        child for child in replica.children(recursive=True) if any(name in " ".join(child.cmdline()) for name in ENGINE)
    )
    engine.suspend()
    try:
        # On a busy machine, Serve may find one replica late in answering and give both halves to the other: if that is the one
        # that answers, there is nothing to hedge, and if not, there are two calls.
        for _ in range(10):
            assert await asyncio.wait_for(_drawn(pool, 64), 120) == expected
            if hedges := [event for event in events if event["kind"] == "hedge"]:
                break
        assert len(hedges) in (1, 2)
        assert {(hedge["call"], hedge["rollouts"]) for hedge in hedges} == {("sample", 32)}
        assert await asyncio.wait_for(_drawn(pool, 64), 60) == expected
        assert pool.hedged == 32 * len(hedges), "the slow replica was asked again"
        assert pool.retried == 0
    finally:
        engine.resume()


def _replica_pids(pool: str) -> list[int]:
    from ray._private.state import actors

    alive = [each for each in actors().values() if each["State"] == "ALIVE"]
    return [
        each["Pid"]
        for each in alive
        if "ServeReplica" in each["ActorClassName"] and f"-{pool}:{pool}" in each["ActorClassName"]
    ]
