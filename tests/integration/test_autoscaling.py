"""A real pool grows while a trainer waits for it, stays where the cluster is full, and shrinks when nobody asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import ray

from actors.serving.deployment import deploy
from actors.serving.pool import ReplicaPool
from actors.serving.scaling_board import ScalingBoard
from actors.serving.spec import RunHandles
from cluster.connect import start_local
from kdray.config import AutoscalingSettings
from kdray.types import Rollout, SampleRequest
from tests.integration.conftest import VOCAB, TinyModels
from tests.support.pools import Events, engine_spec, replica_pool

SETTINGS = AutoscalingSettings(
    max_replicas=3,
    upscale_wait_s=1.0,
    upscale_delay_s=2.0,
    downscale_idle_s=6.0,
    placement_timeout_s=8.0,
    report_every_s=1.0,
    drain_s=20.0,
)


@dataclass
class Scaled:
    pool: ReplicaPool
    events: list[dict[str, Any]] = field(default_factory=list)

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        return next((event for event in self.events if wanted.items() <= event.items()), None)

    async def until(self, happened: Callable[[], Any], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {self.events}"
            await asyncio.sleep(0.2)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scaled(tiny_models: TinyModels) -> AsyncIterator[Scaled]:
    from ray import serve

    # Room for two replicas of the three that may be asked for.
    start_local(num_cpus=2, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    teacher = tiny_models.make("scaled-teacher", 2, 64, seed=71)
    board = ray.remote(ScalingBoard).options(num_cpus=0, max_concurrency=100).remote()
    spec = engine_spec(teacher, max_num_seqs=8)
    events: Events = []
    pool = replica_pool(spec, events, RunHandles(board=board), teacher={"max_num_seqs": 8, "autoscaling": SETTINGS})
    await asyncio.to_thread(deploy, [pool])
    watcher = asyncio.create_task(pool.watch_replicas(0.5))
    yield Scaled(pool, events)
    watcher.cancel()
    await asyncio.to_thread(pool.delete)
    ray.shutdown()


def _requests(count: int) -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    return [
        SampleRequest(index, index, rng.integers(2, VOCAB, size=12).astype(np.int32), 1.0, 9_000 + index, 100, -1)
        for index in range(count)
    ]


async def _draw(pool: ReplicaPool, count: int) -> list[Rollout]:
    return [rollout async for part in pool.sample(_requests(count)) for rollout in part]


async def _train(pool: ReplicaPool, drawn: dict[int, Rollout]) -> None:
    """A trainer that does nothing but wait: its next batch is asked for as soon as it has one."""
    while True:
        pool.awaited(range(200))
        try:
            rollouts = await _draw(pool, 200)
        finally:
            pool.awaited(())
        assert sorted(rollout.sample_id for rollout in rollouts) == list(range(200))
        for rollout in rollouts:
            # The same request draws the same tokens, whichever replica answers it.
            first = drawn.setdefault(rollout.sample_id, rollout)
            assert np.array_equal(first.token_ids, rollout.token_ids)


@pytest.mark.timeout(600)
async def test_a_pool_follows_its_load(scaled: Scaled) -> None:
    pool = scaled.pool
    await scaled.until(lambda: pool.replicas_serving == 1, 30)
    drawn: dict[int, Rollout] = {}
    training = asyncio.create_task(_train(pool, drawn))

    def grown(to: int) -> bool:
        if training.done():
            training.result()
        return pool.replicas_serving == to

    try:
        await scaled.until(lambda: grown(2), 240)
        first = scaled.find(kind="scale", before=1, now=2)
        assert first is not None
        assert first["pool"] == "t"
        assert "the trainer waited" in first["reason"]
        # The load stays: a third is asked for, and there is no room. That is told, once, and is no error.
        await scaled.until(lambda: grown(2) and scaled.find(kind="scale_stuck", wanted=3, now=2), 120)
        assert scaled.find(kind="scale", before=2, now=3) is not None
        await asyncio.sleep(2 * SETTINGS.placement_timeout_s)
        assert sum(event["kind"] == "scale_stuck" and event["wanted"] == 3 for event in scaled.events) == 1
        assert pool.take_waited_s() > 10.0
    finally:
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)

    def scales() -> list[dict[str, Any]]:
        return [event for event in scaled.events if event["kind"] == "scale"]

    # The decision is told by another poll than the one that counts replicas.
    await scaled.until(lambda: pool.replicas_serving == 1 and scales()[-1]["now"] == 1, 120)
    last = scales()[-1]
    assert (last["before"], last["now"]) == (3, 1)
    assert "no work" in last["reason"]
    assert len(await _draw(pool, 20)) == 20
    assert pool.retried == 0, "the replica that went had finished what it was asked"
