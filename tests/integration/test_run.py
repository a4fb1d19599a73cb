"""`kdray run` as a user starts it: own folders and files, a whole run, an interruption, a resume, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdray.config import TinyModel
from kdray.data.tasks import generate_examples
from kdray.runs.folder import RunFolder
from kdray.runs.metrics import METRICS
from tests.support.runs import (
    BATCH,
    assert_nothing_left,
    check_ledger,
    finish,
    json_lines,
    of_the_run,
    reachable_from_outside,
    start,
    wait_for_lines,
    write_recipe,
)

DASHBOARD = Path(__file__).parents[2] / "cluster" / "manifests" / "grafana-dashboard.json"


def test_a_run_from_own_folders(workplace: Path, marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(workplace / "extensions"))
    recipe = write_recipe(workplace, "whole", rollout={"max_new_tokens": 8, "max_staleness": 2}, evaluation={"control": True})
    output = finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "whole"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["reverse_kl"] < 0.8 * summary["before"]["reverse_kl"], output[-3000:]
    assert summary["steps"] == 12
    assert summary["prompts_consumed"] == 12 * BATCH
    assert summary["lost_samples"] == summary["duplicated_samples"] == 0
    assert summary["control"]["trained_tokens"] >= summary["trained_tokens"]
    assert {"ray", "torch", "transformers", "deepspeed", "pyarrow"} <= set(summary["versions"])
    check_ledger(run, 12)
    metrics = json_lines(run / "metrics.jsonl")
    for line in metrics:
        assert line["staleness_max"] <= 2
        assert 0 < line["importance_weight_mean"] <= 1.25
        assert line["importance_weight_ess"] <= 1.0 + 1e-6
        assert {"loss", "reverse_kl", "forward_kl", "tokens_per_s", "wait_rollout_s", "wait_sync_s"} <= set(line)
    shares = [value for line in metrics for name, value in line.items() if name.endswith("/pass_share")]
    assert 0.0 < shares[0] < 1.0, "the evaluation before the first step drew from the student alone"
    assert set(shares[1:]) == {1.0}, "the mixture is drawn from both models"
    assert any(line["staleness_max"] > 0 for line in metrics), "sampling never overlapped training"
    written = {name.rpartition("/")[2] for line in metrics for name in line if "/staleness_" not in name}
    assert written - {"step", "time"} <= set(METRICS)
    # Of what the dashboard shows, this recipe filters nothing.
    shown = set(re.findall(r"ray_kdray_(\w+)\{", DASHBOARD.read_text())) - {"step", "events_total", "filtered"}
    assert shown <= written
    weights = (workplace / "student" / "model.safetensors").stat().st_size
    assert metrics[-1]["published_bytes"] == pytest.approx(weights, rel=0.05)
    samples = pq.read_table(run / "samples")
    assert samples.num_rows > 0
    assert samples.column("reference").null_count == 0, "training samples have their prompts' answers, too"
    assert (run / "report.html").stat().st_size > 10_000
    assert any((run / "tb").rglob("events.out.tfevents*"))
    (fingerprint,) = json.loads((run / "teachers.json").read_text()).values()
    assert len(fingerprint["scores"]) == len(fingerprint["canary"]) - 1 == 63
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(run / "student")
    original = AutoModelForCausalLM.from_pretrained(workplace / "student")
    assert any((a != b).any() for a, b in zip(exported.parameters(), original.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(run / "student").eos_token_id == 1
    assert "reverse_kl" in output
    assert not (workplace / "extensions").exists(), "something was compiled, on a machine that may have no compiler"
    assert_nothing_left(marker)


def test_a_run_with_hidden_states_pretraining_text_and_inner_epochs(workplace: Path) -> None:
    """Exact JSD inside the output head, windows scored by the teacher, four updates a step: all by settings alone."""
    text = {"source": {"type": "jsonl", "path": str(workplace / "prompts.jsonl"), "column": "question"}}
    recipe = write_recipe(
        workplace,
        "hidden",
        rollout={"max_new_tokens": 8, "teacher_signal": "hidden", "teacher_top_k": 4, "student_top_k": 0},
        loss={"type": "jsd"},
        training={
            "pretraining": text | {"teacher_share": 0.5, "window_tokens": 8},
            "mini_batch_size": 16,
            "inner_epochs": 2,
            # So small at first that the first step's updates leave the student where it sampled.
            "warmup_steps": 12,
        },
    )
    finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "hidden"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["forward_kl"] < 0.8 * summary["before"]["forward_kl"]
    lines = json_lines(run / "metrics.jsonl")
    check_ledger(run, 12)
    # On full rows the ranks' KL is the engine's own at the same tokens.
    assert lines[0]["reverse_kl_support"] == pytest.approx(lines[0]["reverse_kl"], rel=0.1)
    assert all(line["teacher_head_error"] < 0.01 for line in lines)
    assert lines[-1]["pretraining_loss"] < lines[0]["pretraining_loss"]
    assert lines[-1]["pretraining_kl"] < lines[0]["pretraining_kl"]
    (signals,) = (event for event in json_lines(run / "events.jsonl") if event["kind"] == "signals")
    assert signals["prefill_gap"] < 1e-3
    assert signals["divergence_perturbed"] > 0.1


@pytest.mark.full
def test_a_run_with_features(workplace: Path, marker: str) -> None:
    """All three terms on two ranks at ZeRO 2: they fall, and what is exported and resumed is in order."""
    recipe = write_recipe(
        workplace,
        "features",
        loss={"type": "jsd"},
        training={
            "ranks": 2,
            "zero_stage": 2,
            "micro_batch_size": 8,
            "cpus_per_rank": 0.5,
            "checkpoint_every": 6,
            "features": {"hidden": {"distance": "mse"}, "attention": {}, "relation": {"distance": "distances"}},
        },
        cluster={"local_cpus": 4},
    )
    finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "features"
    check_ledger(run, 12)
    lines = json_lines(run / "metrics.jsonl")
    for name in ("feature_hidden", "feature_attention"):
        first, last = (sum(line[name] for line in part) for part in (lines[:3], lines[-3:]))
        assert last < first, name
    # Later steps may have none: the answers that are learned here have two tokens, whose one distance is its own mean.
    assert lines[0]["feature_relation"] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["reverse_kl"] < 0.8 * summary["before"]["reverse_kl"]
    from transformers import AutoModelForCausalLM

    exported, original = (AutoModelForCausalLM.from_pretrained(each) for each in (run / "student", workplace / "student"))
    assert set(exported.state_dict()) == set(original.state_dict())
    finish(start("run", str(recipe), "--resume", "training.steps=14"), 0)
    check_ledger(run, 14)
    assert_nothing_left(marker)


@pytest.mark.full
def test_a_teacher_without_a_signal_stops_the_run(workplace: Path) -> None:
    """Through real replicas: a uniform teacher is refused with the reason, before the first step."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workplace / "teacher")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    shutil.copytree(workplace / "teacher", workplace / "silent")
    model.save_pretrained(workplace / "silent")
    recipe = write_recipe(workplace, "silent", teachers={"main": {"model": str(workplace / "silent"), "kv_cache_gib": 0.2}})
    output = finish(start("run", str(recipe)), 1)
    assert "teacher main: its rows are uniform" in " ".join(output.split())
    assert "teachers.main.model" in output
    assert not (workplace / "runs" / "silent" / "summary.json").exists()
    assert json_lines(workplace / "runs" / "silent" / "events.jsonl")[-1]["kind"] == "failed"


