"""Ways of distilling through `kdray run`: who writes, which responses count, what changes on the way, who teaches."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from tests.support.runs import BATCH, assert_nothing_left, check_ledger, finish, json_lines, start, wait_for_lines, write_recipe

SFT = {"steps": 20, "batch_size": 32, "learning_rate": 3e-3}


@pytest.mark.full
def test_shares_filters_schedules_and_a_second_stage_in_one_run(workplace: Path, marker: str) -> None:
    """Data, teacher, mixture write; some responses are left out; alpha and the loss change; fine-tuning is interrupted."""
    recipe = write_recipe(
        workplace,
        "modes",
        rollout={
            "max_new_tokens": 4,
            "alpha": 0.4,
            "data_share": 0.25,
            "teacher_share": 0.25,
            "filters": {"finished": True, "pattern": "^[a-m]"},
        },
        loss={"type": "jsd", "beta": 0.9},
        training={
            "steps": 12,
            "batch_size": BATCH,
            "learning_rate": 3e-3,
            "checkpoint_every": 10,
            "sft": SFT,
            "finetune": {"steps": 400, "batch_size": 32, "learning_rate": 1e-3},
            "schedules": {
                "loss.beta": {"type": "linear", "to": 0.3},
                "rollout.alpha": {"type": "signal", "at_zero": 0.0, "at_full": 0.8, "full": 100.0, "smoothing": 0.0},
            },
        },
    )
    run = workplace / "runs" / "modes"
    process = start("run", str(recipe))
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "step-000023" / "COMMITTED.json").exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "of fine-tuning after writing a checkpoint" in finish(process, 130)
    before = (run / "metrics.jsonl").read_text()
    finish(start("run", str(recipe), "--resume", "training.finetune.steps=400"), 0)
    assert (run / "metrics.jsonl").read_text() == before, "distillation was repeated"
    check_ledger(run, 12)
    metrics, ledger = json_lines(run / "metrics.jsonl"), json_lines(run / "ledger.jsonl")
    assert [line["schedule/loss.beta"] for line in metrics] == pytest.approx([0.9 - 0.05 * step for step in range(12)])
    alphas = [line["schedule/rollout.alpha"] for line in metrics]
    # One step of staleness: the batch of step s was admitted knowing the divergence of step s - 2.
    assert alphas[:2] == [0.4, 0.4]
    assert alphas[2:] == pytest.approx([0.8 * line["reverse_kl"] / 100.0 for line in metrics[:10]])
    for line, entry in zip(metrics, ledger, strict=True):
        left_out = {rule: len(ids) for rule, ids in entry.get("dropped", {}).items()}
        assert sum(left_out.values()) == round(BATCH * line.get("filtered", 0.0))
        assert {rule: round(BATCH * line[f"filtered/{rule}"]) for rule in left_out} == left_out
    assert sum("pattern" in entry.get("dropped", {}) for entry in ledger) > 6
    rows = pq.ParquetDataset(run / "samples").read().to_pylist()
    trained = [row for row in rows if row["source"] == "train"]
    answers = {line["question"]: line["answer"] for line in json_lines(workplace / "prompts.jsonl")}
    written = [row for row in trained if row["writer"] == "data"]
    assert written
    assert all(row["response"] == answers[row["prompt"]] for row in written)
    assert {(1.0, "teacher"), (0.4, "mixture"), (0.0, "data")} <= {(row["alpha"], row["writer"]) for row in trained}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed_from_step"] >= 23
    assert summary["after"]["reverse_kl"] != summary["distilled"]["reverse_kl"]
    assert summary["distilled"]["reverse_kl"] < summary["before"]["reverse_kl"]
    assert_nothing_left(marker)


@pytest.mark.full
def test_a_dataset_alone_teaches_the_teachers_law(workplace: Path, marker: str) -> None:
    """Classical distillation: nobody samples. The same from a capture of the teacher's scores, with no teacher running."""
    sections = {
        # The student's own top ids are no part of a capture.
        "rollout": {"data_share": 1, "max_new_tokens": 8, "student_top_k": 0},
        "loss": {"type": "hinton", "temperature": 2},
    }
    recipe = write_recipe(workplace, "classical", **sections)
    finish(start("run", str(recipe)), 0)
    captured = workplace / "references"
    finish(start("capture", str(recipe), "--to", str(captured)), 0)
    finish(start("run", str(_captured(workplace, "fixed", captured, sections))), 0)
    live, offline = (json_lines(workplace / "runs" / name / "metrics.jsonl") for name in ("classical", "fixed"))
    assert [line["loss"] for line in offline] == pytest.approx([line["loss"] for line in live], rel=1e-4)
    run = workplace / "runs" / "classical"
    check_ledger(run, 12)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["forward_kl"] < summary["before"]["forward_kl"]
    assert all("importance_weight_mean" not in line for line in json_lines(run / "metrics.jsonl"))


def _captured(workplace: Path, name: str, captured: Path, sections: dict[str, Any]) -> Path:
    """The recipe with recorded answers in the teacher's place."""
    path = write_recipe(workplace, name, **sections)
    tree = yaml.safe_load(path.read_text())
    tree["teachers"] = {"main": {"type": "capture", "path": str(captured)}}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.full
