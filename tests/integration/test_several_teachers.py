"""Three real teacher pools as one: the ensemble's target against Hugging Face, and teachers that die or come back as others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import ray
import torch

from actors.serving.deployment import deploy
from actors.serving.pool import ReplicaPool
from actors.serving.registry import TeacherRegistry
from actors.serving.spec import RunHandles
from cluster.connect import start_local
from kdray.config import Config, parse_config
from kdray.errors import EngineError
from kdray.rollouts.draw import draw_scored
from kdray.teachers.team import TeacherTeam
from kdray.types import Prompt, Rollout, SampleRequest
from tests.integration.conftest import VOCAB, TinyModels
from tests.support.pools import Events, engine_spec, replica_pool

NAMES = ("a", "b", "c")
TOP_K = 6


@dataclass
class Served:
    teams: dict[str, TeacherTeam]
    """By what happens to a missing teacher, all over the same pools."""
    pools: dict[str, ReplicaPool]
    folders: dict[str, Path]
    student: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    async def draw(self, requests: list[SampleRequest], missing: str = "renormalise") -> list[Rollout]:
        team = self.teams[missing]
        return [rollout async for part in draw_scored(team, team, requests) for rollout in part]

    async def until(self, kind: str, teacher: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not any(event["teacher"] == teacher for event in self.kinds(kind)):
            assert time.monotonic() < deadline, f"no {kind} of {teacher} in {timeout_s:g} s: {self.events}"
            await asyncio.sleep(0.2)

    def kill_replicas(self, teacher: str) -> None:
        from ray._private.state import actors

        named = f"ServeReplica:{self.pools[teacher].application}:"
        pids = [a["Pid"] for a in actors().values() if a["ActorClassName"].startswith(named) and a["State"] == "ALIVE"]
        assert pids, f"no replica of {teacher} is alive"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(tiny_models: TinyModels) -> AsyncIterator[Served]:
    from ray import serve

    start_local(num_cpus=4, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    folders = {name: tiny_models.make(f"team-{name}", 2, 64, seed=50 + index) for index, name in enumerate(NAMES)}
    student = tiny_models.make("team-student", 1, 32, seed=60)

    def config(missing: str) -> Config:
        sharing = {"type": "ensemble", "weights": {"a": 1, "b": 2, "c": 1}, "missing": missing, "missing_after_s": 2}
        return parse_config(
            {
                "run": {"name": "team"},
                "student": {"model": str(student)},
                "teachers": {name: {"model": str(folder)} for name, folder in folders.items()},
                "rollout": {"teachers": sharing},
                "loss": {"type": "forward_kl"},
            }
        )

    registry = ray.remote(TeacherRegistry).options(num_cpus=0).remote({})
    events: Events = []
    pools = {}
    for name, folder in folders.items():
        spec = engine_spec(
            folder,
            student,
            teacher=name,
            canary=tuple(range(2, 34)),
            tokenizer="none",
            teacher_top_k=TOP_K,
            student_top_k=3,
            kv_cache_gib=0.05,
        )
        pools[name] = replica_pool(spec, events, RunHandles(registry=registry), retries=5, missing_after_s=2.0)
    await asyncio.to_thread(deploy, list(pools.values()))
    watchers = [asyncio.create_task(pool.watch_replicas(0.3)) for pool in pools.values()]
    prompts = [Prompt(index, np.array([2 + index % 40, 7], np.int32)) for index in range(600)]
    teams = {
        missing: TeacherTeam(config(missing), list(pools.values()), prompts, VOCAB)
        for missing in ("renormalise", "wait", "stop")
    }
    yield Served(teams, pools, folders, student, events)
    for watcher in watchers:
        watcher.cancel()
    await asyncio.gather(*(asyncio.to_thread(pool.delete) for pool in pools.values()))
    ray.shutdown()


def _requests(count: int, max_new_tokens: int = 24) -> list[SampleRequest]:
    return [
        SampleRequest(index, index, np.array([2 + index % 40, 7], np.int32), 0.2, 900 + index, max_new_tokens)
        for index in range(count)
    ]


def _check(rollout: Rollout, served: Served, models: TinyModels, weights: dict[str, float]) -> None:
    """The recorded target against the arithmetic mean of whole Hugging Face rows, at the union and in the tail."""
    mean = sum(
        share * models.log_rows(served.folders[name], rollout.prompt_ids, rollout.token_ids).double().exp()
        for name, share in weights.items()
    )
    assert isinstance(mean, torch.Tensor)
    ids = torch.from_numpy(np.array(rollout.support_ids)).long()
    used = ids >= 0
    recorded = torch.from_numpy(np.array(rollout.support_logprobs)).double().exp()
    assert (recorded - mean.gather(1, ids.clamp(min=0)))[used].abs().max() < 1e-5
    named = torch.zeros(len(ids), VOCAB + 1, dtype=torch.bool).scatter(1, ids.where(used, VOCAB), True)[:, :VOCAB]
    tail = mean.masked_fill(named, 0.0).sum(1)
    assert (torch.from_numpy(np.array(rollout.tail_logprobs)).double().exp() - tail).abs().max() < 1e-5
    at = torch.from_numpy(rollout.token_ids.copy()).long().unsqueeze(1)
    assert (
        torch.from_numpy(np.array(rollout.teacher_logprobs)).double().exp() - mean.gather(1, at).squeeze(1)
    ).abs().max() < 1e-5
    assert named.gather(1, at).all(), "the drawn token is in the union"


async def test_the_ensembles_target_is_exact_through_three_engines(served: Served, tiny_models: TinyModels) -> None:
    rollouts = await served.draw(_requests(36))
    assert sorted(rollout.sample_id for rollout in rollouts) == list(range(36))
    assert {rollout.teacher for rollout in rollouts} == set(NAMES)
    weights = {"a": 0.25, "b": 0.5, "c": 0.25}
    for rollout in rollouts:
        _check(rollout, served, tiny_models, weights)
        student = tiny_models.log_rows(served.student, rollout.prompt_ids, rollout.token_ids)
        sampler = tiny_models.log_rows(served.folders[rollout.teacher], rollout.prompt_ids, rollout.token_ids)
        at = torch.from_numpy(rollout.token_ids.copy()).long().unsqueeze(1)
        mixture = (0.2 * sampler.exp() + 0.8 * student.exp()).log().gather(1, at).squeeze(1)
        assert np.abs(rollout.mixture_logprobs - mixture.numpy()).max() < 1e-4
        kls = []
        for name in NAMES:
            teacher = tiny_models.log_rows(served.folders[name], rollout.prompt_ids, rollout.token_ids)
            kls.append((student.exp() * (student - teacher)).sum(1).numpy())
        assert np.abs(rollout.reverse_kl - np.average(kls, axis=0, weights=list(weights.values()))).max() < 1e-4


async def test_a_teacher_whose_replicas_all_died_is_left_out(served: Served, tiny_models: TinyModels) -> None:
    """Nothing lost, nothing doubled, the others' weights renormalised meanwhile; the teacher is back after its restart."""
    await served.draw(_requests(60))
    served.events.clear()
    served.kill_replicas("b")
    rollouts = await served.draw(_requests(300))
    assert sorted(rollout.sample_id for rollout in rollouts) == list(range(300))
    assert [event["teacher"] for event in served.kinds("teacher_missing")] == ["b"]
    without = [rollout for rollout in rollouts if _is_without_b(rollout, served, tiny_models)]
    assert without, "no rollout was scored without the dead teacher: the test does not test what it says"
    assert all(rollout.teacher != "b" for rollout in without)
    await served.until("teacher_back", "b")
    for rollout in await served.draw(_requests(12)):
        _check(rollout, served, tiny_models, {"a": 0.25, "b": 0.5, "c": 0.25})


