"""A distribution of its own adds kinds: a whole run with them, from the recipe to the proof of its files, without Ray."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdray.config import PretrainingSettings, TinyModel, load_config
from kdray.data.dataset import load_dataset
from kdray.data.pretraining import load_windows
from kdray.models.resolve import build_tiny_model, model_name, task_tokenizer
from kdray.runs.folder import read_lines
from kdray.runs.verify import verify
from tests.support.plugins import write_distribution
from tests.support.stub_run import drive, stub_config

PLUGGED: dict[str, Any] = {
    "run": {"trackers": ["tensorboard", {"type": "csv", "file": "all.csv"}]},
    "data": {"prompts": {"type": "task", "tasks": ["reversal", "arithmetic"], "size": 48}, "grader": "contains"},
    "rollout": {"filters": {"finished": False, "distinct": True, "rules": [{"type": "repetition", "longest": 1}]}},
    "training": {"steps": 30},
}


def recipe(tmp_path: Path, **sections: Any) -> Path:
    """The stub run's config with kinds of the plugin, as a file."""
    tree = stub_config(tmp_path / "runs").model_dump(mode="json")
    for section, values in {**PLUGGED, **sections}.items():
        tree[section] |= values
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


async def test_a_run_with_the_kinds_of_a_plugin(tmp_path: Path, example_plugin: Path) -> None:
    config = load_config(recipe(tmp_path))
    summary = await drive(config)
    assert summary["lost_samples"] == 0
    run = config.run_folder
    ledger = read_lines(run / "ledger.jsonl")
    left_out = [sample_id for line in ledger for sample_id in line.get("dropped", {}).get("repetition", [])]
    assert left_out, "the plugin's filter left nothing out"
    metrics = read_lines(run / "metrics.jsonl")
    assert sum(line.get("filtered/repetition", 0.0) for line in metrics) * 8 == pytest.approx(len(left_out))
    proof = verify(run)
    assert proof.problems == []
    assert any(str(len(left_out)) in value and "repetition" in value for name, value in proof.facts if name == "left out")
    rows = list(csv.reader((run / "all.csv").open()))
    losses = {int(step): float(value) for phase, step, name, value in rows if (phase, name) == ("distill", "loss")}
    assert losses == {line["step"]: line["loss"] for line in metrics}
    assert rows[-1] == ["summary", "30", "lost_samples", "0"]
    assert load_config(run / "config.yaml") == config


async def test_a_rule_that_the_config_does_not_have_is_found_out(tmp_path: Path, example_plugin: Path) -> None:
    config = load_config(recipe(tmp_path))
    await drive(config)
    stored = config.run_folder / "config.yaml"
    stored.write_text(stored.read_text().replace("type: repetition\n      longest: 1", "type: distinct"))
    assert ("rule", "repetition") in {(kind, what.split("'")[1]) for kind, what in verify(config.run_folder).problems}


def test_prompts_of_a_plugins_task_are_generated_graded_and_shared(tmp_path: Path, example_plugin: Path) -> None:
    data = load_dataset(load_config(recipe(tmp_path)), task_tokenizer())
    assert {prompt.domain for prompt in data.train} == {"reversal", "arithmetic"}
    assert data.grade is not None
    one = next(prompt for prompt in data.train if prompt.domain == "reversal")
    assert one.answer == one.text.removeprefix("reverse: ").removesuffix(" = ")[::-1]
    assert data.grade(one, f"It is {str(one.answer).upper()}!")
    exact = load_dataset(load_config(recipe(tmp_path), ["data.grader=null"]), task_tokenizer())
    assert exact.grade is not None
    assert not exact.grade(one, f"It is {one.answer}!")
    assert exact.grade(one, f" {one.answer} ")


def test_a_tiny_model_learns_a_plugins_task_and_is_another_with_another_version(
    tmp_path: Path, example_plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"tasks": ["reversal", "letters_join"], "steps": 2, "batch_size": 2}
    model = TinyModel.model_validate({"type": "tiny", "layers": 1, "width": 32, "train": train})
    assert (build_tiny_model(model, tmp_path / "model") / "config.json").is_file()
    before = model_name(model)
    points = {"kdray.tasks": {"reversal": "kdray_example.task:Reversal"}}
    write_distribution(tmp_path / "newer", "kdray-example", points, {}, version="0.2.0")
    monkeypatch.syspath_prepend(str(tmp_path / "newer"))
    assert model_name(model) != before


def test_a_plugins_task_as_pretraining_text(example_plugin: Path) -> None:
    settings = PretrainingSettings.model_validate({"source": {"type": "task", "tasks": ["reversal"], "size": 5}})
    first = task_tokenizer().decode(load_windows(settings, task_tokenizer(), seed=0)[0].token_ids)
    assert first.startswith("reverse: ")


def test_other_processes_find_the_plugin_and_without_it_the_recipe_is_refused(
    tmp_path: Path, example_plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys; from kdray.config import load_config; print(load_config(sys.argv[1]).data.grader.type)"
    command = [sys.executable, "-c", program, str(recipe(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("contains\n", 0), done.stderr
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", str(root))
    command = [sys.executable, "-m", "cluster.cli", "validate", str(recipe(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    for line in (
        "run.trackers.1.type='csv': no installed tracker has this name; there are mlflow, prometheus, tensorboard, wandb",
        "data.grader.type='contains': no installed grader has this name; there are exact, last_number,",
        "data.prompts.tasks.0='reversal': no installed task has this name; there are arithmetic,",
        "rollout.filters.rules.0.type='repetition': no installed filter has this name; there are agreement,",
    ):
        assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_the_example_names_only_what_it_holds(example_plugin: Path) -> None:
    """Every entry point of the example can be loaded: what the documentation shows works."""
    from kdray.config.registry import REGISTRIES, all_plugins

    mine = [plugin for plugin in all_plugins() if plugin.distribution == "kdray-example"]
    assert {f"kdray.{group}" for group in ("tasks", "graders", "filters", "environments", "trackers")} <= {
        plugin.group for plugin in mine
    }
    for plugin in mine:
        assert REGISTRIES[plugin.group].get(plugin.name).__module__.startswith("kdray_example")
        assert plugin.version == "0.1.0"
