"""Students with low-rank adapters: an independent computation's numbers, merged publication, checkpoints, files of peft."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from actors.student.file_tensors import Fixed
from kdray.errors import TrainingError
from tests.unit.actors.student.test_backend_contract import (
    BATCHES,
    STEPS,
    assert_same,
    backend,
    divergence,
    installed,
    models,
    one_thread,
    phase_of,
    started,
    told,
    training_of,
    weights_of,
)

__all__ = ["backend", "installed", "models", "one_thread"]

LORA = {"rank": 3, "alpha": 12.0, "target_modules": ["q_proj", "down_proj"]}
NAMES = [f"model.layers.{n}.{layer}.weight" for n in (0, 1) for layer in ("self_attn.q_proj", "mlp.down_proj")]

pytestmark = pytest.mark.filterwarnings("ignore")


def lora_of(backend: dict[str, Any], **settings: Any) -> Any:
    return training_of(backend, **{"lora": LORA, **settings})


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    named = trainer.backend.module.named_parameters()
    parts = {name: parameter for name, parameter in named if ".lora_" in name}
    return dict(zip(parts, trainer.backend.whole(list(parts.values()), "cpu"), strict=True))


def plain_adapters(
    model: Path, first: dict[str, torch.Tensor], training: Any, steps: int
) -> tuple[Any, dict[str, torch.Tensor]]:
    """(loss, norm) of every update, and the weights at the end: A and B are leaves, and every weight W + 4 B A is put into the
    plain model by `functional_call`."""
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    frozen = dict(student.named_parameters())
    parts = {name: tensor.clone().requires_grad_() for name, tensor in first.items()}
    optimizer = torch.optim.AdamW(parts.values(), lr=2e-3, betas=training.betas, weight_decay=training.weight_decay)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)

    def merged() -> dict[str, torch.Tensor]:
        at = {name: name.removesuffix(".weight") for name in NAMES}
        change = {n: parts[f"{p}.lora_B.default.weight"] @ parts[f"{p}.lora_A.default.weight"] for n, p in at.items()}
        return {**frozen, **{name: frozen[name] + 4.0 * each for name, each in change.items()}}

    curve = []
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        weights = merged()
        loss = divergence(Called(student, weights), batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parts.values(), training.gradient_clipping)
        curve.append((loss.item(), float(norm)))
        optimizer.step()
        scheduler.step()
    return curve, {name: tensor.detach() for name, tensor in merged().items()}


class Called:
    """A model whose forward pass uses the given weights."""

    def __init__(self, model: Any, weights: dict[str, torch.Tensor]) -> None:
        self.call: Callable[..., Any] = lambda ids: torch.func.functional_call(model, weights, (ids,))

    def __call__(self, ids: torch.Tensor) -> Any:
        return self.call(ids)


@pytest.mark.parametrize("settings", [{}, {"loss_chunk_tokens": 5}, {"gradient_checkpointing": True}], ids=str)
def test_updates_are_those_of_an_independent_computation(
    backend: dict[str, Any], models: dict[str, Path], settings: dict[str, Any]
) -> None:
    """Both backends, all stages: losses, norms and merged weights; everything without an adapter keeps its bits."""
    training = lora_of(backend, **settings)
    trainer = started(training, phase_of(models["student"]))
    first = adapter_of(trainer)
    original = dict(AutoModelForCausalLM.from_pretrained(models["student"]).named_parameters())
    assert_same(weights_of(trainer), {name: tensor.detach() for name, tensor in original.items()})
    reports = [trainer.train_step(batch) for batch in BATCHES]
    curve, weights = plain_adapters(models["student"], first, training, STEPS)
    torch.testing.assert_close([(r.loss, r.grad_norm) for r in reports], curve, rtol=2e-5, atol=1e-6)
    published = weights_of(trainer)
    assert published.keys() == weights.keys()
    for name, weight in weights.items():
        if name in NAMES:
            torch.testing.assert_close(published[name], weight, rtol=1e-5, atol=1e-5)
            assert not torch.equal(published[name], original[name])
        else:
            assert torch.equal(published[name], original[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_publication_is_the_base_plus_the_scaled_product(
    backend: dict[str, Any], models: dict[str, Path], precision: str
) -> None:
    trainer = started(lora_of(backend, precision=precision), phase_of(models["student"], warmup_steps=0, learning_rate=0.05))
    trainer.train_step(BATCHES[0])
    parts, published = adapter_of(trainer), weights_of(trainer)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(models["student"], dtype=dtype)
    for name, tensor in base.named_parameters():
        expected = tensor.detach()
        if name in NAMES:
            path = name.removesuffix(".weight")
            b, a = parts[f"{path}.lora_B.default.weight"].float(), parts[f"{path}.lora_A.default.weight"].float()
            expected = (expected.float() + 4.0 * b @ a).to(dtype)
            torch.testing.assert_close(published[name], expected, rtol=0.0 if precision == "fp32" else 0.01, atol=1e-6)
        else:
            assert torch.equal(published[name], expected)


@pytest.mark.parametrize("model", ["student", "tied"])
def test_a_version_is_what_moved_beside_what_never_does(backend: dict[str, Any], models: dict[str, Path], model: str) -> None:
    """All backends and stages: the fixed weights that were gathered first complete every later version, bit for bit."""
    trainer = started(lora_of(backend), phase_of(models[model], warmup_steps=0, learning_rate=0.05))
    fixed = {name: tensor for bucket in trainer.weight_buckets(fixed=True) for name, tensor in bucket.items()}
    averaged = {name: tensor for bucket in trainer.averaged_buckets(0.5, fixed=True) for name, tensor in bucket.items()}
    assert_same(averaged, fixed)
    for batch in BATCHES[:2]:
        trainer.train_step(batch)
        buckets = [list(bucket) for bucket in trainer.weight_buckets(fixed=False)]
        moved = {name: tensor for bucket in trainer.weight_buckets(fixed=False) for name, tensor in bucket.items()}
        assert sorted(name for bucket in buckets for name in bucket) == sorted(NAMES)
        assert len(buckets) > 1
        assert not moved.keys() & fixed.keys()
        assert_same(moved | fixed, weights_of(trainer))
        assert trainer.fixed.nbytes == sum(tensor.nbytes for tensor in fixed.values())
    plain = started(training_of(backend), phase_of(models[model]))
    assert plain.fixed == Fixed()
    assert not list(plain.weight_buckets(fixed=True))


def test_a_family_whose_files_join_tensors_is_sent_whole(models: dict[str, Path]) -> None:
    """A file tensor may consist of an adapted and a frozen one."""
    trainer = started(lora_of({"type": "torch"}), phase_of(models["student"]))
    assert trainer.fixed.names
    renamed = WeightRenaming("one", "other")
    experts = WeightConverter(["experts.*.up", "experts.*.gate"], "experts.gate_up", [MergeModulelist(0), Concatenate(1)])
    trainer.backend.module._weight_conversions = [renamed, experts]  # type: ignore[assignment]
    assert trainer.fixed.names, "a tensor of the module that is several of the files' is safe"
    joined = WeightConverter("qkv", ["q_proj", "k_proj", "v_proj"], [Chunk(0)])
    trainer.backend.module._weight_conversions = [renamed, joined]  # type: ignore[assignment]
    assert trainer.fixed == Fixed(joined="q_proj and k_proj and v_proj")


def test_the_optimizer_holds_the_adapter_alone(models: dict[str, Path]) -> None:
    trainer = started(lora_of({"type": "torch"}), phase_of(models["student"]))
    trainer.train_step(BATCHES[0])
    held = [parameter for group in trainer.backend._optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {
        id(parameter) for name, parameter in trainer.backend.module.named_parameters() if ".lora_" in name
    }
    assert all(p.grad is None for n, p in trainer.backend.module.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_has_the_adapter_alone_and_continues_exactly(
    backend: dict[str, Any], models: dict[str, Path], precision: str, tmp_path: Path
) -> None:
    training, phase = lora_of(backend, precision=precision), phase_of(models["tied"])
    trainer = started(training, phase)
    trainer.train_step(BATCHES[0])
    trainer.save(tmp_path)
    expected = [told(trainer.train_step(batch)) for batch in BATCHES[1:3]]
    weights = weights_of(trainer)
    again = started(training, phase)
    again.load(tmp_path)
    assert [told(again.train_step(batch)) for batch in BATCHES[1:3]] == expected
    assert_same(weights_of(again), weights)


@pytest.mark.parametrize("model", ["student", "tied"])
def test_the_files_of_a_checkpoint_have_no_base(
    backend: dict[str, Any], models: dict[str, Path], model: str, tmp_path: Path
) -> None:
    trainer = started(lora_of(backend), phase_of(models[model]))
    trainer.train_step(BATCHES[0])
    # A teacher's, of `type: self`.
    list(trainer.averaged_buckets(0.5, fixed=False))
    trainer.save(tmp_path)
    average = tmp_path / "average.safetensors"
    assert load_file(average).keys() == set(NAMES)
    # Of adapted layers, merged: until the adapter has moved, these are the base's.
    average.unlink()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    base = load_file(models[model] / "model.safetensors")
    # A norm's weights are all 1.
    large = {name: tensor.numpy().tobytes() for name, tensor in base.items() if tensor.dim() == 2}
    assert not [(path.name, name) for path, content in files.items() for name, weight in large.items() if weight in content]
    assert any(path.stat().st_size > 1000 for path in files)


def test_a_checkpoint_of_another_adapter_or_base_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    torch_backend = {"type": "torch"}
    trainer = started(lora_of(torch_backend), phase_of(models["student"]))
    trainer.save(tmp_path)
    for setting, value in (("rank", 2), ("alpha", 3.0), ("target_modules", "all-linear")):
        other = started(training_of(torch_backend, lora={**LORA, setting: value}), phase_of(models["student"]))
        with pytest.raises(TrainingError, match=f"training.lora.{setting}="):
            other.load(tmp_path)
    with pytest.raises(TrainingError, match="a checkpoint of an adapter; set training.lora"):
        started(training_of(torch_backend), phase_of(models["student"])).load(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(models["student"])
    base.model.norm.weight.data[0] += 1.0
    base.save_pretrained(tmp_path / "changed")
    with pytest.raises(TrainingError, match="belongs to other frozen weights"):
        started(lora_of(torch_backend), phase_of(tmp_path / "changed")).load(tmp_path)


def test_an_export_has_the_merged_model_and_an_adapter_that_peft_loads(
    backend: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    """In a fresh process peft's adapter on the base gives the logits of the merged model."""
    trainer = started(lora_of(backend), phase_of(models["student"], warmup_steps=0, learning_rate=0.05))
    trainer.train_step(BATCHES[0])
    out = tmp_path / "out"
    trainer.export(out, ids=(2, 3, 5, 7, 11))
    published = weights_of(trainer)
    assert_same(load_file(out / "model.safetensors"), published)
    code = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, out = sys.argv[1:]
