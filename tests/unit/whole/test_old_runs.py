"""A run folder of kdray 0.1.0 stays readable, and may be resumed with the recipe it began with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import launch
from kdray.config import Config, load_config
from kdray.config.resuming import as_begun, changes
from kdray.errors import ConfigError
from kdray.runs.folder import RunFolder
from kdray.runs.report import write_report
from kdray.runs.verify import verify

OLD = Path(__file__).parents[2] / "support" / "old_run"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shutil.copytree(OLD / "run", tmp_path / "old-run")
    tree = yaml.safe_load((OLD / "recipe.yaml").read_text())
    tree["run"]["output"] = str(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


def test_its_recipe_resumes_it(recipe: Path) -> None:
    config = load_config(recipe)
    RunFolder(config.run_folder).check_resumable(config)
    assert config.data.heldout_size is None, "today's default is that of the source"


@pytest.mark.parametrize("place", ["folder", "storage"])
def test_a_resumed_run_goes_on_with_the_default_it_began_with(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    config = load_config(recipe)
    if place == "storage":
        (tmp_path / "storage").mkdir()
        shutil.move(config.run_folder, tmp_path / "storage" / "old-run")
        config = load_config(recipe, [f"run.storage={(tmp_path / 'storage').as_uri()}"])
    used: list[Config] = []
    monkeypatch.setattr(launch, "_run", lambda configs, *_: used.append(configs[""]))
    launch.run(config, resume=True)
    assert [each.data.heldout_size for each in used] == [256]


def test_a_default_that_a_recipe_departs_from_is_no_former_one(recipe: Path) -> None:
    stored = load_config(OLD / "run" / "config.yaml")
    named = load_config(recipe, ["data.heldout_size=100"])
    assert as_begun(stored, named) is named
    assert [each.setting for each in changes(stored, named) if not each.allowed] == ["data.heldout_size"]
    # A run that began with another number than the former default does not go on with today's.
    other: dict[str, Any] = {"data": stored.data.model_copy(update={"heldout_size": 100})}
    assert [each.setting for each in changes(stored.model_copy(update=other), load_config(recipe)) if not each.allowed] == [
        "data.heldout_size"
    ]


def test_it_is_verified_and_reported(recipe: Path) -> None:
    run = recipe.parent / "old-run"
    proof = verify(run)
    assert proof.problems == []
    facts = dict(proof.facts)
    assert (facts["run"], facts["tokens trained"]) == ("finished, 4 of 4 steps", "71")
    page = write_report(run)
    assert page.is_file()
    assert "reverse" in page.read_text()


def test_a_younger_rule_hides_no_run_and_stops_no_resume(recipe: Path, tmp_path: Path) -> None:
    """Deadlines that may stand beside each other no more: the run is read, verified, shown, and resumed with better ones."""
    path = tmp_path / "old-run" / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["cluster"] = (tree.get("cluster") or {}) | {"stuck_run_after_s": 10.0}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="cluster.stuck_run_after_s=10 is not above"):
        load_config(path)
    folder = RunFolder.open(tmp_path / "old-run")
    assert folder.load_config().cluster.stuck_run_after_s == 10
    assert not verify(folder.path).problems
    write_report(folder.path)
    folder.check_resumable(load_config(recipe))
    with pytest.raises(ConfigError, match="cluster.stuck_run_after_s=10 is not above"):
        folder.load_config(["run.seed=0"])
