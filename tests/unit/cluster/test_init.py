"""`kdray init`: the recipes are those of `configs/`, in a clone and in an installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.jobs.package import build_wheel
from kdray.config import load_config
from kdray.config.shipped import recipes, stories

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in CONFIGS.rglob("*.yaml")}


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["init", *arguments])


def test_every_recipe_is_shipped_and_told_of() -> None:
    assert {name: path.read_text() for name, path in recipes().items()} == {
        name: path.read_text() for name, path in FILES.items()
    }
    assert set(stories()) == set(FILES), "one row of configs/README.md a recipe, and none for what is not there"
    assert stories()["gkd"] == ("half student samples, half data, generalised JSD", "any machine, minutes")
    assert not [told for told in stories().values() if "](" in " ".join(told) or not all(told)]


def test_they_are_listed() -> None:
    result = call()
    assert result.exit_code == 0, result.output
    assert [line.split(" ")[0] for line in result.stdout.splitlines() if not line.startswith(" ")] == list(stories())
    assert "adapter" in result.stdout


def test_a_recipe_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, file in (("gkd", "gkd.yaml"), ("configs/models/qwen3.yaml", "qwen3.yaml")):
        result = call(words)
        assert (result.exit_code, result.stdout) == (0, f"{file}\n"), result.output
        head, _, rest = Path(file).read_text().partition("\n")
        assert head.startswith("# ")
        assert "kdray init" in head
        assert rest == (CONFIGS / words.removeprefix("configs/")).with_suffix(".yaml").read_text()
    assert load_config("gkd.yaml").rollout.data_share == load_config(CONFIGS / "gkd.yaml").rollout.data_share
    (tmp_path / "gkd.yaml").write_text("mine")
    again = call("gkd")
    assert again.exit_code == 2
    assert "gkd.yaml: is there already, and nothing is overwritten; name another file: --to FILE" in again.stderr
    assert (tmp_path / "gkd.yaml").read_text() == "mine"
    assert call("gkd", "--to", "other.yaml").stdout == "other.yaml\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gdk"], "gdk: no recipe of that name; did you mean gkd"),
        (["../README.md"], "../README.md: no recipe of that name; `kdray init` lists them"),
        (["gkd", "--to", "nowhere/gkd.yaml"], "nowhere/gkd.yaml: cannot be written: No such file or directory"),
        (["--to", "x.yaml"], "--to x.yaml: nothing says which recipe"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_is_not_here_but_came_with_kdray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["validate", "configs/reward.yaml"])
    assert result.exit_code == 2
    assert "configs/reward.yaml: no such config file; `kdray init reward` writes the recipe of that name" in result.stderr
    assert "init" not in CliRunner().invoke(app, ["validate", "mine.yaml"]).stderr


def test_a_wheel_without_a_clone_has_them(tmp_path: Path) -> None:
    """Everything that a recipe needs to load, from the unpacked wheel alone."""
    (tmp_path / "build").mkdir()
    target, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(build_wheel(CONFIGS.parent, tmp_path / "build")).extractall(target)
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"kdray", "actors", "cluster"}
    program = (
        "import kdray, sys; from cluster.cli import app; print(kdray.__file__)\n"
        "for words in (['init', 'quickstart'], ['init', 'clusters/one_node_4_h100']):\n    app(words, standalone_mode=False)\n"
        "print(kdray.load_config('quickstart.yaml').run.name)"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=work, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    file, *told = done.stdout.splitlines()
    assert Path(file).is_relative_to(target)
    assert told == ["quickstart.yaml", "one_node_4_h100.yaml", "quickstart"]
    shipped = {
        path.relative_to(target / "kdray/recipes").with_suffix("").as_posix() for path in target.rglob("recipes/**/*.yaml")
    }
    assert shipped == set(FILES)