def _is_without_b(rollout: Rollout, served: Served, models: TinyModels) -> bool:
    with contextlib.suppress(AssertionError):
        _check(rollout, served, models, {"a": 0.5, "c": 0.5})
        return True
    return False


@pytest.mark.full
async def test_a_teacher_whose_replicas_all_died_is_waited_for_or_ends_the_run(served: Served, tiny_models: TinyModels) -> None:
    await served.draw(_requests(12))
    served.events.clear()
    served.kill_replicas("c")
    waiting = asyncio.create_task(served.draw(_requests(60), "wait"))
    with pytest.raises(
        EngineError, match=r"teacher c has had no replica for \d+ s; rollout\.teachers\.missing=stop ends the run"
    ):
        await served.draw(_requests(60), "stop")
    rollouts = await asyncio.wait_for(waiting, 180)
    assert sorted(rollout.sample_id for rollout in rollouts) == list(range(60))
    for rollout in rollouts:
        _check(rollout, served, tiny_models, {"a": 0.25, "b": 0.5, "c": 0.25})


async def test_a_replica_with_other_weights_is_turned_away_and_never_trained_on(
    served: Served, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """The teacher's folder gets other weights, its replica restarts: refused with the reason. With the old ones it is back."""
    other = tiny_models.make("team-impostor", 2, 64, seed=77)
    weights = served.folders["b"] / "model.safetensors"
    shutil.copy(weights, tmp_path / "kept.safetensors")
    shutil.copy(other / "model.safetensors", weights)
    served.events.clear()
    served.kill_replicas("b")
    await served.until("teacher_refused", "b")
    await served.until("teacher_missing", "b")
    assert "canary no longer matches" in served.kinds("teacher_refused")[0]["reason"]
    shutil.copy(tmp_path / "kept.safetensors", weights)
    rollouts = await served.draw(_requests(24))
    assert sorted(rollout.sample_id for rollout in rollouts) == list(range(24))
    for rollout in rollouts:
        assert rollout.teacher != "b"
        _check(rollout, served, tiny_models, {"a": 0.5, "c": 0.5})
    await served.until("teacher_back", "b")
    for rollout in await served.draw(_requests(12)):
        _check(rollout, served, tiny_models, {"a": 0.25, "b": 0.5, "c": 0.25})
