"""A run whose student is a frozen model with a low-rank adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.runs import BATCH, assert_nothing_left, check_ledger, finish, json_lines, start, write_recipe


@pytest.mark.full
def test_a_run_trains_an_adapter_and_leaves_it_beside_the_merged_model(workplace: Path, marker: str) -> None:
    """Warm-up, distillation on two ranks, a resume: replicas hold what is trained, and only adapted layers have moved."""
    recipe = write_recipe(
        workplace,
        "adapted",
        rollout={"max_new_tokens": 8},
        training={
            "lora": {"rank": 8, "alpha": 16},
            "learning_rate": 1e-2,
            "batch_size": BATCH,
            "checkpoint_every": 6,
            "ranks": 2,
            "zero_stage": 2,
            "sft": {"steps": 20, "batch_size": 32, "learning_rate": 1e-2},
        },
        cluster={"local_cpus": 5},
    )
    finish(start("run", str(recipe)), 0)
    finish(start("run", str(recipe), "--resume", "training.steps=16"), 0)
    run = workplace / "runs" / "adapted"
    check_ledger(run, 16)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed_from_step"] == 12
    gaps = [row["parity_gap"] for row in json_lines(run / "metrics.jsonl") if row.get("parity_gap") is not None]
    assert gaps
    assert max(gaps) < 1e-4
    assert not [event for event in json_lines(run / "events.jsonl") if event["kind"] == "version_refused"]
    # Whole at the start of the phase and after the resume, told by the step after it, or by two if the next is under way.
    moved = {row["step"]: row["update_bytes"] / row["published_bytes"] for row in json_lines(run / "metrics.jsonl")}
    assert {1, 13} <= {step for step, share in moved.items() if share > 1.0} <= {1, 2, 13, 14}
    assert max(share for share in moved.values() if share < 1.0) < 0.94, "embeddings and norms stay"

    merged, base = (load_file(folder / "model.safetensors") for folder in (run / "student", workplace / "student"))
    adapter = load_file(run / "student" / "adapter" / "adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") + ".weight" for name in adapter}
    assert {name for name in base if not torch.equal(base[name], merged[name])} == adapted
    for name in adapted:
        a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(merged[name], base[name] + 2.0 * b @ a, rtol=1e-5, atol=1e-5)
    frozen = base["model.embed_tokens.weight"].numpy().tobytes()
    files = [path for path in (run / "checkpoints" / "step-000016").rglob("*") if path.is_file()]
    assert not [path for path in files if frozen in path.read_bytes()], "a checkpoint holds the adapter alone"
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workplace / "student"), run / "student" / "adapter")
    exported, ids = AutoModelForCausalLM.from_pretrained(run / "student"), torch.arange(1, 20)[None]
    torch.testing.assert_close(peft(ids).logits, exported(ids).logits, rtol=0, atol=2e-5)
    assert_nothing_left(marker)
