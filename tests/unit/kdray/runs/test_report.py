"""The report: one file, every value from the run folder, on whole and on partial runs."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdray.errors import DataError
from kdray.runs.folder import RunFolder
from kdray.runs.report import write_report
from kdray.runs.reporter import SAMPLE_SCHEMA
from kdray.runs.results.draws import Draw, write_draws

HOSTILE = "<script>alert('x')</script> & {{ 7 * 7 }}"


class Page(HTMLParser):
    """Tables by id, headings, notes, and whatever the page would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loads: list[str] = []
        self.notes: list[str] = []
        self.figures: list[str] = []
        self.answers: list[list[str]] = []
        self._rows: list[list[str]] | None = None
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loads += [values[name] for name in ("src", "href") if name in values]
        if values.get("role") == "img":
            self.figures.append(values["aria-label"])
        if tag == "table":
            self._rows = self.tables.setdefault(values["id"], [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
            self._into = self._rows[-1]
        elif tag in ("dt", "dd"):
            self.answers += [[]] if tag == "dt" else []
            self.answers[-1].append("")
            self._into = self.answers[-1]
        elif tag == "p":
            self.notes.append("")
            self._into = self.notes

    def handle_endtag(self, tag):
        if tag in ("td", "th", "p", "dt", "dd"):
            self._into = None
        if tag in ("dt", "dd"):
            self.answers[-1][-1] = " ".join(self.answers[-1][-1].split())
        if tag == "table":
            self._rows = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data


def sample_row(**values) -> dict:
    row = {
        "source": "train", "step": 1, "sample_id": 0, "prompt_id": 5, "prompt": "last letters of ab cd", "alpha": 0.2,
        "writer": "mixture", "response": "b d", "finish_reason": "stop", "reverse_kl": 0.125, "token_ids": [3, 1],
    }  # fmt: skip
    return row | values


def write_samples(folder: RunFolder, name: str, *rows: dict) -> None:
    folder.samples.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SAMPLE_SCHEMA), folder.samples / f"{name}.parquet")


def page_of(folder: RunFolder) -> tuple[str, Page]:
    text = write_report(folder.path).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "trial").mkdir()
    return RunFolder(tmp_path / "trial")


@pytest.fixture
def whole(folder):
    folder.config.write_text(f"run:\n  name: trial # {HOSTILE}\n")
    for step in (1, 2, 3):
        folder.append_metrics(
            {"step": step, "loss": step / 7, "reverse_kl": None if step == 2 else 0.5, "wait_sync_s": 0.1}
            | ({"heldout/reverse_kl": 0.777} if step == 3 else {})
        )
    folder.append_event("restart", rank=1, reason=HOSTILE)
    folder.write_summary(
        {
            "steps": 3,
            "before": {"reverse_kl": 0.91234, "exact_match": 0.0},
            "after": {"reverse_kl": 0.25},
            "control": {"reverse_kl": 0.5, "method": "sft"},
            "restarts": 1,
            "versions": {"ray": "2.60.0"},
        }
    )
    write_samples(folder, "step-00000001", sample_row(response=HOSTILE))
    write_samples(folder, "heldout-before", sample_row(source="before", step=None, response="x"))
    write_samples(folder, "heldout-after", sample_row(source="after", step=None, response="b d"))
    return folder


def test_results_stand_side_by_side(whole):
    _, page = page_of(whole)
    assert page.tables["outcomes"] == [
        ["held-out", "before", "after", "control"],
        ["reverse_kl", "0.9123", "0.25", "0.5"],
        ["exact_match", "0", "", ""],
        ["method", "", "", "sft"],
    ]
    assert page.tables["totals"] == [["steps", "3"], ["restarts", "1"]]
    assert page.tables["versions"] == [["ray", "2.60.0"]]