@pytest.mark.full
@pytest.mark.parametrize(("student", "low", "high"), [("teacher", -1e-5, 1e-5), ("student", 0.1, 50.0)])
def test_doctor_measures_a_student_through_the_real_teacher(workplace: Path, student: str, low: float, high: float) -> None:
    """A student that is the teacher has no divergence from it; another one has."""
    recipe = write_recipe(workplace, f"doctor-{student}", student={"model": str(workplace / student)})
    output = " ".join(finish(start("doctor", str(recipe)), 0).split())
    assert "ok teacher main:" in output
    assert low < float(output.partition("student_reverse_kl ")[2].split(",")[0]) < high


def test_the_same_folder_is_not_written_twice(workplace: Path) -> None:
    (workplace / "runs" / "taken").mkdir(parents=True)
    (workplace / "runs" / "taken" / "config.yaml").write_text("run: {name: taken}\n")
    output = finish(start("run", str(write_recipe(workplace, "taken"))), 2)
    assert "taken" in output
    assert "--resume" in output


@pytest.mark.full
def test_a_run_whose_rank_hangs_has_ended_when_the_kill_would_come(workplace: Path, marker: str) -> None:
    """As on a spot instance: the signal, and `cluster.grace_s` later the end of the machine."""
    grace_s, training = 20.0, {"steps": 500, "batch_size": BATCH, "learning_rate": 1e-3, "checkpoint_every": 4}
    recipe = write_recipe(workplace, "evicted", training=training, cluster={"grace_s": grace_s})
    process = start("run", str(recipe))
    run = workplace / "runs" / "evicted"
    wait_for_lines(process, run / "metrics.jsonl", 6)
    (rank,) = (each for each in of_the_run(marker) if "ray::RayTrainWorker" in " ".join(each.cmdline()))
    rank.send_signal(signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    finish(process, 130, 2 * grace_s)
    assert time.monotonic() - sent < grace_s
    assert json_lines(run / "events.jsonl")[-1]["reason"] == f"cluster.grace_s={grace_s:g} is over"
    assert_nothing_left(marker)
    steps = len(json_lines(run / "metrics.jsonl"))
    finish(start("run", str(recipe), f"training.steps={steps + 4}", "--resume"), 0)
    check_ledger(run, steps + 4)


@pytest.mark.full
def test_a_stop_within_a_grace_does_not_wait_for_an_evaluation(workplace: Path, marker: str) -> None:
    training = {"steps": 500, "batch_size": BATCH, "learning_rate": 1e-3, "checkpoint_every": 0}
    evaluation = {"every": 2, "samples_per_prompt": 200}
    recipe = write_recipe(workplace, "cut", training=training, evaluation=evaluation, cluster={"grace_s": 120})
    process = start("run", str(recipe))
    run = workplace / "runs" / "cut"
    wait_for_lines(process, run / "ledger.jsonl", 2, 400)
    # The line of the second step is written with the numbers of its evaluation.
    assert len(json_lines(run / "metrics.jsonl")) == 1
    process.send_signal(signal.SIGTERM)
    finish(process, 130, 120)
    assert_nothing_left(marker)
    events = json_lines(run / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "evaluation_cut"] == [2]
    assert "without_checkpoint" not in next(event for event in events if event["kind"] == "interrupt_requested")
    steps = json_lines(run / "metrics.jsonl")
    assert not [name for name in steps[1] if name.startswith("heldout/")]
    (saved,) = [event["step"] for event in events if event["kind"] == "checkpoint"]
    assert saved == len(steps)
    settings = [f"training.steps={saved + 2}", "evaluation.every=0", "evaluation.samples_per_prompt=1"]
    finish(start("run", str(recipe), *settings, "--resume"), 0)
    check_ledger(run, saved + 2)


@pytest.mark.full
def test_an_interrupted_run_ends_although_serves_controller_stands_still(workplace: Path, marker: str) -> None:
    """Its pools can then be deleted by nobody: it goes on without that, and leaves nothing."""
    training = {"steps": 500, "batch_size": BATCH, "learning_rate": 1e-3, "checkpoint_every": 4}
    recipe = write_recipe(workplace, "unserved", training=training, cluster={"teardown_s": 10})
    process = start("run", str(recipe))
    run = workplace / "runs" / "unserved"
    wait_for_lines(process, run / "metrics.jsonl", 6)
    (controller,) = (each for each in of_the_run(marker) if "ray::ServeController" in " ".join(each.cmdline()))
    controller.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    finish(process, 130, 150)
    events = json_lines(run / "events.jsonl")
    (stuck,) = [event for event in events if event["kind"] == "teardown_stuck"]
    assert stuck["waited_for"]
    assert "checkpoint" in [event["kind"] for event in events[-4:]]
    assert_nothing_left(marker)


def test_an_interrupted_run_resumes(workplace: Path, marker: str) -> None:
    """Ctrl-C in mid-run: checkpoint, exit 130, nothing left; the resumed run trains every sample exactly once, and ends within
    its warm-up."""
    training = {"steps": 60, "warmup_steps": 60, "batch_size": BATCH, "learning_rate": 1e-3, "checkpoint_every": 0}
    recipe = write_recipe(workplace, "stopped", training=training)
    process = start("run", str(recipe))
    run = workplace / "runs" / "stopped"
    wait_for_lines(process, run / "metrics.jsonl", 5)
    # Torch's rendezvous of the ranks, and the replicas' server, which wants Ray's token.
    assert reachable_from_outside(marker) <= {"ray::RayTrainWorker", "ray::ServeReplica:kdray"}
    process.send_signal(signal.SIGINT)
    output = finish(process, 130)
    assert "--resume" in output
    assert_nothing_left(marker)
    # The one of step 0, after the supervised phase, and the one of the interruption.
    stopped_at = max(int(folder.name.removeprefix("step-")) for folder in run.glob("checkpoints/step-*"))
    assert 5 <= stopped_at < 60
    finish(start("run", str(recipe), "training.steps=" + str(stopped_at + 8), "--resume"), 0)
    check_ledger(run, stopped_at + 8)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["versions"]["torch"] for event in events if event["kind"] == "start"] == [version("torch")] * 2
    # The same data, models and libraries.
    assert not {event["kind"] for event in events} & {"inputs_unknown", "versions_changed"}
    output = finish(start("export", str(run), "--to", str(workplace / "none"), "--step", "3"), 2)
    assert f"--step 3: no such checkpoint in {run.absolute().as_uri()}/checkpoints; there are those of" in output
    for step in (stopped_at, stopped_at + 8):
        finish(start("export", str(run), "--to", str(workplace / f"step-{step}"), "--step", str(step)), 0)
    final, last, stopped = (
        load_file(folder / "model.safetensors")
        for folder in (run / "student", workplace / f"step-{stopped_at + 8}", workplace / f"step-{stopped_at}")
    )
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert any(not torch.equal(final[name], stopped[name]) for name in final)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed_from_step"] == stopped_at
    assert summary["prompts_consumed"] == (stopped_at + 8) * BATCH
    assert_nothing_left(marker)


