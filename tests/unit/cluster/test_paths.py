"""Relative paths of a recipe lead to its files from any folder, and those of a run to what it was started with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from kdray.checks.inputs import installation
from kdray.config import load_config, parse_config
from kdray.errors import ConfigError
from kdray.runs.folder import RunFolder

RECIPE = """
run: {name: trial}
data: {prompts: {type: jsonl, path: rows.jsonl}}
student: {model: small}
teachers: {kept: {type: capture, path: answers, model: large}}
training: {pretraining: {source: {type: jsonl, path: text.jsonl}}}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a recipe and all that it names."""
    home = tmp_path / "home"
    for name in ("small", "large", "answers"):
        (home / name).mkdir(parents=True)
    for name in ("rows.jsonl", "text.jsonl"):
        (home / name).write_text('{"prompt": "a"}\n')
    (home / "recipe.yaml").write_text(RECIPE)
    return home


def paths(config: Any) -> list[str]:
    teacher = config.teachers["kept"]
    found = (
        config.data.prompts.path,
        config.student.model,
        teacher.path,
        teacher.model,
        config.training.pretraining.source.path,
    )
    return [str(path) for path in found]


NAMES = ["rows.jsonl", "small", "answers", "large", "text.jsonl"]


def test_a_recipes_files_may_stand_beside_it(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert paths(load_config("recipe.yaml")) == NAMES
    monkeypatch.chdir(tmp_path)
    found = load_config("home/recipe.yaml", ["student.model=large"])
    assert paths(found) == [f"home/{name}" for name in ["rows.jsonl", "large", *NAMES[2:]]]


def test_what_is_in_the_working_directory_comes_first_and_what_is_nowhere_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (home / "large").rmdir()
    found = load_config("home/recipe.yaml", ["student.model=org/name"])
    assert paths(found) == ["rows.jsonl", "org/name", "home/answers", "large", "home/text.jsonl"]


def test_the_home_folder_is_expanded_everywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    keys = [
        "data.prompts.path", "student.model", "teachers.kept.path", "teachers.kept.model", "training.pretraining.source.path",
    ]  # fmt: skip
    found = load_config(home / "recipe.yaml", [f"{key}=~/{name}" for key, name in zip(keys, NAMES, strict=True)])
    assert paths(found) == [str(home / name) for name in NAMES]
    found = load_config(home / "recipe.yaml", ["data.prompts={type: hub, name: ~/gsm8k}"])
    assert found.data.prompts.name == str(home / "gsm8k")
    found = load_config(home / "recipe.yaml", ["data.prompts={type: hub, name: openai/gsm8k}"])
    assert found.data.prompts.name == "openai/gsm8k"


def test_a_runs_folder_may_lie_in_the_home_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    config = load_config(home / "recipe.yaml", ["run.output=~/kept"])
    folder = RunFolder.create(config)
    assert folder.path == home / "kept" / "trial"
    assert not (tmp_path / "~").exists()
    folder.check_resumable(config)
    # As another machine reads it, whose home folder is another.
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder.open(folder.path).load_config().run.output == home / "kept"
    pruned = load_config(home / "recipe.yaml", ["student.model={type: pruned, source: ~/small, layers: 2}"])
    assert pruned.student.model.source == str(tmp_path / "small")


def test_a_home_folder_that_there_is_not_is_refused(home: Path) -> None:
    for key in ("run.output", "student.model", "data.prompts.name"):
        with pytest.raises(ConfigError, match=rf"{key}: .*~nobody-of-that-name/x: .*; give the path without `~`"):
            load_config(home / "recipe.yaml", ["data.prompts={type: hub, name: set}", f"{key}=~nobody-of-that-name/x"])


def test_a_config_of_a_program_has_no_folder_of_its_own(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"run": {"name": "x"}, "student": {"model": "small"}, "teachers": {"t": {"model": "large"}}}
    assert parse_config(tree).student.model == "small"


def test_a_run_is_measured_from_another_folder_with_the_models_that_it_was_started_with(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    folder = RunFolder.create(load_config("recipe.yaml"))
    recorded = installation(SimpleNamespace(config=load_config("recipe.yaml")))  # type: ignore[arg-type]
    folder.append_event("start", resumed_step=None, **recorded)
    folder.student.mkdir()
    (folder.student / "COMMITTED.json").write_text('{"files": {}}')
    monkeypatch.chdir(tmp_path)
    assert paths(RunFolder.open("home/runs/trial").load_config()) == [str(home / name) for name in NAMES]
    seen: list[Any] = []
    monkeypatch.setattr("cluster.launch.evaluate", lambda config, student, on_phase: seen.append((config, student)) or {})
    monkeypatch.setattr("cluster.cli.finished_student", lambda path: path / "student")
    result = CliRunner().invoke(app, ["eval", "home/runs/trial"])
    assert result.exit_code == 0, result.output
    assert paths(seen[0][0]) == [str(home / name) for name in NAMES]


def test_a_run_of_before_has_its_paths_as_they_are(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    folder = RunFolder.create(load_config("recipe.yaml"))
    folder.append_event("start", resumed_step=None)
    assert paths(folder.load_config()) == NAMES