def test_the_share_of_the_gap_and_the_verdict_come_first_and_numbers_have_their_intervals(folder):
    folder.write_summary(
        {
            "steps": 3,
            "before": {"exact_match": 0.25, "prompts": 40.0},
            "after": {"exact_match": 0.5, "prompts": 40.0},
            "teacher": {"exact_match": 0.75, "prompts": 40.0},
            "verdict": f"Distillation raised it {HOSTILE}.",
            "gap_closed": {"metric": "exact_match", "reference": "teacher", "value": 0.5, "low": 0.375, "high": 0.625}
            | {"reason": None},
            "warnings": ["responses became longer."],
            "intervals": {"before": {"exact_match": [0.125, 0.375]}, "after": {"exact_match": [0.25, 0.75]}},
            "differences": {"after - before": {"exact_match": {"value": 0.25, "low": 0.125, "high": 0.375}}},
            "resampling": {"method": "percentile bootstrap over prompts", "level": 0.95, "resamples": 5000},
        }
    )
    text, page = page_of(folder)
    assert '<meta name="viewport"' in text, "a phone shows the page at its own width"
    assert page.notes[:3] == [
        "Share of the gap to the teacher closed: 50% (95% interval 38% to 62%), by exact match.",
        f"Distillation raised it {HOSTILE}.",
        "Warning: responses became longer.",
    ]
    assert "<script>alert" not in text
    assert page.tables["outcomes"] == [
        ["held-out", "before", "after", "teacher"],
        ["exact_match", "0.25 (0.125 to 0.375)", "0.5 (0.25 to 0.75)", "0.75"],
        ["prompts", "40", "40", "40"],
    ]
    assert page.tables["differences"] == [
        ["held-out", "after - before"],
        ["exact_match", "+0.25 (+0.125 to +0.375)"],
    ]
    assert page.tables["totals"] == [["steps", "3"]]
    assert any("95% intervals, percentile bootstrap over prompts" in note for note in page.notes)


def test_curves_hold_the_values_of_the_metrics(whole):
    text, page = page_of(whole)
    assert "0.42857142857142855" in text, "the loss of step 3"
    assert "0.777" in text, "the held-out measurement"
    assert any("forward_kl" in note for note in page.notes), "what no step has is named as missing"
    assert not any("reward" in note for note in page.notes), "a run without rewards lacks nothing"


def test_the_distance_of_trainer_and_replicas_has_a_plot_of_its_own(folder):
    folder.append_metrics({"step": 1, "rollout_gap": 0.00012345, "parity_gap": 0.0, "reward": 0.625})
    text, page = page_of(folder)
    assert "Trainer against replicas" in text
    assert "0.00012345" in text
    missing = [note for note in page.notes if "Missing" in note]
    assert missing
    assert not any("rollout_gap" in note or "parity_gap" in note for note in missing)
    assert "Rewards" in text


def test_what_others_wrote_is_escaped(whole):
    text, page = page_of(whole)
    assert "<script>alert" not in text
    assert page.tables["samples"][1][2] == HOSTILE
    assert HOSTILE in page.tables["events"][1][2]
    assert "name: trial # &lt;script&gt;" in text


def test_held_out_answers_stand_side_by_side(whole):
    _, page = page_of(whole)
    assert page.answers == [
        ["prompt", "last letters of ab cd"],
        ["before", "x 0.125 nats per token"],
        ["after", "b d 0.125 nats per token"],
    ]


def test_the_reference_answer_stands_between_prompt_and_answers(folder):
    folder.append_metrics({"step": 1})
    other = {"prompt_id": 6, "prompt": "last letters of ef"}
    write_samples(folder, "heldout-after", sample_row(reference=HOSTILE), sample_row(**other))
    # As an earlier version wrote it: what its file does not say, another one may.
    old = SAMPLE_SCHEMA.remove(SAMPLE_SCHEMA.get_field_index("reference"))
    rows = [sample_row(), sample_row(**other)]
    pq.write_table(pa.Table.from_pylist(rows, schema=old), folder.samples / "heldout-before.parquet")
    text, page = page_of(folder)
    answers = [[by, "b d 0.125 nats per token"] for by in ("before", "after")]
    first = [["prompt", "last letters of ab cd"], ["reference answer", " ".join(HOSTILE.split())]]
    assert page.answers == [*first, *answers, ["prompt", "last letters of ef"], *answers]
    assert "<script>alert" not in text