def test_the_teachers_texts_and_real_data_with_votes(workplace: Path, marker: str) -> None:
    """Sequence level: siblings vote, one of equal answers is trained, the data's own are kept."""
    filters = {"agreement": "majority", "distinct": True}
    recipe = write_recipe(
        workplace,
        "response",
        rollout={"alpha": 1, "data_share": 0.3, "samples_per_prompt": 4, "max_new_tokens": 8, "filters": filters},
        loss={"type": "sequence"},
    )
    finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "response"
    check_ledger(run, 12)
    dropped = [entry["dropped"] for entry in json_lines(run / "ledger.jsonl")]
    assert all({"agreement", "distinct"} & rules.keys() for rules in dropped)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["forward_kl"] < summary["before"]["forward_kl"]


@pytest.mark.full
def test_the_students_own_average_teaches_and_survives_a_resume(workplace: Path, marker: str) -> None:
    recipe = write_recipe(
        workplace,
        "average",
        teachers={"main": {"type": "self", "every": 2, "decay": 0.5, "kv_cache_gib": 0.2}},
        rollout={"data_share": 1, "max_new_tokens": 8},
        loss={"type": "hinton", "temperature": 1},
        training={"steps": 6, "batch_size": BATCH, "learning_rate": 3e-3, "checkpoint_every": 6, "sft": SFT},
    )
    finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "average"
    # Renewed with versions 2, 4 and 6: nearer to the last student than the first one, which it began as, and not the last.
    (saved,) = (run / "checkpoints" / "step-000006").rglob("average.safetensors")
    average = load_file(saved)
    begun = load_file(run / "checkpoints" / "sft" / "model.safetensors")
    final = load_file(run / "student" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    whole = (final[name] - begun[name]).norm()
    assert 0.05 * whole < (average[name] - begun[name]).norm() < 0.95 * whole
    assert (average[name] - final[name]).norm() < 0.95 * whole
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["reverse_kl"] < 1e-4, "the teacher is not the student as distillation began"
    assert summary["after"]["reverse_kl"] > 1e-4
    finish(start("run", str(recipe), "training.steps=8", "--resume"), 0)
    check_ledger(run, 8)
    # A resume publishes the average as the checkpoint holds it: the distance measured again is the one of before.
    signals = [line for line in json_lines(run / "events.jsonl") if line["kind"] == "signals"]
    assert signals[0]["student_reverse_kl"] == pytest.approx(0.0, abs=1e-4)
    assert signals[1]["student_reverse_kl"] > 1e-4
    assert_nothing_left(marker)


def test_two_students_teach_each_other(workplace: Path, marker: str) -> None:
    """Both learn, each in its own folder; an interruption leaves a checkpoint of both, and both go on from it. The run's own
    student has a control, which is measured by the other one and begins when that has been measured."""
    recipe = write_recipe(
        workplace,
        "mutual",
        teachers={"main": {"type": "peer", "model": str(workplace / "teacher"), "kv_cache_gib": 0.2}},
        rollout={"data_share": 0.5, "alpha": 0, "max_new_tokens": 8},
        loss={"type": "jsd"},
        training={"steps": 40, "batch_size": BATCH, "learning_rate": 1e-3, "sft": SFT},
        evaluation={"control": True},
        cluster={"local_cpus": 6},
    )
    runs = [workplace / "runs" / "mutual", workplace / "runs" / "mutual" / "peers" / "main"]
    process = start("run", str(recipe))
    for run in runs:
        wait_for_lines(process, run / "metrics.jsonl", 3)
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    stopped = [max(int(folder.name[5:]) for folder in run.glob("checkpoints/step-*")) for run in runs]
    assert min(stopped) >= 3
    finish(start("run", str(recipe), "training.steps=45", "--resume"), 0, timeout_s=400)
    for run, first in zip(runs, stopped, strict=True):
        check_ledger(run, 45)
        summary = json.loads((run / "summary.json").read_text())
        assert summary["resumed_from_step"] == first
        assert (run / "report.html").exists()
        # Each moved from where it began towards the other, which moved too.
        assert summary["after"]["reverse_kl"] < summary["before"]["reverse_kl"]
        begun, ended = (load_file(path)["model.norm.weight"] for path in _weights(run))
        assert not np.allclose(begun, ended)
    own, other = (json.loads((run / "summary.json").read_text()) for run in runs)
    assert own["control"]["trained_tokens"] >= own["trained_tokens"] > 0
    assert own["control"]["reverse_kl"] > 0
    assert other["control"] is None
    assert_nothing_left(marker)


def _weights(run: Path) -> list[Path]:
    return [run / "checkpoints" / "sft" / "model.safetensors", run / "student" / "model.safetensors"]


@pytest.mark.full
def test_the_same_model_teaches_with_the_answer_before_its_eyes(workplace: Path, marker: str) -> None:
    """A model that has learnt to stop behind an answer stops where it reads one, and the student learns to without."""
    recipe = write_recipe(
        workplace,
        "privileged",
        student={"model": str(workplace / "teacher")},
        teachers={"main": {"type": "self", "prompt_template": "{prompt}{answer}", "kv_cache_gib": 0.2}},
        rollout={"sampler": "student", "max_new_tokens": 8, "pool": {"kv_cache_gib": 0.2}},
        training={"steps": 12, "batch_size": BATCH, "learning_rate": 3e-3, "sft": {"steps": 0}},
        loss={"type": "reverse_kl"},
        cluster={"local_cpus": 4},
    )
    finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "privileged"
    check_ledger(run, 12)
    metrics = json_lines(run / "metrics.jsonl")
    assert metrics[0]["reverse_kl_support"] > 1, "the teacher reads what the student reads"
    assert np.mean([line["reverse_kl_support"] for line in metrics[-3:]]) < 0.1 * metrics[0]["reverse_kl_support"]
    assert_nothing_left(marker)
