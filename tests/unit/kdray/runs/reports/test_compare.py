"""The comparison of runs: what differs, numbers with their intervals, one curve a run; nothing loaded, everything escaped."""

from __future__ import annotations

import pytest

from kdray.errors import DataError
from kdray.runs.folder import RunFolder
from kdray.runs.reports.compare import write_comparison
from kdray.runs.reports.figures import curves
from kdray.runs.reports.steps import Curve
from tests.unit.kdray.runs.test_report import HOSTILE, Page


def run_folder(path, rate, after, **settings) -> RunFolder:
    path.mkdir(parents=True)
    folder = RunFolder(path)
    extra = "".join(f", {name}: {value}" for name, value in settings.items())
    folder.config.write_text(
        f"run: {{name: {path.name}, output: /tmp/{path.parent.name}}}\ntraining: {{learning_rate: {rate}{extra}}}\n"
    )
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "loss": after + step / 7})
    folder.write_summary(
        {
            "steps": 3,
            "before": {"exact_match": 0.25},
            "after": {"exact_match": after},
            "verdict": f"{path.name} {HOSTILE}",
            "gap_closed": {"value": 0.5, "low": 0.375, "high": 0.625},
            "intervals": {"after": {"exact_match": [after - 0.125, after + 0.125]}},
            "resampling": {"method": "percentile bootstrap over prompts", "level": 0.95, "resamples": 5000},
        }
    )
    return folder


@pytest.fixture
def runs(tmp_path):
    low = run_folder(tmp_path / "runs" / "low", "1.0e-5", 0.5, warmup_steps=3, steps=9)
    high = run_folder(tmp_path / "runs" / "high", "1.0e-3", 0.75, steps=9)
    return {str(folder.path): folder.path for folder in (low, high)}


def compared(runs, to) -> tuple[str, Page]:
    text = write_comparison(runs, to).read_text(encoding="utf-8")
    return text, Page(text)


def test_settings_that_differ_and_no_others(runs, tmp_path):
    _, page = compared(runs, tmp_path / "page.html")
    assert page.tables["settings"] == [
        ["setting", "low", "high"],
        ["training.learning_rate", "1e-05", "0.001"],
        ["training.warmup_steps", "3", ""],
    ]


def test_names_of_settings_break_on_a_phone_and_many_are_folded_away(runs, tmp_path):
    text, _ = compared(runs, tmp_path / "page.html")
    assert "training.<wbr>learning_<wbr>rate</th>" in text
    assert "<details open><summary>2 settings</summary>" in text
    many = {f"'<b>k{number}</b>'": number for number in range(20)}
    other = run_folder(tmp_path / "runs" / "many", "1", 0.5, **many)
    text, page = compared(runs | {str(other.path): other.path}, tmp_path / "page.html")
    assert "<details><summary>23 settings</summary>" in text
    assert ["training.<b>k7</b>", "", "", "7"] in page.tables["settings"], "escaped, and whole"


def test_long_names_in_a_legend_take_two_lines():
    name = "teacher/letters/staleness_0/importance_weight_ess"
    html = str(curves({name: Curve([(1, 0.5), (2, 1.0)]), "short/name": Curve([(1, 1.0)])}, "weight", "Weights"))
    assert '"name":"teacher\\u002fletters\\u002fstaleness_0\\u003cbr\\u003eimportance_weight_ess"' in html
    assert '"name":"short\\u002fname"' in html


def test_numbers_stand_side_by_side_with_their_intervals(runs, tmp_path):
    text, page = compared(runs, tmp_path / "page.html")
    assert page.tables["outcome-1"] == [
        ["exact_match", "low", "high"],
        ["before", "0.25", "0.25"],
        ["after", "0.5 (0.375 to 0.625)", "0.75 (0.625 to 0.875)"],
    ]
    assert page.tables["totals"][1] == ["steps", "3", "3"]
    assert "<script>alert" not in text
    assert any("Share of the gap closed: 50% (38% to 62%)" in note for note in page.notes)


def test_each_run_has_its_line_in_a_figure_that_is_told_in_words(runs, tmp_path):
    text, page = compared(runs, tmp_path / "page.html")
    (words,) = [figure for figure in page.figures if figure.startswith("Loss")]
    assert "low: 0.6429 at step 1, 0.9286 at step 3" in words
    assert "high: 0.8929 at step 1" in words
    assert "1.1785714285714286" in text
    assert page.loads == ["#main"]
    assert text.count("plotly.js v") == 1


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path):
    folders = [run_folder(tmp_path / place / "trial", "1", 0.5) for place in ("a", "b")]
    runs = {str(folder.path): folder.path for folder in folders}
    _, page = compared(runs, tmp_path / "page.html")
    assert page.tables["totals"][0] == ["total", *runs]


def test_a_stored_run_has_the_name_of_its_url(tmp_path, runs):
    (path, other) = runs.values()
    _, page = compared({"s3://bucket/trial/": path, str(other): other}, tmp_path / "page.html")
    assert page.tables["totals"][0] == ["total", "trial", "high"]


def test_a_run_that_goes_on_has_empty_cells(tmp_path, runs):
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.yaml").write_text("run: {name: young}\n")
    _, page = compared(runs | {"young": young}, tmp_path / "page.html")
    assert page.tables["outcome-1"][2] == ["after", "0.5 (0.375 to 0.625)", "0.75 (0.625 to 0.875)", ""]


def test_what_cannot_be_read_or_written_is_named(runs, tmp_path):
    with pytest.raises(DataError, match=r"not a run folder"):
        write_comparison(runs | {"x": tmp_path}, tmp_path / "page.html")
    with pytest.raises(DataError, match=r"--to .*is a folder"):
        write_comparison(runs, tmp_path)
    with pytest.raises(DataError, match=r"--to .*cannot be written"):
        write_comparison(runs, tmp_path / "nowhere" / "page.html")
    (tmp_path / "runs" / "low" / "config.yaml").write_text("run: {name")
    with pytest.raises(DataError, match=r"config\.yaml: not valid YAML"):
        write_comparison(runs, tmp_path / "page.html")