def test_tokens_are_shaded_by_their_divergence_and_answers_marked(folder):
    folder.append_metrics({"step": 1})
    kls = {"token_texts": ["b ", "<d>", ""], "token_reverse_kl": [0.5, 3.0, 0.25]}
    write_samples(folder, "heldout-after", sample_row(source="after", response="b <d> e", **kls))
    write_samples(folder, "heldout-teacher", sample_row(source="teacher", **kls))
    draws = [Draw(5, number, None, 3, False, False, number == 0, None, None, None) for number in (0, 1)]
    write_draws(folder.evaluations / "after.parquet", draws)
    text, page = page_of(folder)
    assert page.answers[1:] == [["teacher", "b d"], ["after ✓ right", "b <d>[end] e 0.125 nats per token, most at “<d>”: 3"]]
    shades = re.findall(r"--shade\), ([0-9.]+)\)\" title=\"([0-9.]+) nats\">([^<]*)</span>", text)
    assert shades == [("0.17", "0.5", "b "), ("0.7", "3", "&lt;d&gt;"), ("0.09", "0.25", "[end]")]


def test_the_gap_is_drawn_within_the_bar(folder):
    gap = {"metric": "exact_match", "reference": "teacher", "value": 1.25, "low": 0.5, "high": 1.5, "reason": None}
    folder.write_summary({"steps": 1, "gap_closed": gap})
    text, page = page_of(folder)
    assert page.figures[0] == "125% of the gap closed, interval 50% to 150%"
    assert "width: 100.0%" in text
    assert "left: 50.0%; width: 50.0%" in text


def test_a_table_names_its_columns_and_rows_for_a_screen_reader(whole):
    text, page = page_of(whole)
    for table in text.split("<table")[1:]:
        body = table.split("</table>")[0]
        assert "<th>" not in body, "every heading says whether it is of a column or a row"
    assert page.figures
    assert all(len(words) > 20 for words in page.figures)
    levels = [int(level) for level in re.findall(r"<h([1-6])", text.split("<body>")[1])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert "prefers-color-scheme: dark" in text


def test_the_cost_is_told_by_stage_and_for_a_million_tokens(folder):
    lines = [
        ("start", "00:00", {}), ("starting", "00:10", {}), ("serving", "00:30", {}), ("replicas", "00:30", {"now": 2}),
        ("phase", "00:40", {"name": "distill"}), ("finished", "02:00", {}),
    ]  # fmt: skip
    folder.events.write_text(
        "".join(
            json.dumps({"time": f"2031-01-01T00:{time}.000+00:00", "kind": kind, "pool": "big"} | more) + "\n"
            for kind, time, more in lines
        )
    )
    for step in (1, 2):
        waits = {"wait_rollout_s": 25.0, "wait_sync_s": 1.0, "wait_evaluation_s": 1.5, "wait_checkpoint_s": 0.5}
        folder.append_metrics({"step": step, "train_step_s": 10.0, **waits})
    folder.write_summary({"steps": 2, "trained_tokens": 500_000})
    _, page = page_of(folder)
    assert page.tables["costs"][1:] == [
        ["preparation", "10.0", "20"],
        ["engines start", "20.0", "40"],
        ["student starts", "10.0", "20"],
        ["distill", "80.0", "160"],
        ["distill: trained", "20.0", "40"],
        ["distill: waited for rollouts", "50.0", "100"],
        ["distill: waited for teachers' scores", "0.0", "0"],
        ["distill: waited for the copy of its weights", "2.0", "4"],
        ["distill: waited for evaluations", "3.0", "6"],
        ["distill: waited for checkpoints", "1.0", "2"],
        ["distill: everything else", "4.0", "8"],
        ["all stages", "120.0", "240"],
        ["replicas of big, added up", "180.0", "360"],
    ]


def test_the_page_loads_nothing(whole):
    text, page = page_of(whole)
    assert all(each.startswith("#") for each in page.loads), "places in the page itself"
    assert not re.search(r"@import|<link|<iframe", text.split("</style>")[0])
    assert text.count("plotly.js v") == 1, "the library is there once"
    assert len(text) < 6e6


def test_a_running_run_names_what_is_missing(folder):
    folder.append_metrics({"step": 1, "loss": 0.5})
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "los')
    text, page = page_of(folder)
    assert "missing: config.yaml, events.jsonl, summary.json" in page.notes[0]
    assert "1 steps recorded" in page.notes[0]
    for missing in ("no before and after", "no events", "no samples", "no config.yaml", "no versions"):
        assert missing in text


def test_a_run_that_failed_before_its_first_step(folder):
    folder.config.write_text("run: {name: trial}\n")
    folder.append_event("failed", reason="no GPU")
    _, page = page_of(folder)
    assert page.tables["events"][1][1:] == ["failed", "reason=no GPU"]


def test_an_unscored_sample_without_a_decoder_shows_its_ids(folder):
    folder.append_metrics({"step": 1})
    write_samples(folder, "step-00000001", sample_row(prompt=None, response=None, reverse_kl=None))
    _, page = page_of(folder)
    assert page.tables["samples"][1] == ["1", "–", "[3, 1]", "stop", "mixture", "0.2", "–"]


def test_training_samples_show_the_reference_answers_that_there_are(folder):
    folder.append_metrics({"step": 1})
    kls = {"token_texts": ["b ", "d"], "token_reverse_kl": [0.5, 3.0]}
    write_samples(folder, "step-00000001", sample_row(reference=HOSTILE, **kls), sample_row(prompt_id=6))
    text, page = page_of(folder)
    title, *rows = page.tables["samples"]
    assert title[:4] == ["step", "prompt", "response", "reference answer"]
    assert [row[2:5] for row in rows] == [["b d", HOSTILE, "stop"], ["b d", "–", "stop"]]
    assert 'title="3 nats">d</span>' in text
    assert "<script>alert" not in text


def test_samples_of_an_older_version_name_their_writer(folder):
    """They had no such column, and nan as alpha where the data wrote."""
    folder.append_metrics({"step": 1})
    rows = [sample_row(alpha=alpha, reverse_kl=None) for alpha in (0.2, math.nan, 1.0, 0.0)]
    for row in rows:
        del row["writer"]
    schema = SAMPLE_SCHEMA.remove(SAMPLE_SCHEMA.get_field_index("writer"))
    folder.samples.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder.samples / "step-00000001.parquet")
    _, page = page_of(folder)
    shown = [row[4:6] for row in page.tables["samples"][1:]]
    assert shown == [["mixture", "0.2"], ["data", "0.0"], ["teacher", "1.0"], ["student", "0.0"]]