@pytest.mark.full
def test_an_interruption_while_a_model_is_trained_first_ends_in_order(workplace: Path, marker: str, tmp_path: Path) -> None:
    """The interpreter must not end under a thread in native code, which aborts the process with 134."""
    model = {"type": "tiny", "layers": 2, "width": 64, "train": {"tasks": ["last_letters"], "steps": 100_000}}
    recipe = write_recipe(workplace, "early", teachers={"main": {"model": model, "kv_cache_gib": 0.2}})
    with (tmp_path / "output").open("w+") as log:
        process = start("run", str(recipe), log=log)
        deadline = time.monotonic() + 200
        while "prepare teacher main: 100000 to do" not in (tmp_path / "output").read_text():
            assert process.poll() is None, (tmp_path / "output").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        finish(process, 130, timeout_s=120)
    output = (tmp_path / "output").read_text()
    assert "interrupted: stopped before there was anything new to save" in output
    assert "Stack trace" not in output
    assert_nothing_left(marker)
    RunFolder(workplace / "runs" / "early").check_free()


@pytest.mark.full
def test_the_same_seed_twice_is_the_same_run(workplace: Path) -> None:
    """Strictly on-policy, one rank, a reward, real engines: the same token ids in every step, losses within 1e-5."""
    for name in ("once", "again"):
        recipe = write_recipe(
            workplace,
            name,
            data={"grader": {"type": "regex", "pattern": "^(.)", "reference_pattern": "^(.)"}},
            rollout={"max_new_tokens": 8, "max_staleness": 0, "samples_per_prompt": 4},
            loss={"reward_weight": 0.5},
        )
        finish(start("run", str(recipe)), 0)
    once, again = (workplace / "runs" / name for name in ("once", "again"))
    drawn, drawn_again = ([line["responses_sha256"] for line in json_lines(run / "ledger.jsonl")] for run in (once, again))
    assert drawn == drawn_again
    assert len(set(drawn)) == 12, "the steps do not differ: nothing was compared"
    losses, losses_again = ([line["loss"] for line in json_lines(run / "metrics.jsonl")] for run in (once, again))
    assert losses == pytest.approx(losses_again, abs=1e-5, rel=0)
    rewards = json_lines(once / "metrics.jsonl")
    assert all(0.0 <= line["reward"] <= 1.0 for line in rewards)
    assert all((line["reward_contrast"] > 0) == (line["reward_gradient"] != 0) for line in rewards)
    assert any(line["reward_contrast"] for line in rewards), "no step had a reward to learn from"


