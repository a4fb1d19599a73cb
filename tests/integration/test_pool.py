"""A pool of real replicas on Ray Serve: weights reach it, and a replica that dies loses and doubles nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest_asyncio
import ray
import torch

from actors.teacher_engine import EngineSpec
from actors.teacher_pool import ReplicaPool, deploy
from actors.weight_sync import WeightStore
from cluster.local_ray import start_local
from kdray.config import ClusterSettings, TeacherSettings
from kdray.types import Rollout, SampleRequest

from .conftest import EOS, VOCAB, TinyModels


@dataclass
class Served:
    pool: ReplicaPool
    store: Any
    teacher: Path
    students: dict[int, Path]
    events: list[dict[str, Any]] = field(default_factory=list)

    async def publish(self, version: int) -> None:
        """As rank 0 does it, in two buckets that split the model."""
        from safetensors.torch import load_file, save

        tensors = list(load_file(self.students[version] / "model.safetensors").items())
        half = len(tensors) // 2
        for index, part in enumerate((tensors[:half], tensors[half:])):
            await self.store.put_bucket.remote(version, index, np.frombuffer(save(dict(part)), dtype=np.uint8))
        await self.store.commit.remote(version, 2)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(tiny_models: TinyModels) -> AsyncIterator[Served]:
    from ray import serve

    start_local(num_cpus=2, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    teacher = tiny_models.make("pool-teacher", 2, 64, seed=31)
    initial = tiny_models.make("pool-student", 2, 64, seed=32)
    students = {version: tiny_models.make(f"pool-student-{version}", 2, 64, seed=32 + version) for version in (3, 4)}
    store = ray.remote(WeightStore).options(num_cpus=0, max_concurrency=100).remote()
    spec = EngineSpec(
        role="mixture",
        model=str(teacher),
        student=str(initial),
        vocab_size=VOCAB,
        stop_ids=(EOS,),
        max_model_len=256,
        teacher="t",
        teacher_top_k=8,
        student_top_k=4,
        kv_cache_gib=0.1,
    )
    events: list[dict[str, Any]] = []
    pool = ReplicaPool(
        "t",
        spec,
        TeacherSettings(model=str(teacher)),
        ClusterSettings(health_check_period_s=2),
        store,
        retries=3,
        on_event=lambda kind, **fields: events.append({"kind": kind, **fields}),
    )
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
            os.kill(_replica_pid(), signal.SIGKILL)
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


def _replica_pid() -> int:
    from ray._private.state import actors

    (pid,) = [a["Pid"] for a in actors().values() if "ServeReplica" in a["ActorClassName"] and a["State"] == "ALIVE"]
    return pid
