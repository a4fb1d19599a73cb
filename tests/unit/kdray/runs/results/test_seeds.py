"""Several seeds of one config: which run, which are skipped, and what their numbers come to."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import launch
from cluster.cli import app
from kdray.config import Config, load_config, parse_config
from kdray.errors import ConfigError, EngineError, Interrupted
from kdray.runs.folder import RunFolder
from kdray.runs.results.seeds import SEEDS, across, seeded

MATCH = {0: 0.5, 1: 0.625, 2: 0.25, 3: 0.5, 4: 0.75}


def config(tmp_path: Path, seed: int = 0) -> Config:
    tiny = {"model": {"type": "tiny"}}
    run = {"name": "trial", "output": str(tmp_path), "seed": seed}
    return parse_config({"run": run, "student": tiny, "teachers": {"t": tiny}})


class Runs:
    """Stands for `cluster.launch.run`: writes what a run writes, and fails where it is asked to."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []
        self.fails: dict[int, Exception] = {}

    def __call__(self, config: Config, resume: bool = False, on_phase: Any = None) -> dict[str, Any]:
        seed = config.run.seed
        self.calls.append((seed, resume))
        folder = RunFolder.create(config, resume)
        folder.append_event("start", resumed_step=None)
        if (error := self.fails.pop(seed, None)) is not None:
            raise error
        differences = {
            "after - before": {"reverse_kl": {"value": -1.5}},
            "after - control": {"exact_match": {"value": seed / 8}},
        }
        summary = {"steps": 3, "before": {"reverse_kl": 2.0}, "after": {"exact_match": MATCH[seed], "reverse_kl": 0.5}}
        summary |= {"differences": differences}
        folder.write_summary(summary)
        folder.append_event("finished", steps=3)
        return summary


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(launch, "run", made)
    return made


def call(tmp_path: Path, *arguments: str) -> Any:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config(tmp_path / "runs").dump())
    return CliRunner().invoke(app, ["run", str(recipe), *arguments])


def written(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "runs" / "trial" / SEEDS).read_text())
    return found


def test_every_seed_is_a_run_of_its_own_name_and_folder(tmp_path: Path) -> None:
    made = seeded(config(tmp_path, seed=7), 2)
    assert {seed: each.run_folder for seed, each in made.items()} == {
        7: tmp_path / "trial" / "trial-seed-7",
        8: tmp_path / "trial" / "trial-seed-8",
    }
    assert [each.run.seed for each in made.values()] == [7, 8]
    for each in made.values():
        (tmp_path / "resolved.yaml").write_text(each.dump())
        assert load_config(tmp_path / "resolved.yaml") == each