def test_long_runs_are_thinned_and_keep_their_last_step(folder):
    folder.metrics.write_text("".join(f'{{"step": {step}, "loss": {step}.5}}\n' for step in range(1, 5002)))
    text, _ = page_of(folder)
    assert "5001.5" in text
    assert "4996.5" not in text, "between the least and the greatest of its part"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_sample_file_is_named(folder):
    folder.append_metrics({"step": 1})
    folder.samples.mkdir()
    (folder.samples / "step-00000001.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"step-00000001\.parquet"):
        write_report(folder.path)


def test_the_time_line_shows_replicas_what_happened_and_the_wait(whole):
    assert "Missing: no replicas in events.jsonl." in page_of(whole)[1].notes
    for now in (1, 2, 1):
        whole.append_event("replicas", pool="big", before=3 - now, now=now)
    whole.append_event("scale", pool="big", before=1, now=2, reason="the trainer waits")
    whole.append_event("hedge", pool="big", call="sample", rollouts=7)
    for step, second, wait in ((4, 0, 0.0), (5, 1, 0.625)):
        time = f"2031-01-01T00:00:0{second}.000+00:00"
        whole.append_metrics({"step": step, "time": time, "wait_rollout_s": wait, "train_step_s": 0.25})
    text, page = page_of(whole)
    assert "Missing: no replicas in events.jsonl." not in page.notes
    start = text.index(">Who waited for whom</h2>")
    drawn = text[start : text.index("<h2", start + 4)]
    for part in ("replicas of big", "[1,2,1,1]", "waited for rollouts", "[0.625]", "reason=the trainer waits", "rollouts=7"):
        assert part in drawn, part
    (words,) = [figure for figure in page.figures if figure.startswith("Stages")]
    assert "scale 1 times; hedge 1 times" in words


def test_each_of_several_teachers_has_its_wait_in_the_time_line(whole):
    for step, second in ((4, 0), (5, 4)):
        time = f"2031-01-01T00:00:0{second}.000+00:00"
        whole.append_metrics({"step": step, "time": time, "teacher/big/wait_s": 3.0, "teacher/old/wait_s": 1.0})
    text, _ = page_of(whole)
    for part in ("waited for big", "[0.75]", "waited for old", "[0.25]"):
        assert part in text, part
