"""Backends other than DeepSpeed as the student of real ranks and real runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.weights.store import pull
from cluster.connect import start_local
from tests.integration.conftest import TinyModels
from tests.support.flat_backend import install
from tests.support.runs import BATCH, assert_nothing_left, check_ledger, finish, json_lines, start, write_recipe
from tests.support.student_group import batches_of, curve_of, open_group, phase_of, training_of


@pytest.fixture
def local_ray() -> Iterator[None]:
    start_local(num_cpus=4, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("kind", ["torch", pytest.param("flat", marks=pytest.mark.full)])
async def test_a_group_of_another_backend(
    kind: str, local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's curve; what replicas pull is the export; a checkpoint is committed and continued, with the average."""
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    teacher, student = (
        tiny_models.make(f"group-{name}", 2, 64, seed=seed) for name, seed in (("teacher", 21), ("student", 22))
    )
    batches, phase = batches_of(tiny_models, teacher, student), phase_of(student)
    training, folder = training_of(backend={"type": kind}, sync_bucket_mib=0.03), tmp_path / "run"
    reference = await curve_of(training_of(), student, batches, tmp_path)
    folder.mkdir()
    async with open_group(training, folder) as (group, store):
        await group.start_phase(phase)
        reports = [await group.train_step(batch) for batch in batches[:2]]
        await group.renew(0, decay=0.5)
        saved = await group.save_checkpoint(2)
        reports += [await group.train_step(batch) for batch in batches[2:]]
        await group.publish(4)
        _, _, paths = await pull(store, 4)
        await group.export(folder / "student")
        await group.start_phase(phase, folder / "checkpoints" / "step-000002")
        again = [await group.train_step(batch) for batch in batches[2:]]
        assert await group.restarts() == 0
    np.testing.assert_allclose([(report.loss, report.grad_norm) for report in reports], reference, rtol=2e-4)
    for report in (*again, *reports):
        # Of the last publication, whose repetition has another one before it.
        report.metrics.pop("published_bytes", None)
    assert [(each.loss, each.grad_norm, each.metrics) for each in again] == [
        (each.loss, each.grad_norm, each.metrics) for each in reports[2:]
    ]
    exported = load_file(folder / "student" / "model.safetensors")
    pulled = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert len(paths) > 3
    assert set(pulled) == set(exported)
    assert all(torch.equal(pulled[name], exported[name]) for name in pulled)
    files = {path.name for path in (folder / "checkpoints" / "step-000002").rglob("*") if path.is_file()}
    assert {"COMMITTED.json", "average.safetensors"} < files
    assert saved.bytes > 0


@pytest.mark.full
def test_a_whole_run_by_plain_torch(workplace: Path, marker: str) -> None:
    """Supervised start, distillation, publication to real replicas, checkpoints, a resume, the export."""
    recipe = write_recipe(
        workplace,
        "plain",
        rollout={"max_new_tokens": 8, "max_staleness": 2},
        training={"backend": {"type": "torch"}, "checkpoint_every": 6},
    )
    output = finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "plain"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["reverse_kl"] < 0.8 * summary["before"]["reverse_kl"], output[-3000:]
    assert summary["lost_samples"] == summary["duplicated_samples"] == summary["restarts"] == 0
    assert "deepspeed" not in summary["versions"]
    check_ledger(run, 12)
    checkpoints = {path.parent.parent.name for path in run.glob("checkpoints/step-*/by-*/weights.safetensors")}
    assert checkpoints == {"step-000006", "step-000012"}
    assert_nothing_left(marker)

    finish(start("run", str(recipe), "--resume", "training.steps=16"), 0)
    check_ledger(run, 16)
    resumed = json.loads((run / "summary.json").read_text())
    assert resumed["resumed_from_step"] == 12
    assert resumed["prompts_consumed"] == 16 * BATCH
    # The student that sampled is the one that was trained: the recorded density is the trained one's at the same tokens.
    assert all(0 < line["importance_weight_ess"] <= 1.0 + 1e-6 for line in json_lines(run / "metrics.jsonl"))
    from transformers import AutoModelForCausalLM

    exported, original = (AutoModelForCausalLM.from_pretrained(each) for each in (run / "student", workplace / "student"))
    assert set(exported.state_dict()) == set(original.state_dict())
    assert any((a != b).any() for a, b in zip(exported.parameters(), original.parameters(), strict=True))
    assert_nothing_left(marker)
    refused = " ".join(
        finish(start("run", str(recipe), "--resume", "training.steps=16", "training.backend={type: deepspeed}"), 2).split()
    )
    assert "training.backend.type: 'torch' there, 'deepspeed' now" in refused
