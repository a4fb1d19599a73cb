"""Publication of weights: on a cluster of four nodes with two replicas each, without engines; and into one engine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from actors.serving.engine import TeacherEngine
from actors.student.rank import Channel
from actors.weights.publisher import Publisher
from actors.weights.store import WeightStore, pull
from cluster.diagnosis.exactness import open_trainer, publish
from kdray.checks.parity import judge
from kdray.config import LoRASettings
from kdray.models.random_models import VOCAB
from kdray.rollouts.batching import rollouts_to_batch
from kdray.types import SampleRequest
from tests.support.families import family
from tests.support.publication import NODES, publication

MIB = 2**20


@pytest.mark.full
@pytest.mark.timeout(300)
def test_bytes_reach_every_node_once_and_pass_by_the_driver() -> None:
    """Eight replicas load three versions each; a rank that starts again replaces what was lost with the one before."""
    count, size = 3, 4 * MIB // 4
    with publication(count, size) as cluster:
        before = cluster.moved()
        for version in range(3):
            ray.get(cluster.rank.publish.remote(version))
            assert ray.get(cluster.follow(version, version), timeout=60) == [[version]] * len(cluster.replicas)
        after = cluster.moved()
        model = 3 * count * size * 4
        received = [there - here for here, there in zip(before.received, after.received, strict=True)]
        sent = [there - here for here, there in zip(before.sent, after.sent, strict=True)]
        assert sent[0] + received[0] < MIB, "weights passed the driver's node"
        assert received[1] < MIB, "rank 0's node has them already"
        assert all(1.0 <= each / model < 1.05 for each in received[2:]), f"not once a node: {received}"
        assert sum(sent) / model < 1.05 * (NODES - 1)

        # Objects are lost with the process that put them: replicas that ask meanwhile wait for its successor.
        ray.get(cluster.rank.publish.remote(3))
        ray.get(cluster.rank.flush.remote())
        ray.kill(cluster.rank)
        time.sleep(2.0)
        waiting = cluster.follow(3, 3)
        successor = cluster.start_rank()
        ray.get(successor.publish.remote(2))
        ray.get(successor.flush.remote())
        assert ray.get(cluster.store.newest.remote(0)) == (2, count), "the lost version is still offered"
        ray.get(successor.publish.remote(3))
        assert ray.get(waiting, timeout=60) == [[3]] * len(waiting)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_node_fetches_a_whole_version_once_and_then_changes() -> None:
    """2% of the numbers change: a node of two replicas fetches less than a tenth of the model for each version in between."""
    count, size = 3, 4 * MIB // 4
    with publication(count, size, stride=50, full_every=6) as cluster:
        model, received, sent = count * size * 4, [], []
        for version in range(7):
            before = cluster.moved()
            ray.get(cluster.rank.publish.remote(version))
            ray.get(cluster.rank.flush.remote())
            assert ray.get(cluster.follow(version, version), timeout=60) == [[version]] * len(cluster.replicas)
            after = cluster.moved()
            received.append(max(there - here for here, there in zip(before.received, after.received, strict=True)) / model)
            sent.append(ray.get(cluster.store.sent.remote()))
        assert [share > 0.9 for share in received] == [True, False, False, False, False, False, True], received
        assert max(received[1:6]) < 0.1
        assert [each.nbytes / model < 0.05 for each in sent] == [share < 0.9 for share in received]
        assert sent[1].changed / sent[1].words == pytest.approx(0.5 / 50, rel=0.01), "a small number's lower word is 0"


@pytest.fixture
def _ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.full
@pytest.mark.usefixtures("_ray")
async def test_an_engine_in_bfloat16_loads_changes_as_it_loads_whole_versions(tmp_path: Path) -> None:
    """A student with experts trained on its own samples; versions 0 and 4 are whole, and 2 is missed."""
    spec = replace(family("Qwen 3 MoE").spec(tmp_path), dtype="bfloat16")
    trainer = open_trainer(spec, 1e-5, "bf16")
    trainer.training = trainer.training.model_copy(update={"sync_bucket_mib": 0.1})
    store = ray.remote(WeightStore).options(num_cpus=0, max_concurrency=100).remote()
    publisher = Publisher(store, ThreadPoolExecutor(1), full_every=4)
    ids = np.random.default_rng(0).integers(3, VOCAB, size=40).astype(np.int32)
    requests = [SampleRequest(number, number, ids, 0.5, number, 30) for number in range(8)]
    engine = TeacherEngine(spec)
    sent = []
    try:
        await engine.start()
        rollouts = [rollout async for part in engine.sample(requests) for rollout in part]
        for version in range(5):
            trainer.train_step(rollouts_to_batch(rollouts, version + 1))
            publisher.publish(version, trainer.weight_buckets(reuse=True))
            publisher.flush()
            sent.append(await store.sent.remote())
            if version == 2:
                continue
            _, folder, paths = await pull(store, version)
            assert len(paths) > 2
            assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in publish(trainer, tmp_path)]
            await engine.update_student(paths, version)
            shutil.rmtree(folder)
            served = await engine.log_probabilities(ids)
            verdict = judge(version, trainer.log_probabilities(ids), served, engine.dtype, "bfloat16")
            print(verdict, sent[-1])
            assert verdict.accepted, verdict
    finally:
        await engine.close()
    assert [each.nbytes > 0.9 * sent[0].nbytes for each in sent] == [True, False, False, False, True], sent
    assert all(0 < each.changed < each.words for each in sent[1:])


@pytest.mark.full
@pytest.mark.usefixtures("_ray")
async def test_an_engine_that_gets_adapted_layers_alone_holds_the_merged_student(tmp_path: Path) -> None:
    """Queries and values have adapters, which the engine fuses with keys; experts stay frozen, and are packed when loaded.

    Version 2 is missed. In the end the engine takes other weights, and then the newest version as a late replica does.
    """
    spec = replace(family("Qwen 3 MoE").spec(tmp_path), dtype="bfloat16")
    trainer = open_trainer(spec, 1e-3, "bf16")
    lora = LoRASettings(rank=4, target_modules=["q_proj", "v_proj"])
    trainer.training = trainer.training.model_copy(update={"sync_bucket_mib": 0.1, "lora": lora})
    assert trainer.phase is not None
    trainer.start_phase(trainer.phase)
    store = ray.remote(WeightStore).options(num_cpus=0, max_concurrency=100).remote()
    channel = Channel(trainer, Publisher(store, ThreadPoolExecutor(1)))
    ids = np.random.default_rng(0).integers(3, VOCAB, size=40).astype(np.int32)
    requests = [SampleRequest(number, number, ids, 0.5, number, 30) for number in range(8)]
    engine = TeacherEngine(spec)
    sent, sizes, seen = [], [], []

    async def load(number: int) -> None:
        """Load the newest version, which has to hold the merged student's bits."""
        _, folder, paths = await pull(store, version)
        stored = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        merged = {name: tensor for bucket in trainer.weight_buckets() for name, tensor in bucket.items()}
        assert stored.keys() == merged.keys()
        assert all(torch.equal(stored[name], merged[name]) for name in merged)
        await engine.update_student(paths, number)
        shutil.rmtree(folder)
        seen.append(await engine.log_probabilities(ids))
        verdict = judge(number, trainer.log_probabilities(ids), seen[-1], engine.dtype, "bfloat16")
        print(verdict, sent[-1])
        assert verdict.accepted, verdict

    try:
        await engine.start()
        rollouts = [rollout async for part in engine.sample(requests) for rollout in part]
        for version in range(4):
            trainer.train_step(rollouts_to_batch(rollouts, version + 1))
            sizes.append(channel.send(version, lambda fixed: trainer.weight_buckets(fixed=fixed, reuse=not fixed), None))
            channel.flush()
            sent.append(await store.sent.remote())
            if version != 2:
                await load(version)
        whole = publish(trainer, tmp_path)
        await engine.update_student(whole, 4)
        assert np.array_equal(await engine.log_probabilities(ids), seen[-1]), "as after a version that was sent whole"
        other = {name: tensor * 0.5 for path in whole for name, tensor in load_file(path).items()}
        save_file(other, tmp_path / "other.safetensors")
        await engine.update_student([tmp_path / "other.safetensors"], 5)
        assert not np.array_equal(await engine.log_probabilities(ids), seen[-1])
        await load(6)
        assert np.array_equal(seen[-1], seen[-2])
    finally:
        await engine.close()
    adapted = sum(
        load_file(path)[name].nbytes for path in whole for name in load_file(path) if "q_proj" in name or "v_proj" in name
    )
    assert len(set(sizes)) == 1
    assert sent[0].nbytes > sizes[0]
    assert all(adapted < each.nbytes < 1.2 * adapted < 0.2 * sizes[0] for each in sent[1:]), (sent, sizes, adapted)
    assert not np.array_equal(seen[0], seen[1]), "training has moved it"
