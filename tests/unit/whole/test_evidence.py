"""The sweep of docs/evidence.md: every cell is a valid recipe, finished cells are skipped, and the table holds all files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence
from benchmarks.evidence import REGIMES, WAYS, Cell, by_seed, read, record, run_cell, table, write_page
from benchmarks.evidence_differences import draw_differences
from kdray.config import load_config


def summary(after: float = 0.5, gap: float | None = 0.4) -> dict[str, Any]:
    numbers = {"step_match": 0.9, "response_tokens": 59.5, "repetition": 0.25, "reverse_kl": 0.125}
    return {
        "before": {**numbers, "exact_match": 0.1},
        "after": {**numbers, "exact_match": after},
        "teacher": {**numbers, "exact_match": 0.95},
        "gap_closed": {"value": gap, "low": 0.25, "high": 0.55},
        **dict.fromkeys(("intervals", "verdict", "warnings", "trained_tokens", "versions")),
        "wall_s": 61.0,
    }


def keep(folder: Path, cell: Cell, **numbers: Any) -> None:
    (folder / f"{cell.name}.json").write_text(json.dumps(record(cell, summary(**numbers), "abc")))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("way", WAYS)
def test_every_cell_is_a_recipe_of_its_own(way: str, regime: str) -> None:
    cell = Cell(way, regime, 7)
    config = load_config(Path(cell.recipe), cell.settings)
    assert (config.run.seed, config.rollout.max_staleness, config.student.model.seed) == (7, 0, 7)
    assert config.loss.type == "minillm" or "MiniLLM" not in way
    usual = load_config(Path(cell.recipe), Cell("MiniLLM", regime, 7).settings).training.learning_rate
    assert config.training.learning_rate == (3e-4 if "rate 3e-4" in way else usual)
    assert usual > 3e-4
    assert (config.rollout.alpha == 0.2) == (("MiniLLM" in way and "no mixing" not in way) or way == "SFT alone")


def test_supervised_training_has_the_labels_that_the_others_begin_with() -> None:
    few = REGIMES["few labels"]
    alone, other = (load_config(Path(few.recipe), Cell(way, "few labels", 0).settings) for way in ("SFT alone", "MiniLLM"))
    assert alone.data.prompts.size == other.data.prompts.labelled < other.data.prompts.size
    assert alone.data.prompts.labelled is None
    assert alone.rollout.data_share == 1.0
    assert (alone.training.sft, alone.training.steps) == (other.training.sft, other.training.steps)


def test_names_of_cells_differ() -> None:
    cells = [Cell(way, regime, seed) for way in WAYS for regime in REGIMES for seed in (1, 11)]
    assert len({cell.name for cell in cells}) == len(cells)


def test_a_run_that_has_ended_is_taken_as_it_is_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, failing = Cell("GKD", "weak", 3), Cell("MiniLLM", "weak", 3)
    folder = tmp_path / "runs" / done.name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence, "commit_of_tree", lambda: "abc")
    monkeypatch.setattr(evidence, "start_run", lambda cell: 1)
    assert run_cell(done, tmp_path / "results")
    assert not run_cell(failing, tmp_path / "results")
    (kept,) = read(tmp_path / "results")
    assert (kept["way"], kept["seed"], kept["commit"], kept["after"]["exact_match"]) == ("GKD", 3, "abc", 0.5)


def test_runs_of_an_even_start_take_the_student_that_was_brought_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence, "commit_of_tree", lambda: "abc")
    recipes = Path(evidence.__file__).parents[1]
    started = []

    def run(cell: Cell) -> int:
        config = load_config(recipes / cell.recipe, cell.settings_of_run)
        started.append((config.student.model, config.training.sft.steps, config.data.prompts.labelled, config.training.steps))
        (tmp_path / "runs" / cell.name).mkdir(parents=True)
        (tmp_path / "runs" / cell.name / "summary.json").write_text(json.dumps(summary()))
        return 0

    monkeypatch.setattr(evidence, "start_run", run)
    cell = Cell("SFT alone", "even start", 150)
    assert not run_cell(cell, tmp_path / "results")
    assert "--seeds 150 --starts" in capsys.readouterr().err
    assert not started
    cell.start.mkdir(parents=True)
    assert run_cell(cell, tmp_path / "results")
    assert started == [(str(cell.start), 0, None, 40)], "its recipe, or labels that are not those of the other ways"
    (kept,) = read(tmp_path / "results")
    assert kept["settings"] == cell.settings_of_run
    assert not any(each.startswith(("student.model.", "training.sft.learning")) for each in kept["settings"])


def test_the_page_compares_only_regimes_of_several_seeds(tmp_path: Path) -> None:
    for seed in (100, 101, 102):
        keep(tmp_path, Cell("MiniLLM", "weak", seed), after=0.5 + seed / 1000)
        keep(tmp_path, Cell("GKD", "weak", seed), after=0.5)
    keep(tmp_path, Cell("MiniLLM", "warm", 0))
    text = evidence.page(read(tmp_path))
    assert "| GKD | 3 | +10.1 (" in text
    assert "| 102 | 10.0 |" in text
    assert text.count("seed by seed") == 1
    assert "**Regime `warm`, exploring seeds** (0)" in text


def test_the_table_has_mean_and_spread_and_keeps_exploring_seeds_apart(tmp_path: Path) -> None:
    for seed, after, gap in ((100, 0.5, 0.4), (101, 0.7, 0.6), (102, 0.6, None)):
        keep(tmp_path, Cell("MiniLLM", "weak", seed), after=after, gap=gap)
    keep(tmp_path, Cell("MiniLLM", "weak", 0), after=0.2, gap=0.1)
    keep(tmp_path, Cell("SFT alone", "weak", 0), after=0.1, gap=None)
    keep(tmp_path, Cell("MiniLLM", "weak", 120), after=0.9, gap=0.9)
    replicating, rest = table(read(tmp_path)).split("**Regime `weak`, confirming seeds** (100, 101, 102)")
    assert replicating.startswith("**Regime `weak`, replicating seeds** (120)")
    assert "**Regime `weak`, exploring seeds** (0)" in rest
    (tmp_path / f"{Cell('MiniLLM', 'weak', 120).name}.json").unlink()
    confirming, exploring = table(read(tmp_path)).split("**Regime `weak`, exploring seeds** (0)")
    assert confirming.startswith("**Regime `weak`, confirming seeds** (100, 101, 102)")
    assert (
        "| MiniLLM | 3 | 50 ± 14, undefined in 1 | 60.0 (35.2 to 84.8) | 10.0 ± 0.0 | 95.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 |"
        in confirming
    )
    assert "| MiniLLM | 1 | 10 (25 to 55) | 20.0 | 10.0 | 95.0 | 90.0 | 90.0 | 59.5 | 25.0 | 0.125 |" in exploring
    assert exploring.index("| SFT alone | 1 | undefined | 10.0 |") < exploring.index("| MiniLLM | 1 |")


def test_ways_stand_beside_each_other_by_seed(tmp_path: Path) -> None:
    for way, seed, after in (("GKD", 100, 0.5), ("SFT alone", 100, 0.25), ("GKD", 101, 0.75)):
        keep(tmp_path, Cell(way, "few labels", seed), after=after)
    keep(tmp_path, Cell("MiniLLM", "weak", 100))
    assert by_seed(read(tmp_path), "few labels").splitlines() == [
        "| seed | before | SFT alone | GKD | teacher |",
        "|---|---|---|---|---|",
        "| 100 | 10.0 | 25.0 | 50.0 | 95.0 |",
        "| 101 | 10.0 |  | 75.0 | 95.0 |",
    ]


def test_ways_are_compared_pairwise_over_confirming_seeds() -> None:
    def cell(way: str, seed: int, share: float) -> dict[str, Any]:
        return {"way": way, "regime": "weak", "seed": seed, "after": {"exact_match": share}}

    right = {"MiniLLM": {0: 1.0, 100: 0.5, 101: 0.6, 102: 0.3, 103: 0.9}, "SFT alone": {0: 0.0, 100: 0.4, 101: 0.6, 102: 0.5}}
    cells = [cell(way, seed, share) for way, found in right.items() for seed, share in found.items()]
    # Differences of 10, 0 and -20 points: their standard deviation is 15.28, and t is 4.303 at two degrees of freedom.
    assert evidence.paired(cells, "weak").splitlines()[2:] == ["| SFT alone | 3 | -3.3 (-41.3 to 34.6) | 1, 1, 1 |"]
    assert evidence.paired(cells[:-1], "weak") == "", "two seeds tell too little"
    assert evidence.paired(cells, "weak", others=("GKD",)) == ""
    level = [cell(way, seed, 0.0) for way in right for seed in (100, 101, 102)]
    # No interval: ten equal zeros are no certainty that nothing else can come.
    assert evidence.paired(level, "weak").splitlines()[2:] == ["| SFT alone | 3 | all level | 0, 3, 0 |"]
    assert "| MiniLLM | 3 | +3.3 (-34.6 to 41.3) | 1, 1, 1 |" in evidence.paired(cells, "weak", "SFT alone")
    again = [cell(way, 120 + seed, share) for way, share in (("MiniLLM", 0.5), ("SFT alone", 0.25)) for seed in range(3)]
    assert evidence.paired(cells + again, "weak") == evidence.paired(cells, "weak"), "a replication is a sample of its own"
    (line,) = evidence.paired(cells + again, "weak", stage="replicating").splitlines()[2:]
    assert line == "| SFT alone | 3 | +25.0 on each | 3, 0, 0 |"


def test_differences_are_drawn_in_a_panel_for_each_comparison(tmp_path: Path) -> None:
    for seed, gain in ((100, 0.1), (101, 0.2), (102, 0.15), (135, 0.0)):
        keep(tmp_path, Cell("MiniLLM", "even start", seed), after=0.5 + gain)
        keep(tmp_path, Cell("MiniLLM, no mixing", "even start", seed), after=0.5)
    draw_differences(read(tmp_path), read(tmp_path), tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "even start, 3 confirming seeds, by runs" in drawn
    draw_differences(read(tmp_path), [], tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "by runs" not in drawn
    assert "mixing at 3e-3: with minus without" in drawn
    assert "even start, 3 confirming seeds" in drawn
    assert "replicating" not in drawn, "one seed has no interval"


def test_the_page_keeps_what_is_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*evidence.MARKS))
    for text in ("new", "newer"):
        write_page(page, text)
    assert page.read_text() == "before\n{}\n\nnewer\n{}\nafter\n".format(*evidence.MARKS)


def test_the_figure_is_drawn_from_the_files(tmp_path: Path) -> None:
    keep(tmp_path, Cell("GKD", "weak", 100))
    keep(tmp_path, Cell("GKD", "weak", 101), gap=None)
    keep(tmp_path, Cell("MiniLLM", "weak", 0))
    evidence.draw(read(tmp_path), tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "weak; confirming seeds" in drawn
    assert "MiniLLM" in drawn