@pytest.mark.full
def test_a_student_only_pool_samples_and_the_teacher_scores(workplace: Path, marker: str) -> None:
    """alpha 0 with scoring by prefill, on two kinds of replica sharing the cores; strictly on-policy."""
    recipe = write_recipe(
        workplace,
        "split",
        rollout={"max_new_tokens": 8, "sampler": "student", "max_staleness": 0, "pool": {"kv_cache_gib": 0.2}},
        loss={"type": "jsd", "beta": 0.9},
        cluster={"local_cpus": 4},
    )
    finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "split"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["reverse_kl"] < summary["before"]["reverse_kl"]
    check_ledger(run, 12)
    assert all(line["staleness_max"] == 0 for line in json_lines(run / "metrics.jsonl"))
    assert_nothing_left(marker)


@pytest.mark.full
def test_two_teachers_make_one_target_and_must_stay_the_same(workplace: Path, marker: str) -> None:
    """An ensemble in a whole run; resumed with other weights in one teacher's folder, it is refused."""
    shutil.copytree(workplace / "teacher", workplace / "second")
    teachers = {
        name: {"model": str(workplace / folder), "kv_cache_gib": 0.1}
        for name, folder in (("main", "teacher"), ("second", "second"))
    }
    recipe = write_recipe(
        workplace,
        "both",
        teachers=teachers,
        rollout={"max_new_tokens": 8, "teachers": {"type": "ensemble", "weights": {"main": 3, "second": 1}}},
        loss={"type": "reverse_kl"},
        cluster={"local_cpus": 4},
    )
    finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "both"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["reverse_kl"] < 0.8 * summary["before"]["reverse_kl"]
    check_ledger(run, 12)
    lines = json_lines(run / "metrics.jsonl")
    # Twins agree: their mean is each of them. A step has the number where something was combined since the last one.
    disagreement = [line["teacher_disagreement"] for line in lines if "teacher_disagreement" in line]
    assert disagreement
    assert max(map(abs, disagreement)) < 1e-5
    for line in lines:
        assert line["teacher/main/replicas"] == line["teacher/second/replicas"] == 1
    _other_weights(workplace / "second")
    output = " ".join(finish(start("run", str(recipe), "training.steps=14", "--resume"), 2).split())
    assert "read other inputs than there are now: teachers.second.model: model.safetensors was" in output
    assert_nothing_left(marker)


