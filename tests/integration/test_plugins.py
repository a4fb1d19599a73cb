"""A run on real engines with kinds of another distribution, one of every sort."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from kdray.config import TinyModel
from kdray.models.resolve import build_tiny_model
from tests.support.runs import assert_nothing_left, check_ledger, finish, json_lines, start, write_recipe


def test_a_run_trains_with_every_kind_of_another_distribution(tmp_path: Path, marker: str, example_plugin: Path) -> None:
    build_tiny_model(TinyModel(type="tiny", layers=2, width=64, seed=2), tmp_path / "student")
    recipe = write_recipe(
        tmp_path,
        "plugged",
        # The first cannot write where it is told to, which is no reason to end.
        run={"trackers": [{"type": "csv", "file": "no/such/folder.csv"}, "csv"]},
        data={"prompts": {"type": "task", "tasks": ["reversal"], "size": 200}, "grader": "contains"},
        teachers={"main": {"type": "oracle", "doubt": 0.05}},
        loss={"type": "hellinger"},
        rollout={
            "sampler": "student",
            "max_staleness": 0,
            "max_new_tokens": 6,
            "pool": {"kv_cache_gib": 0.2},
            "environment": {"type": "hints", "marks": "aeiou", "max_turns": 3, "max_reply_tokens": 1},
            "filters": {"finished": False, "rules": [{"type": "repetition", "longest": 2}]},
        },
        training={
            "backend": {"type": "momentum", "momentum": 0.8},
            "learning_rate": 0.05,
            "sft": {"steps": 20, "batch_size": 32, "learning_rate": 0.05},
        },
    )
    finish(start("run", str(recipe)), 0)
    run = tmp_path / "runs" / "plugged"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["plugins"] == {"kdray-example": "0.1.0"}
    assert {"exact_match"} <= summary["before"].keys() & summary["after"].keys(), "the grader was not asked"
    assert "deepspeed" not in summary["versions"], "the run did not use it"
    check_ledger(run, 12)
    metrics = json_lines(run / "metrics.jsonl")
    assert max(line.get("environment_tokens", 0.0) for line in metrics) > 0.0, "the environment was not asked"
    losses = [line["loss"] for line in metrics]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    assert all(0.0 <= loss <= 1.0 for loss in losses), "squared Hellinger distances"
    rows = list(csv.reader((run / "numbers.csv").open()))
    assert {int(step): float(value) for phase, step, name, value in rows if (phase, name) == ("distill", "loss")} == {
        line["step"]: line["loss"] for line in metrics
    }
    (failed,) = (event for event in json_lines(run / "events.jsonl") if event["kind"] == "tracker_failed")
    assert (failed["tracker"], failed["during"]) == ("csv", "start")
    finish(start("verify", str(run)), 0)
    assert_nothing_left(marker)


@pytest.mark.full
def test_prompts_of_a_file_are_graded(workplace: Path) -> None:
    """`kdray eval` of a model that was taught the task, against the answers in a JSONL file."""
    recipe = write_recipe(
        workplace,
        "graded",
        data={"prompts": {"type": "jsonl", "path": str(workplace / "prompts.jsonl")}, "heldout_size": 48, "grader": "exact"},
        student={"model": str(workplace / "teacher")},
    )
    output = finish(start("eval", str(recipe)), 0)
    (share,) = (line.replace("│", " ").split()[1] for line in output.splitlines() if "exact_match" in line)
    assert 0.0 < float(share) <= 1.0, output
    refusal = finish(start("eval", str(recipe), "data.grader=last_number"), 2)
    assert "data.grader.type=last_number on prompt" in refusal
    assert "no number in the reference answer" in refusal