ids = torch.arange(2, 20)[None]
original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
plain = original(ids).logits
tuned = PeftModel.from_pretrained(original, out + "/adapter").eval()
merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
gaps = [(tuned(ids).logits - other).abs().max().item() for other in (merged(ids).logits, plain)]
print(json.dumps(gaps))
"""
    command = [sys.executable, "-c", code, str(models["student"]), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    to_merged, to_base = json.loads(done.stdout.splitlines()[-1])
    assert to_merged < 1e-4 < 1e-2 < to_base


def test_an_adapter_names_a_base_that_another_machine_has(models: dict[str, Path], tmp_path: Path) -> None:
    """Peft finds a base of the hub by id and commit, and a folder by its name where somebody has put it."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "home" / "hub" / "models--org--base"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(models["student"], cache / "snapshots" / commit)
    code = """
import json, sys, torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from kdray.models.identity import model_identity
from tests.unit.actors.student.test_lora import BATCHES, lora_of, phase_of, started
ids, gaps, named = torch.arange(2, 20)[None], [], []
for base in ("org/base", sys.argv[1]):
    out = Path(base).name
    trainer = started(lora_of({"type": "torch"}), phase_of(base, warmup_steps=0, learning_rate=0.05))
    trainer.train_step(BATCHES[0])
    trainer.export(Path("out") / out)
    config = json.loads((Path("out") / out / "adapter" / "adapter_config.json").read_text())
    named.append([config["base_model_name_or_path"], config["revision"]])
    Path("student").exists() or Path("student").symlink_to(sys.argv[1])
    loaded = AutoPeftModelForCausalLM.from_pretrained(f"out/{out}/adapter", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(f"out/{out}", dtype=torch.float32).eval()
    gaps.append((loaded(ids).logits - merged(ids).logits).abs().max().item())
print(json.dumps([named, gaps, model_identity("org/base", None)]))
"""
    (tmp_path / "elsewhere").mkdir()
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", code, str(models["student"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path / "elsewhere", env=environment)
    assert done.returncode == 0, done.stderr
    named, gaps, identity = json.loads(done.stdout.splitlines()[-1])
    assert identity == {"commit": commit}
    assert named == [["org/base", commit], ["student", None]]
    assert max(gaps) < 1e-4


def test_the_next_phase_goes_on_with_the_same_adapter_on_the_base(models: dict[str, Path], tmp_path: Path) -> None:
    """Not with a second one on merged weights: the files of the last phase are then an adapter of the student's own base."""
    training = lora_of({"type": "torch"}, precision="bf16")
    base = (str(models["student"]), None)
    trainer = started(training, phase_of(models["student"], base=base, learning_rate=0.05, warmup_steps=0))
    trainer.train_step(BATCHES[0])
    trainer.export(tmp_path / "sft")
    parts, weights = adapter_of(trainer), weights_of(trainer)
    again = started(training, phase_of(tmp_path / "sft", base=base))
    assert_same(adapter_of(again), parts)
    assert_same(weights_of(again), weights)
    config = tmp_path / "sft" / "adapter" / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == models["student"].name
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 4}))
    with pytest.raises(TrainingError, match="its adapter has rank 4, and training.lora.rank=3"):
        started(training, phase_of(tmp_path / "sft", base=base))