@pytest.mark.full
def test_a_model_in_the_process_and_its_recorded_answers_teach(workplace: Path, marker: str) -> None:
    """As a Hugging Face model that scores the student's samples, and as Parquet files of what it once wrote."""
    local = {"type": "hf", "model": str(workplace / "teacher")}
    pool = {"kv_cache_gib": 0.1}
    recipe = write_recipe(
        workplace,
        "local",
        teachers={"local": local},
        rollout={"max_new_tokens": 8, "sampler": "student", "pool": pool},
        loss={"type": "reverse_kl"},
    )
    finish(start("run", str(_with_teachers(recipe, {"local": local}))), 0)
    run = workplace / "runs" / "local"
    check_ledger(run, 12)
    lines = json_lines(run / "metrics.jsonl")
    assert lines[-1]["reverse_kl_support"] < 0.8 * lines[0]["reverse_kl_support"]

    asyncio.run(_record(workplace, recipe))
    captured = {"type": "capture", "path": str(workplace / "recorded")}
    rollout = {"max_new_tokens": 8, "alpha": 1.0, "max_staleness": 4, "pool": pool}
    recipe = write_recipe(workplace, "recorded", rollout=rollout, loss={"type": "forward_kl"})
    finish(start("run", str(_with_teachers(recipe, {"far": captured}))), 0)
    run = workplace / "runs" / "recorded"
    check_ledger(run, 12)
    lines = json_lines(run / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert_nothing_left(marker)


def _with_teachers(recipe: Path, teachers: dict[str, Any]) -> Path:
    """The recipe with these teachers alone."""
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"teachers": teachers}))
    return recipe


