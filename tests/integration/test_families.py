"""Real architectures, tiny: exact in engine, trainer and export. The parity check finds what would go unnoticed otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.serving.engine import TeacherEngine
from actors.student import trainer as trainer_module
from actors.student.trainer import StudentTrainer
from cluster.diagnosis.exactness import open_trainer, publish, try_pair
from kdray.checks.parity import judge
from kdray.errors import EngineError
from kdray.models.random_models import VOCAB
from tests.support.families import FAMILIES, Family, family
from tests.support.plugins import write_distribution
from tests.support.runs import check_ledger, finish, json_lines, start, write_recipe

# One for each way in which a student can differ from its teacher or from itself after an update.
IN_CI = {"Mistral, window only of the student", "Gemma 2", "Qwen 3 MoE", "Qwen 2, int4 teacher"}
EACH = [pytest.param(pair, id=pair.name, marks=() if pair.name in IN_CI else pytest.mark.full) for pair in FAMILIES]
IDS = tuple(np.random.default_rng(5).integers(3, VOCAB, size=100).tolist())


@pytest.mark.parametrize("pair", EACH)
async def test_a_pair_is_exact_from_the_first_sample_to_the_export(pair: Family, tmp_path: Path) -> None:
    gaps = await try_pair(pair.spec(tmp_path), tmp_path, reference=pair.reference(tmp_path))
    assert not gaps.over(pair.tolerance), gaps
    # An update that changed nothing would show nothing.
    assert gaps.moved > 10 * pair.tolerance or gaps.moved > 0.3, gaps


class Parts:
    """An engine and a trainer of one pair, compared as a run compares them."""

    def __init__(self, engine: TeacherEngine, trainer: StudentTrainer, folder: Path) -> None:
        self.engine, self.trainer, self.folder = engine, trainer, folder
        self.version = 0

    async def update(self, *, rounded: bool = False, dropped: bool = False) -> None:
        """Publish the trainer's weights, changed by hand beforehand."""
        with torch.no_grad():
            for parameter in self.trainer.backend.module.parameters():
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        paths = publish(self.trainer, self.folder)
        for path in paths:
            tensors = load_file(path)
            if dropped:
                tensors.pop(sorted(tensors)[-1])
            save_file({name: each.bfloat16() if rounded else each for name, each in tensors.items()}, path)
        self.version += 1
        await self.engine.update_student(paths, self.version)

    async def accepted(self) -> bool:
        served = await self.engine.student_log_probabilities(IDS)
        verdict = judge(self.version, self.trainer.log_probabilities(IDS), served, self.engine.dtype, "float32")
        print(verdict)
        return verdict.accepted


async def opened(pair: Family, folder: Path) -> Parts:
    spec = pair.spec(folder)
    engine = TeacherEngine(spec)
    await engine.start()
    return Parts(engine, open_trainer(spec, 1e-3), folder)


def plant(folder: Path, text: str, patch: pytest.MonkeyPatch) -> None:
    """Install a plugin of vLLM that breaks the worker of every engine started from now on."""
    write_distribution(folder, "fault", {"vllm.general_plugins": {"fault": "planted_fault:plant"}}, {"planted_fault": text})
    patch.syspath_prepend(str(folder))


@pytest.mark.full
async def test_attention_without_soft_capping_and_rounded_or_missing_weights_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "attention_arguments", lambda *model, **how: {"attn_implementation": "sdpa"})
    parts = await opened(family("Gemma 2"), tmp_path)
    try:
        assert not await parts.accepted()
        monkeypatch.undo()
        parts.trainer = open_trainer(parts.engine.spec, 1e-3)
        assert await parts.accepted()
        await parts.update()
        assert await parts.accepted()
        await parts.update(rounded=True)
        assert not await parts.accepted()
        with pytest.raises(EngineError, match=r"student version 3 lacks .*norm"):
            await parts.update(dropped=True)
    finally:
        await parts.engine.close()


STALE_EXPERTS = """
def plant():
    from actors.vllm_plugin import worker_extension
    worker_extension._unpack_experts = lambda part: None
"""
STALE_HEAD = """
def plant():
    from actors.vllm_plugin import worker_extension
    worker_extension._pack_tied_head = lambda part: None
"""


@pytest.mark.full
@pytest.mark.parametrize(("name", "fault"), [("Qwen 3 MoE", STALE_EXPERTS), ("Qwen 2 / 2.5", STALE_HEAD)])
async def test_weights_that_an_update_leaves_behind_are_found(
    name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path / "site", fault, monkeypatch)
    parts = await opened(family(name), tmp_path)
    try:
        assert await parts.accepted()
        await parts.update()
        assert not await parts.accepted()
    finally:
        await parts.engine.close()


STALE_HEAD_LATER = """
def plant():
    from actors.vllm_plugin import worker_extension
    pack, updates = worker_extension._pack_tied_head, []
    def stale(part):
        updates.append(1)
        if len(updates) < 4:
            pack(part)
    worker_extension._pack_tied_head = stale
"""


@pytest.mark.full
def test_a_run_ends_after_a_checkpoint_when_replicas_hold_another_student(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(workplace, "parity", training={"steps": 6, "checkpoint_every": 0}, evaluation={"control": False})
    plant(tmp_path / "site", STALE_HEAD_LATER, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    output = finish(start("run", str(recipe)), 1)
    assert "was refused twice: its log q in the replicas differs from the trainer's by" in output
    run = workplace / "runs" / "parity"
    events = json_lines(run / "events.jsonl")
    (refused,) = (event for event in events if event["kind"] == "version_refused")
    assert refused["gap"] > refused["tolerance"]
    (start_gap,) = (event["gap"] for event in events if event["kind"] == "parity")
    assert start_gap < 1e-4
    monkeypatch.undo()
    finish(start("run", str(recipe), "--resume"), 0)
    check_ledger(run, 6)
    assert max(row["parity_gap"] for row in json_lines(run / "metrics.jsonl") if row.get("parity_gap") is not None) < 1e-4