def test_mean_spread_and_values(tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = call(tmp_path, "--seeds", "3")
    assert result.exit_code == 0, result.output
    assert runs.calls == [(0, False), (1, False), (2, False)]
    found = written(tmp_path)
    assert (found["seeds"], found["pending"]) == ([0, 1, 2], [])
    assert found["runs"]["1"] == "trial-seed-1"
    numbers = [0.5, 0.625, 0.25]
    # The 97.5% quantile of Student's t with 2 degrees of freedom, from a table.
    half = 4.3026527 * statistics.stdev(numbers) / 3**0.5
    same = {"low": None, "high": None, "std": 0.0}
    assert found["results"] == {
        "before reverse_kl": {"mean": 2.0, **same, "values": {"0": 2.0, "1": 2.0, "2": 2.0}},
        "after exact_match": {
            "mean": pytest.approx(sum(numbers) / 3),
            "low": pytest.approx(sum(numbers) / 3 - half),
            "high": pytest.approx(sum(numbers) / 3 + half),
            "std": pytest.approx(statistics.stdev(numbers)),
            "values": {"0": 0.5, "1": 0.625, "2": 0.25},
        },
        "after reverse_kl": {"mean": 0.5, **same, "values": {"0": 0.5, "1": 0.5, "2": 0.5}},
        "after - before reverse_kl": {"mean": -1.5, **same, "values": {"0": -1.5, "1": -1.5, "2": -1.5}},
        "after - control exact_match": {
            "mean": 0.125,
            "low": pytest.approx(0.125 - 4.3026527 * 0.125 / 3**0.5),
            "high": pytest.approx(0.125 + 4.3026527 * 0.125 / 3**0.5),
            "std": 0.125,
            "values": {"0": 0.0, "1": 0.125, "2": 0.25},
        },
    }
    (row,) = (line for line in result.output.splitlines() if "after exact_match" in line)
    shown = ["after", "exact_match", "0.4583", "(-0.016", "to", "0.933)", "0.1909", "0.5", "0.625", "0.25"]
    assert row.replace("│", " ").split() == shown


def test_fewer_seeds_than_before_leave_none_out(tmp_path: Path, runs: Runs) -> None:
    assert call(tmp_path, "--seeds", "3").exit_code == 0
    before = written(tmp_path)
    assert call(tmp_path, "--seeds", "2", "--resume").exit_code == 0
    assert written(tmp_path) == before
    assert call(tmp_path, "--seeds", "4", "--resume").exit_code == 0
    assert [seed for seed, _ in runs.calls] == [0, 1, 2, 3]
    assert written(tmp_path)["seeds"] == [0, 1, 2, 3]


def test_a_number_that_a_seed_lacks_is_left_out_of_the_mean() -> None:
    found = across(
        {
            0: {"gap_closed": {"value": 0.5}, "after": None},
            1: {"gap_closed": {"value": None}, "after": {"reverse_kl": float("nan")}},
        }
    )
    assert found == {"gap_closed": {"mean": 0.5, "low": None, "high": None, "std": None, "values": {"0": 0.5}}}


@pytest.mark.parametrize(("error", "code"), [(Interrupted("stopped at step 1"), 130), (EngineError("a replica died"), 1)])
def test_a_resume_skips_what_has_ended_and_goes_on_with_the_rest(
    tmp_path: Path, runs: Runs, error: Exception, code: int
) -> None:
    runs.fails = {1: error}
    result = call(tmp_path, "--seeds", "3")
    assert result.exit_code == code
    if code == 1:
        assert f"logs: {tmp_path}/runs/trial/trial-seed-1/logs" in result.stderr
    assert (written(tmp_path)["seeds"], written(tmp_path)["pending"]) == ([0], [1, 2])
    assert call(tmp_path, "--seeds", "3").exit_code == 2, "neither resumed nor begun anew"
    runs.calls.clear()
    assert call(tmp_path, "--seeds", "3", "--resume").exit_code == 0
    assert runs.calls == [(1, True), (2, False)]
    runs.calls.clear()
    assert call(tmp_path, "--seeds", "5", "--resume").exit_code == 0
    assert runs.calls == [(3, False), (4, False)], "more seeds later"
    assert written(tmp_path)["seeds"] == [0, 1, 2, 3, 4]


def test_a_run_that_was_resumed_after_its_end_goes_on(tmp_path: Path, runs: Runs) -> None:
    call(tmp_path, "--seeds", "1")
    folder = RunFolder(tmp_path / "runs" / "trial" / "trial-seed-0")
    folder.append_event("start", resumed_step=3)
    runs.calls.clear()
    call(tmp_path, "--seeds", "1", "--resume")
    assert runs.calls == [(0, True)]


def test_seeds_of_other_settings_are_not_mixed(tmp_path: Path, runs: Runs) -> None:
    call(tmp_path, "--seeds", "1")
    runs.calls.clear()
    result = call(tmp_path, "training.learning_rate=0.5", "--seeds", "2", "--resume")
    assert result.exit_code == 2
    assert "this seed has ended with other settings (training.learning_rate: " in result.stderr
    assert runs.calls == []
    # Where its parts run changes no result.
    assert call(tmp_path, "cluster.wait_s=5", "--seeds", "2", "--resume").exit_code == 0
    assert runs.calls == [(1, False)]


def test_the_folder_of_one_run_is_not_used_for_several(tmp_path: Path, runs: Runs) -> None:
    RunFolder.create(config(tmp_path / "runs"))
    result = call(tmp_path, "--seeds", "2")
    assert result.exit_code == 2
    assert "holds a run of one seed; choose another run.name" in result.stderr
    with pytest.raises(ConfigError):
        launch.run_seeds(config(tmp_path / "runs"), 2, resume=True)
    assert runs.calls == []
