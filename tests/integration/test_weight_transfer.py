"""Weights from rank 0 to replicas by vLLM's weight-transfer engine, on real ranks and replicas; gloo stands for NCCL."""

from __future__ import annotations

import asyncio
import json
import os
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
from actors.serving.spec import RunHandles
from actors.student.group import StudentGroup
from actors.student.trainer import Phase
from actors.weights.transfer import TransferStore
from cluster.connect import start_local
from cluster.diagnosis.transfer import EngineTransfer
from kdray.config import ReverseKLLoss
from kdray.models.resolve import task_tokenizer
from kdray.models.saving import TokenizerSource
from kdray.rollouts.batching import rollouts_to_batch
from kdray.types import Rollout, SampleRequest, TrainBatch
from tests.integration.conftest import VOCAB, TinyModels
from tests.support.gloo_settings import EXTENSION, FAULT, GlooTraining
from tests.support.pools import Events, engine_spec, replica_pool
from tests.support.runs import assert_nothing_left, check_ledger, finish, json_lines, start, write_recipe

STUCK_S = 25.0


@dataclass
class Run:
    ranks: StudentGroup
    pool: ReplicaPool
    store: Any
    folder: Path
    teacher: Path
    fault: Path
    batches: list[TrainBatch]
    version: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    async def step(self) -> Path:
        """Train a step and publish it; the folder that has the same weights."""
        await self.ranks.train_step(self.batches[self.version])
        self.version += 1
        await self.ranks.publish(self.version)
        folder = self.folder / f"version-{self.version}"
        await self.ranks.export(folder)
        return folder