async def _record(workplace: Path, recipe: Path) -> None:
    """What the teacher writes to every training prompt of the recipe, as a capture."""
    from kdray.capturing.format import write_capture
    from kdray.checks.preflight import check
    from kdray.config import HFTeacherSettings, load_config
    from kdray.models.vocab import tokenizer_hash
    from kdray.teachers.huggingface import HFTeacher
    from kdray.types import SampleRequest

    checked = check(load_config(recipe))
    settings = HFTeacherSettings(type="hf", model=str(workplace / "teacher"), batch_size=64)
    teacher = HFTeacher("far", settings, checked.vocab_size, checked.stop_ids, teacher_top_k=16)
    await teacher.check()
    requests = [SampleRequest(i, p.prompt_id, p.token_ids, 1.0, i, 8) for i, p in enumerate(checked.dataset.train)]
    rollouts = [rollout async for part in teacher.sample(requests) for rollout in part]
    await teacher.close()
    write_capture(workplace / "recorded", rollouts, None, tokenizer_hash(checked.tokenizer), checked.vocab_size)


@pytest.mark.full
def test_a_teacher_with_another_tokenizer_teaches(workplace: Path, marker: str) -> None:
    """Byte-level pieces against characters: aligned by text, compared by rank and by the ids that both have."""
    _teacher_of_pieces(workplace / "pieces")
    recipe = write_recipe(
        workplace,
        "pieces",
        teachers={"main": {"model": str(workplace / "pieces"), "kv_cache_gib": 0.1}},
        rollout={"max_new_tokens": 8, "sampler": "student", "pool": {"kv_cache_gib": 0.1}},
        loss={"type": "uld"},
        cluster={"local_cpus": 4},
    )
    finish(start("run", str(recipe)), 0)
    run = workplace / "runs" / "pieces"
    check_ledger(run, 12)
    lines = json_lines(run / "metrics.jsonl")
    for name in ("uld", "matched_kl"):
        first, last = (sum(line[name] for line in part) for part in (lines[:3], lines[-3:]))
        assert last < 0.8 * first, name
    assert all(0.3 < line["aligned"] <= 1.0 for line in lines)
    summary = json.loads((run / "summary.json").read_text())
    assert "reverse_kl" not in summary["after"], "ids mean other things to the two: there is no KL to report"
    assert_nothing_left(marker)
    refused = " ".join(finish(start("validate", str(recipe), "loss.type=jsd"), 2).split())
    assert "tokenizers differ at" in refused
    assert "loss.type=uld" in refused


