"""The student of a checkpoint as a folder, in one process: the same as the ranks would have exported, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from actors.student.checkpoints.whole_student import fill, write_student
from actors.student.trainer import Phase, StudentTrainer
from kdray.config import Config, ReverseKLLoss, TinyModel
from kdray.errors import DataError, TrainingError
from kdray.models.resolve import build_tiny_model, resolve_model
from kdray.runs.checkpoints import commit
from kdray.runs.storage import Storage
from tests.support.flat_backend import install
from tests.unit.actors.student.test_backend_contract import ROWS, VOCAB, batch_of

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS: dict[str, dict[str, Any]] = {
    "torch": {"backend": {"type": "torch"}},
    "torch bf16": {"backend": {"type": "torch"}, "precision": "bf16"},
    "torch adapter": {"backend": {"type": "torch"}, "lora": {"rank": 2, "alpha": 4}},
    "deepspeed 0": {"zero_stage": 0},
    "deepspeed 2 bf16": {"zero_stage": 2, "precision": "bf16"},
    "deepspeed 3": {"zero_stage": 3},
    "deepspeed 3 bf16": {"zero_stage": 3, "precision": "bf16"},
    "deepspeed 3 adapter": {"zero_stage": 3, "lora": {"rank": 2, "alpha": 4}},
}


IN_CI = ("torch bf16", "deepspeed 0", "deepspeed 3 adapter")


def config_of(tmp_path: Path, **training: Any) -> Config:
    sizes = {"batch_size": ROWS, "micro_batch_size": 4, "steps": 4, "sft": {"steps": 0}}
    return Config.model_validate(
        {
            "run": {"name": "salvaged", "output": str(tmp_path / "runs")},
            "data": {"prompts": {"type": "task"}},
            "student": {"model": {"type": "tiny", "layers": 2, "width": 32, "seed": 3}},
            "teachers": {"main": {"model": {"type": "tiny", "layers": 1, "width": 32}}},
            "training": {**sizes, **training},
        }
    )


def trained(config: Config, folder: Path, inputs: dict[str, dict[str, str]] | None = None) -> Storage:
    """A run with checkpoints of steps 1 and 2, and what its ranks export after step 2 in `folder`.

    Args: inputs: that the checkpoints record.
    """
    model = resolve_model(config.student.model, config.run.output / ".models")
    trainer = StudentTrainer(config.training, VOCAB, config.run.seed)
    trainer.start_phase(Phase("distill", model, None, ReverseKLLoss(type="reverse_kl"), 3e-3, 4, base=(model, None)))
    config.run_folder.mkdir(parents=True)
    storage = Storage.local(config.run_folder)
    for step in (1, 2):
        trainer.train_step(batch_of(step))
        own = folder.parent / f"own-{step}"
        own.mkdir()
        trainer.save(own)
        key = f"checkpoints/step-{step:06d}"
        progress = {"step": step, "stage": "distill", "inputs": inputs or {}}
        commit(storage, key, progress, [storage.put_tree(own, key, move=True)])
    trainer.export(folder)
    trainer.close()
    return storage


def same(left: Path, right: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (left, right))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [pytest.param(each, marks=() if each in IN_CI else pytest.mark.full) for each in KINDS])
@pytest.mark.usefixtures("process_group")
def test_it_is_what_the_ranks_would_have_exported(kind: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, **KINDS[kind])
    storage = trained(config, tmp_path / "exported")
    write_student(config, 2, tmp_path / "second", [storage])
    write_student(config, 1, tmp_path / "first", [storage])
    assert same(tmp_path / "second", tmp_path / "exported")
    assert not same(tmp_path / "first", tmp_path / "exported")
    assert (tmp_path / "second" / "tokenizer_config.json").is_file()
    assert (tmp_path / "second" / "adapter").is_dir() == ("adapter" in kind)


def test_what_is_not_there_or_not_whole_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, **KINDS["torch"])
    storage = trained(config, tmp_path / "exported")
    with pytest.raises(DataError, match=r"--step 7: no such checkpoint in .*; there are those of 1, 2$"):
        write_student(config, 7, tmp_path / "to", [storage])
    weights = config.run_folder / "checkpoints" / "step-000002" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"weights.safetensors does not hold what was written"):
        write_student(config, 2, tmp_path / "to", [storage])
    changed = config.model_copy(update={"training": config.training.model_copy(update={"lora": None, "precision": "bf16"})})
    write_student(changed, 1, tmp_path / "to", [Storage.local(tmp_path / "elsewhere"), storage])
    other = config.student.model_copy(update={"model": config.student.model.model_copy(update={"width": 64})})
    with pytest.raises(TrainingError, match=r"has the shape \(99, 32\), not \(99, 64\)"):
        write_student(config.model_copy(update={"student": other}), 1, tmp_path / "again", [storage])


def test_a_backend_that_cannot_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    config = config_of(tmp_path, backend={"type": "flat", "pieces": 3})
    storage = trained(config, tmp_path / "exported")
    with pytest.raises(TrainingError, match="FlatBackend cannot read weights without its ranks"):
        write_student(config, 2, tmp_path / "to", [storage])


def test_a_phase_that_began_with_an_earlier_one_needs_its_student(tmp_path: Path) -> None:
    """Whose adapter it continues, for instance."""
    config = config_of(tmp_path, **KINDS["torch"])
    storage = trained(config, tmp_path / "exported")
    sft = config.training.sft.model_copy(update={"steps": 5})
    config = config.model_copy(update={"training": config.training.model_copy(update={"sft": sft})})
    with pytest.raises(DataError, match="checkpoints/sft: is not there, and this phase began with it"):
        write_student(config, 2, tmp_path / "to", [storage])
    # A run that began without a storage has it in its folder, and later checkpoints elsewhere.
    commit(storage, "checkpoints/sft", {}, [storage.put_tree(tmp_path / "exported", "checkpoints/sft")])
    (tmp_path / "bucket" / "checkpoints").mkdir(parents=True)
    shutil.move(config.run_folder / "checkpoints" / "step-000002", tmp_path / "bucket" / "checkpoints" / "step-000002")
    write_student(config, 2, tmp_path / "to", [storage, Storage.local(tmp_path / "bucket")])
    assert same(tmp_path / "to", tmp_path / "exported")


def test_tied_frozen_and_missing_weights(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 2, bias=False)})
    module["c"] = torch.nn.Linear(2, 2)
    module["b"].weight = module["a"].weight
    module["c"].requires_grad_(False)
    kept = module["c"].weight.clone()
    fill(module, {"b.weight": torch.eye(2)}, tmp_path)
    assert torch.equal(module["a"].weight, torch.eye(2)), "by its other name"
    assert torch.equal(module["c"].weight, kept)
    with pytest.raises(TrainingError, match=r"a\.weight is not in it"):
        fill(module, {"c.weight": torch.eye(2)}, tmp_path)


def test_a_model_of_the_hub_is_that_of_its_checkpoint_after_the_repository_moved_on(tmp_path: Path) -> None:
    """Its tokenizer and the frozen weights below an adapter, too. Another process: the hub's cache is chosen at import."""
    repository = tmp_path / "home" / "hub" / "models--org--small"
    commits = ["a" * 40, "b" * 40]
    for seed, commit_id in enumerate(commits):
        folder = build_tiny_model(TinyModel(type="tiny", layers=2, width=32, seed=seed), repository / "snapshots" / commit_id)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["chat_template"] = f"template of {commit_id[0]}"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code = """
import json, sys
from pathlib import Path
from kdray.config import ReverseKLLoss
from kdray.models.identity import model_identity
from tests.unit.actors.student.checkpoints.test_whole_student import *
folder, commits = Path(sys.argv[1]), sys.argv[2:]
branch = folder / "home" / "hub" / "models--org--small" / "refs" / "main"
branch.parent.mkdir()
branch.write_text(commits[0])
config = config_of(folder, backend={"type": "torch"}, lora={"rank": 2, "alpha": 4})
config = config.model_copy(update={"student": config.student.model_copy(update={"model": "org/small"})})
storage = trained(config, folder / "exported", {"student.model": model_identity("org/small", None)})
branch.write_text(commits[1])
write_student(config, 2, folder / "salvaged", [storage])
print(json.dumps(same(folder / "salvaged", folder / "exported")))
"""
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", code, str(tmp_path), *commits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) is True
    assert AutoTokenizer.from_pretrained(tmp_path / "salvaged").chat_template == "template of a"