@pytest.mark.full
def test_a_whole_run_with_its_control_and_nothing_left_behind(workplace: Path, marker: str) -> None:
    recipe = write_recipe(workplace, "transferred", rollout={"max_staleness": 2}, evaluation={"control": True})
    output = finish(start(str(recipe), module="tests.support.gloo_run"), 0)
    folder = workplace / "runs" / "transferred"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["reverse_kl"] < 0.8 * summary["before"]["reverse_kl"], output[-3000:]
    assert summary["lost_samples"] == summary["duplicated_samples"] == summary["restarts"] == 0
    assert summary["control"]["trained_tokens"] >= summary["trained_tokens"]
    check_ledger(folder, 12)
    assert all(line["staleness_max"] <= 2 for line in json_lines(folder / "metrics.jsonl"))
    assert "transfer_failed" not in {event["kind"] for event in json_lines(folder / "events.jsonl")}
    assert_nothing_left(marker)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def run(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    from ray import serve

    folder = tmp_path_factory.mktemp("transfer")
    os.environ[FAULT] = str(folder / "fault")
    start_local(num_cpus=4, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    teacher = tiny_models.make("transfer-teacher", 2, 64, seed=41)
    student = tiny_models.make("transfer-student", 2, 64, tied=True, seed=42)
    task_tokenizer().save_pretrained(folder / "tokenizer")
    store = ray.remote(TransferStore).options(num_cpus=0, max_concurrency=100).remote()
    events: Events = []

    def on_event(kind: str, **fields: Any) -> None:
        events.append({"kind": kind, **fields})

    # Two ranks that each hold a half of the weights, gathered in buckets smaller than a layer.
    sizes = {"batch_size": 8, "micro_batch_size": 4, "sft": {"batch_size": 8}, "cpus_per_rank": 1}
    training = GlooTraining.model_validate(sizes | {"ranks": 2, "zero_stage": 3, "sync_bucket_mib": 0.03, "max_restarts": 1})
    tokenizer, checkpoints = TokenizerSource(str(folder / "tokenizer")), folder / "checkpoints"
    ranks = StudentGroup(training, VOCAB, 0, tokenizer, store, checkpoints, folder / "ray", on_event=on_event)
    spec = engine_spec(teacher, student, stuck_after_s=STUCK_S, weight_transfer="gloo", engine_args=EXTENSION)
    pool = replica_pool(spec, events, RunHandles(weights=store), retries=20)
    await ranks.start()
    try:
        await asyncio.to_thread(deploy, [pool])
        await ranks.start_phase(Phase("distill", str(student), None, ReverseKLLoss(type="reverse_kl"), 3e-2, 50))
        batches = [_batch(step + 1) for step in range(10)]
        yield Run(ranks, pool, store, folder, teacher, folder / "fault", batches, events=events)
    finally:
        await ranks.close()
        await asyncio.to_thread(pool.delete)
        ray.shutdown()
        del os.environ[FAULT]


def _batch(step: int) -> TrainBatch:
    """Rollouts of a teacher that is sure of one id, so that weights move."""
    rng = np.random.default_rng(step)
    rollouts = []
    for index in range(8):
        response = rng.integers(2, VOCAB, size=9).astype(np.int32)
        ids = np.stack([np.roll(np.arange(2, 10), shift) for shift in rng.integers(0, 8, size=9)]).astype(np.int32)
        logprobs = np.log(np.tile(np.array([0.8] + [0.02] * 7, np.float32), (9, 1)))
        rollouts.append(
            Rollout(
                sample_id=step * 8 + index,
                prompt_id=index,
                prompt_ids=rng.integers(2, VOCAB, size=6).astype(np.int32),
                token_ids=response,
                mixture_logprobs=np.full(9, -3.0, np.float32),
                student_logprobs=np.full(9, -3.0, np.float32),
                student_versions=np.zeros(9, np.int32),
                alpha=0.0,
                finish_reason="length",
                teacher="t",
                teacher_logprobs=np.full(9, -4.0, np.float32),
                support_ids=ids,
                support_logprobs=logprobs,
                tail_logprobs=np.full(9, np.log(0.06), np.float32),
            )
        )
    return rollouts_to_batch(rollouts, step)


async def _draw(pool: ReplicaPool, min_version: int) -> list[Rollout]:
    rng = np.random.default_rng(min_version)
    requests = [
        SampleRequest(index, index, rng.integers(2, VOCAB, size=12).astype(np.int32), 0.2, 700 + index, 20, min_version)
        for index in range(12)
    ]
    return [rollout async for part in pool.sample(requests) for rollout in part]


async def _check(run: Run, tiny_models: TinyModels, folder: Path) -> None:
    """Replicas hold the newest version, and its rows are Hugging Face's of the weights that the ranks exported."""
    rollouts = await asyncio.wait_for(_draw(run.pool, run.version), 240)
    assert len(rollouts) == 12
    for rollout in rollouts:
        assert (rollout.student_versions == run.version).all()
        at = torch.from_numpy(rollout.token_ids.copy()).long().unsqueeze(1)
        p, q = (tiny_models.log_rows(each, rollout.prompt_ids, rollout.token_ids) for each in (run.teacher, folder))
        assert np.abs(rollout.student_logprobs - q.gather(1, at).squeeze(1).numpy()).max() < 1e-4
        assert rollout.reverse_kl is not None
        assert np.abs(rollout.reverse_kl - (q.exp() * (q - p)).sum(1).numpy()).max() < 1e-3


async def test_replicas_hold_the_weights_that_rank_0_sent(run: Run, tiny_models: TinyModels) -> None:
    folders = []
    for _ in range(2):
        folders.append(await run.step())
        await _check(run, tiny_models, folders[-1])
    prompt = np.arange(2, 14, dtype=np.int32)
    rows = [tiny_models.log_rows(folder, prompt, prompt) for folder in folders]
    assert (rows[0] - rows[1]).abs().max() > 1e-2, "training moved nothing: any version would do"
    assert not [event for event in run.events if event["kind"] == "transfer_failed"]


async def test_a_replica_that_starts_again_catches_up(run: Run, tiny_models: TinyModels) -> None:
    os.kill(_pids("ServeReplica")[0], signal.SIGKILL)
    await _check(run, tiny_models, run.folder / f"version-{run.version}")


@pytest.mark.parametrize("fault", ["die", pytest.param("hang", marks=pytest.mark.full)])
async def test_a_transfer_that_breaks_off_holds_up_nothing(run: Run, tiny_models: TinyModels, fault: str) -> None:
    """The replica's engine dies, or hangs, with one tensor of the new weights: training goes on, and a new one takes over."""
    replica = _pids("ServeReplica")
    run.events.clear()
    run.fault.write_text(fault)
    await run.step()
    while run.fault.exists():  # noqa: ASYNC110 - another process takes it away
        await asyncio.sleep(0.1)
    started = time.monotonic()
    folder = await run.step()
    assert time.monotonic() - started < 20, "training waited for the transfer"
    await _check(run, tiny_models, folder)
    assert _pids("ServeReplica") != replica
    await run.step()
    assert [event for event in run.events if event["kind"] == "transfer_failed"]
    assert await run.ranks.restarts() == 0


@pytest.mark.full
async def test_ranks_that_start_again_serve_what_was_published_before_their_checkpoint(
    run: Run, tiny_models: TinyModels
) -> None:
    folder = await run.step()
    await run.ranks.save_checkpoint(run.version)
    os.kill(_pids("RayTrainWorker")[0], signal.SIGKILL)
    os.kill(_pids("ServeReplica")[0], signal.SIGKILL)
    await _check(run, tiny_models, folder)
    assert await run.ranks.restarts() == 1


def _pids(name: str) -> list[int]:
    """Processes of this test's own Ray, by the class of their actor."""
    from ray._private.state import actors

    return [actor["Pid"] for actor in actors().values() if name in actor["ActorClassName"] and actor["State"] == "ALIVE"]


@pytest.mark.full
async def test_the_diagnosis_of_a_machine_sends_weights_as_rank_0_does(tmp_path: Path) -> None:
    found = await EngineTransfer("gloo", engine={"engine_args": EXTENSION}).run(tmp_path)
    assert found["ok"], found
    assert found["moved"] > 0.1