def _teacher_of_pieces(folder: Path) -> None:
    """A teacher of the same task over byte-level pieces."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from kdray.config import TinyTraining
    from kdray.models.resolve import _llama_config, _train

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    pieces.train_from_iterator([example.prompt for example in generate_examples(["last_letters"], 1, 200, seed=9)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", pad_token="</s>")
    source = TinyModel(type="tiny", layers=2, width=64)
    torch.manual_seed(4)
    model = LlamaForCausalLM(_llama_config(source, tokenizer))
    _train(model, tokenizer, source, TinyTraining(steps=150, difficulty=1), lambda step, steps: None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _other_weights(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(folder)


@pytest.mark.full
def test_a_failing_part_stops_the_run_with_the_reason(workplace: Path, marker: str) -> None:
    """A learning rate that blows up: exit 1, the batch named, the optimizer not moved, nothing left."""
    recipe = write_recipe(workplace, "blown", training={"steps": 40, "batch_size": BATCH, "learning_rate": 1e30})
    output = finish(start("run", str(recipe)), 1)
    assert "not finite" in output
    assert "samples [" in output
    assert "Traceback" not in output
    assert_nothing_left(marker)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.step=3"], "training.step: unknown key; did you mean `steps`"),
        (["teachers.main.replicas=64"], "teachers.main.replicas"),
        (["teachers.main.num_gpus=1"], "no node has that"),
        (["data.prompts.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["rollout.max_new_tokens=5000"], "positions"),
        (["cluster.address=127.0.0.1:1"], "127.0.0.1:1 does not answer"),
    ],
)
def test_bad_input_ends_with_2_before_anything_starts(workplace: Path, overrides: list[str], message: str) -> None:
    recipe = write_recipe(workplace, "bad-" + str(abs(hash(message)) % 10**6))
    output = finish(start("run", str(recipe), *overrides), 2, timeout_s=120)
    assert message in output
    assert "Traceback" not in output


def test_eval_reports_the_student_of_a_run(workplace: Path) -> None:
    """After `test_a_run_from_own_folders`: the same numbers again, from the exported student."""
    run = workplace / "runs" / "whole"
    if not (run / "summary.json").exists():
        pytest.fail("needs the run of test_a_run_from_own_folders; run the whole file")
    output = finish(start("eval", str(run)), 0)
    after = json.loads((run / "summary.json").read_text())["after"]["reverse_kl"]
    shown = [float(word) for word in output.replace("│", " ").split() if word.replace(".", "", 1).isdigit()]
    assert np.isclose(shown, after, rtol=2e-2).any(), output


@pytest.mark.full
def test_several_seeds_by_one_command(workplace: Path) -> None:
    recipe = write_recipe(workplace, "seeds", training={"steps": 2, "sft": {"steps": 2, "batch_size": 32}})
    output = finish(start("run", str(recipe), "--seeds", "2"), 0)
    found = json.loads((workplace / "runs" / "seeds" / "seeds.json").read_text())
    summaries = [
        json.loads((workplace / "runs" / "seeds" / name / "summary.json").read_text()) for name in found["runs"].values()
    ]
    kls = [summary["after"]["reverse_kl"] for summary in summaries]
    assert kls[0] != kls[1]
    assert found["results"]["after reverse_kl"]["values"] == {"0": kls[0], "1": kls[1]}
    assert "after reverse_kl" in output
    # Nothing is left to do, so nothing starts.
    output = finish(start("run", str(recipe), "--seeds", "2", "--resume"), 0)
    assert "seed 0:" not in output
    assert "after reverse_kl" in output
