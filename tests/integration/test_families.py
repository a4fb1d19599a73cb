"""Real architectures, tiny: exact in engine, trainer and export. The parity check finds what would go unnoticed otherwise."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.serving.engine import TeacherEngine
from actors.student import trainer as trainer_module
from cluster.diagnosis.exactness import open_trainer, publish, try_pair
from kdray.checks.parity import Verdict, judge, refusal
from kdray.errors import EngineError
from kdray.models.random_models import VOCAB
from tests.support.families import FAMILIES, Family, family
from tests.support.plugins import write_distribution
from tests.support.quantised_files import write_quantised
from tests.support.runs import check_ledger, finish, json_lines, start, write_recipe

# One for each way in which a student can differ from its teacher or from itself after an update.
IN_CI = {"Mistral, window only of the student", "Gemma 2", "Qwen 3 MoE", "Qwen 2, int4 teacher"}
EACH = [pytest.param(pair, id=pair.name, marks=() if pair.name in IN_CI else pytest.mark.full) for pair in FAMILIES]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Precision of training, and the dtype of the engine."""
MARGIN = 0.75
"""Largest share of the tolerance that rounding takes."""
IDS = tuple(np.random.default_rng(5).integers(3, VOCAB, size=100).tolist())


@pytest.mark.parametrize("pair", EACH)
async def test_a_pair_is_exact_from_the_first_sample_to_the_export(pair: Family, tmp_path: Path) -> None:
    gaps = await try_pair(pair.spec(tmp_path), tmp_path, reference=pair.reference(tmp_path))
    assert not gaps.over(pair.tolerance), gaps
    # An update that changed nothing would show nothing.
    assert gaps.moved > 10 * pair.tolerance or gaps.moved > 0.3, gaps


@pytest.mark.full
async def test_layers_that_a_quantised_teacher_excludes_stay_plain(tmp_path: Path) -> None:
    """Lists of them hold whole names, so that the teacher's modules must be called in the engine what they are called alone."""
    pair = family("Qwen 2, int8 with int8 activations teacher")
    spec = pair.spec(tmp_path)
    excluded = ["model.layers.0.mlp.down_proj", "model.layers.2.self_attn.o_proj"]
    write_quantised(tmp_path / "teacher", str(pair.quantised), tmp_path / "partly", tmp_path / "partly rounded", excluded)
    partly = replace(spec, model=str(tmp_path / "partly"))
    gaps = await try_pair(partly, tmp_path, reference=tmp_path / "partly rounded")
    assert not gaps.over(pair.tolerance), gaps


class Parts:
    """An engine and a trainer of one pair, compared as a run compares them."""

    def __init__(self, engine: TeacherEngine, precision: str, folder: Path) -> None:
        self.engine, self.precision, self.folder = engine, precision, folder
        self.trainer = open_trainer(engine.spec, 1e-3, precision)
        self.version = 0

    async def update(self, *, rounded: bool = False, dropped: bool = False) -> None:
        """Publish the trainer's weights, changed by hand beforehand. Args: rounded: to the next narrower dtype."""
        with torch.no_grad():
            for parameter in self.trainer.backend.module.parameters():
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        narrow = torch.bfloat16 if self.precision == "fp32" else torch.float8_e4m3fn
        paths = publish(self.trainer, self.folder)
        for path in paths:
            tensors = load_file(path)
            if dropped:
                tensors.pop(sorted(tensors)[-1])
            save_file({name: each.to(narrow).to(each.dtype) if rounded else each for name, each in tensors.items()}, path)
        self.version += 1
        await self.engine.update_student(paths, self.version)

    async def compare(self) -> Verdict:
        served = await self.engine.log_probabilities(IDS)
        trained = self.trainer.log_probabilities(IDS)
        verdict = judge(self.version, trained, served, self.engine.dtype, DTYPES[self.precision])
        print(verdict, f"spread {trained.spread:.2f}")
        return verdict

    async def accepts(self) -> None:
        verdict = await self.compare()
        assert verdict.gap < MARGIN * verdict.tolerance, verdict

    async def refuses(self) -> None:
        verdict = await self.compare()
        assert not verdict.accepted, verdict
        message = refusal(verdict, "the student")
        assert f"by {verdict.gap:.2g} nats a token on average (at most {verdict.tolerance:.2g} is rounding)" in message


async def opened(pair: Family, precision: str, folder: Path, sharpness: float = 1.0) -> Parts:
    """Args: sharpness: factor on the student's output head, whose logits are at most about 5 otherwise."""
    engine = TeacherEngine(replace(pair.spec(folder), dtype=DTYPES[precision]))
    if sharpness != 1.0:
        path = folder / "student" / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"] *= sharpness
        save_file(tensors, path, {"format": "pt"})
    await engine.start()
    return Parts(engine, precision, folder)


def plant(folder: Path, text: str, patch: pytest.MonkeyPatch) -> None:
    """Install a plugin of vLLM that breaks the worker of every engine started from now on."""
    write_distribution(folder, "fault", {"vllm.general_plugins": {"fault": "planted_fault:plant"}}, {"planted_fault": text})
    patch.syspath_prepend(str(folder))


@pytest.mark.full
@pytest.mark.parametrize("precision", DTYPES)
async def test_attention_without_soft_capping_and_rounded_or_missing_weights_are_found(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "attention_arguments", lambda *model, **how: {"attn_implementation": "sdpa"})
    parts = await opened(family("Gemma 2"), precision, tmp_path)
    try:
        await parts.refuses()
        monkeypatch.undo()
        parts.trainer = open_trainer(parts.engine.spec, 1e-3, precision)
        await parts.accepts()
        await parts.update()
        await parts.accepts()
        await parts.update(rounded=True)
        await parts.refuses()
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
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    ("name", "fault", "sharpness"),
    [("Qwen 3 MoE", STALE_EXPERTS, 1.0), ("Qwen 3 MoE", STALE_EXPERTS, 4.0), ("Qwen 2 / 2.5", STALE_HEAD, 1.0)],
)
async def test_weights_that_an_update_leaves_behind_are_found(
    name: str, fault: str, sharpness: float, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path / "site", fault, monkeypatch)
    parts = await opened(family(name), precision, tmp_path, sharpness)
    try:
        await parts.accepts()
        await parts.update()
        await parts.refuses()
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
    # No step asks for a checkpoint: that of the refusal is the only one.
    (written,) = (event["step"] for event in events[events.index(refused) :] if event["kind"] == "checkpoint")
    assert written > 0
    monkeypatch.undo()
    finish(start("run", str(recipe), "--resume"), 0)
    starts = [event for event in json_lines(run / "events.jsonl") if event["kind"] == "start"]
    assert [event["resumed_step"] for event in starts] == [None, written]
    check_ledger(run, 6)
    assert max(row["parity_gap"] for row in json_lines(run / "metrics.jsonl") if row.get("parity_gap") is not None) < 1e-4
