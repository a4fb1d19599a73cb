"""The reporter: what a step, an event and a sample leave in the run folder and on the terminal."""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from kdray.config import parse_config
from kdray.errors import LeaseLost
from kdray.runs import ticks
from kdray.runs.folder import RunFolder, read_lines
from kdray.runs.reporter import SAMPLE_SCHEMA, RunReporter
from kdray.runs.results.draws import write_draws
from kdray.runs.tracking.trackers import Trackers
from kdray.types import Rollout, StepReport

TINY = {"type": "tiny"}
CONFIG = parse_config({"run": {"name": "x"}, "student": {"model": TINY}, "teachers": {"t": {"model": TINY}}})


def step_report(step: int, loss: float = 0.5, **metrics: float) -> StepReport:
    return StepReport(
        step=step, loss=loss, num_target_tokens=40, grad_norm=1.5, learning_rate=1e-3, seconds=0.25, metrics=metrics
    )


def rollout(sample_id: int, reverse_kl: list[float] | None = None) -> Rollout:
    token_ids = np.arange(3, dtype=np.int32) + sample_id
    zeros = np.zeros(3, np.float32)
    return Rollout(
        sample_id=sample_id,
        prompt_id=100 + sample_id,
        prompt_ids=np.array([7, 8], np.int32),
        token_ids=token_ids,
        mixture_logprobs=zeros,
        student_logprobs=zeros,
        student_versions=np.zeros(3, np.int32),
        alpha=0.2,
        finish_reason="stop",
        reverse_kl=None if reverse_kl is None else np.array(reverse_kl, np.float32),
    )


def spell(token_ids: np.ndarray) -> str:
    return " ".join(map(str, token_ids))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def make(folder, output):
    """Builds a reporter on a console that is no terminal, and closes it."""
    made = []

    def build(total_steps: int = 20, **settings) -> RunReporter:
        trackers = Trackers(CONFIG, folder.path)
        made.append(
            RunReporter(folder, total_steps, Console(file=output, width=200), decode=spell, trackers=trackers, **settings)
        )
        return made[-1]

    yield build
    for reporter in made:
        reporter.close()


def scalars(path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    return {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_step_is_one_line_with_every_metric(make, folder):
    reporter = make()
    reporter.step(step_report(1, clipped=0.1), {"reverse_kl": 0.3, "tokens_per_s": np.float32(12)})
    reporter.step(step_report(2, loss=float("nan")), {"reverse_kl": float("inf")})
    first, second = read_lines(folder.metrics)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "step": 1,
        "loss": 0.5,
        "response_tokens": 40,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "train_step_s": 0.25,
        "clipped": 0.1,
        "reverse_kl": 0.3,
        "tokens_per_s": 12.0,
    }
    assert (second["loss"], second["reverse_kl"]) == (None, None)


def test_the_callers_metric_wins_over_the_reports(make, folder):
    make().step(step_report(1, staleness_max=1.0), {"response_tokens": 2.5, "staleness_max": 3.0})
    (line,) = read_lines(folder.metrics)
    assert (line["response_tokens"], line["staleness_max"]) == (2.5, 3.0)


def test_events_reach_file_and_terminal(make, folder, output):
    make().event("restart", rank=1, reason="[red]lost[/red]")
    (line,) = read_lines(folder.events)
    assert (line["kind"], line["rank"]) == ("restart", 1)
    assert "restart rank=1 reason=[red]lost[/red]" in output.getvalue(), "text from outside is no markup"


def test_tensorboard_holds_the_numbers_by_phase(make, folder):
    reporter = make()
    reporter.phase("sft", 2)
    reporter.phase_step(step_report(1, loss=3.0))
    reporter.step(step_report(1, loss=0.75), {"reverse_kl": float("nan")})
    reporter.step(step_report(2, loss=0.5), {"reverse_kl": 0.25})
    reporter.close()
    assert scalars(folder.tensorboard)["loss"] == [(1, 0.75), (2, 0.5)]
    assert scalars(folder.tensorboard)["reverse_kl"] == [(2, 0.25)]
    assert scalars(folder.tensorboard / "sft")["loss"] == [(1, 3.0)]


def test_tensorboard_of_a_resumed_run_shows_each_step_once(make, folder):
    for first, loss in ((1, 1.0), (3, 2.0)):
        reporter = make()
        for step in range(first, first + 4):
            reporter.step(step_report(step, loss=loss), {})
        reporter.close()
    assert scalars(folder.tensorboard)["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_phases_are_events_and_their_steps_are_no_metrics(make, folder, output):
    reporter = make(total_steps=4)
    reporter.phase("sft", 2)
    reporter.phase_step(step_report(2))
    assert not folder.metrics.exists()
    reporter.step(step_report(1), {})
    phases = [(line["name"], line["total"]) for line in read_lines(folder.events)]
    assert phases == [("sft", 2), ("distill", 4)]
    assert "sft 2/2  loss 0.5" in output.getvalue()


def test_models_that_are_trained_first_are_shown_on_the_terminal_alone(make, folder, output, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("kdray.runs.reporter.time.monotonic", lambda: next(clock))
    reporter = make(5)
    for step in range(6):
        reporter.preparing("teacher letters", step, 6)
    lines = output.getvalue().splitlines()
    assert lines[0] == "prepare teacher letters: 6 to do"
    assert lines[1:], "no progress is shown"
    assert all(re.fullmatch(r"prepare teacher letters [1-5]/6", line) for line in lines[1:])
    assert not folder.events.exists()


def test_plain_lines_come_every_so_many_steps(make, output):
    reporter = make(total_steps=20, line_every=5)
    metrics = {"reverse_kl": 0.25, "tokens_per_s": 1234.0, "wait_rollout_s": 1.5, "wait_sync_s": 0.25}
    for step in range(1, 21):
        reporter.step(step_report(step), metrics)
    lines = [line for line in output.getvalue().splitlines() if line.startswith("distill ")]
    assert [line.split()[1] for line in lines] == ["1/20", "5/20", "10/20", "15/20", "20/20"]
    assert lines[1] == "distill 5/20  loss 0.5  reverse_kl 0.25  1234 tokens/s  waits rollouts 1.50s weights 0.25s"


def test_plain_lines_tell_what_is_left_once_the_pace_is_known(make, output, monkeypatch):
    """Half a minute a step; a resumed run begins in the middle."""
    reporter = make(total_steps=900, line_every=1)
    for step in (400, 401, 410, 900):
        monkeypatch.setattr("kdray.runs.reporter.time.monotonic", lambda step=step: 30.0 * step)
        reporter.step(step_report(step), {})
    lines = [line.split("  ")[0] for line in output.getvalue().splitlines() if line.startswith("distill ")]
    assert lines == ["distill 400/900", "distill 401/900, 4:09:30 left", "distill 410/900, 4:05:00 left", "distill 900/900"]


def test_terminal_shows_one_bar_with_the_numbers(folder):
    output = io.StringIO()
    reporter = RunReporter(folder, 4, Console(file=output, force_terminal=True, width=120))
    try:
        reporter.phase("sft", 2)
        reporter.step(step_report(3, loss=0.625), {"reverse_kl": 0.25})
    finally:
        reporter.close()
    last = output.getvalue().rsplit("distill", 1)[1]
    assert "3/4" in last
    assert "loss 0.625" in last
    assert "sft" not in last


@pytest.mark.parametrize("width", [60, 80, 120, 150])
def test_a_narrow_terminal_shows_phase_step_and_time_and_the_numbers_that_fit(folder, width):
    output = io.StringIO()
    reporter = RunReporter(folder, 10_000, Console(file=output, force_terminal=True, width=width))
    numbers = {"reverse_kl": 0.25, "tokens_per_s": 1234.5, "wait_rollout_s": 0.5, "wait_teacher_s": 0.0, "wait_sync_s": 0.1}
    try:
        for step in (9_998, 9_999):
            reporter.step(step_report(step, loss=0.625), numbers)
    finally:
        reporter.close()
    lines = [line for line in Text.from_ansi(output.getvalue()).plain.splitlines() if "9999/10000" in line]
    assert lines
    assert re.match(r"distill \S+ +9999/10000 +\d:\d\d:\d\d loss 0.625", lines[-1]), lines[-1]
    assert cell_len(lines[-1].rstrip()) <= width
    shown = ["loss 0.625", "reverse_kl 0.25", "1234 tokens/s", "waits rollouts 0.50s scores 0.00s weights 0.10s"]
    count = {60: 1, 80: 3, 120: 3, 150: 4}[width]
    assert lines[-1].rstrip().endswith(f" {'  '.join(shown[:count])}"), "a number is cut, or one that fits is left out"


@pytest.mark.parametrize("width", [60, 80])
def test_what_cannot_be_counted_shows_no_count(folder, width):
    output = io.StringIO()
    reporter = RunReporter(folder, 4, Console(file=output, force_terminal=True, width=width))
    try:
        reporter.event("start", host="here")
        reporter._tick("preparing models", 12.0)
        reporter._progress.refresh()
        reporter.preparing("a teacher with a long name", 3, 200)
        reporter._progress.refresh()
    finally:
        reporter.close()
    lines = [Text.from_ansi(each).plain for each in re.split(r"[\r\n]+", output.getvalue())]
    unknown = [line.rstrip() for line in lines if line.startswith("preparing models")]
    assert unknown[-1].endswith(" 12 s")
    assert "?" not in "".join(unknown)
    assert "-:--" not in "".join(unknown)
    assert any(re.match(r"prepare a teacher with .* +3/200 +-:--:--", line) for line in lines)
    assert max(map(cell_len, lines)) <= width


def test_samples_of_some_steps_are_kept(make, folder):
    reporter = make(total_steps=25, sample_every=10, sample_count=2)
    for step in range(1, 26):
        reporter.samples([rollout(3, [0.5, 1.0, 1.5]), rollout(4), rollout(5)], step)
    names = sorted(path.name for path in folder.samples.iterdir())
    assert names == [f"step-{step:08d}.parquet" for step in (1, 10, 20, 25)]
    table = pq.read_table(folder.samples / names[1])
    assert table.schema.names == SAMPLE_SCHEMA.names
    first, second = table.to_pylist()
    assert first == {
        "source": "train",
        "step": 10,
        "sample_id": 3,
        "prompt_id": 103,
        "prompt": "7 8",
        "response": "3 4 5",
        "alpha": 0.2,
        "writer": "mixture",
        "finish_reason": "stop",
        "reverse_kl": 1.0,
        "token_ids": [3, 4, 5],
        "token_texts": ["3", " 4", " 5"],
        "token_reverse_kl": [0.5, 1.0, 1.5],
        "reference": None,
    }
    assert (second["sample_id"], second["reverse_kl"], second["token_texts"], second["token_reverse_kl"]) == (
        4,
        None,
        None,
        None,
    )


def test_a_sample_with_turns_names_its_writers_and_measures_the_targets(make, folder):
    turns = replace(rollout(3, [0.5, 99.0, 1.5]), writer=np.array([0, 4, 2], np.int8))
    context = replace(rollout(4, [1.0, 1.0, 1.0]), writer=np.full(3, 4, np.int8))
    make().samples([turns, context], 1)
    first, second = pq.read_table(folder.samples / "step-00000001.parquet").to_pylist()
    assert (first["writer"], first["reverse_kl"]) == ("mixture, environment, teacher", 1.0)
    assert first["token_reverse_kl"] == [0.5, None, 1.5]
    assert (second["writer"], second["reverse_kl"]) == ("environment", None)


def test_held_out_samples_are_replaced_by_name(make, folder):
    reporter = make(sample_count=1)
    reporter.heldout_samples([rollout(1)], "before")
    reporter.heldout_samples([rollout(2), rollout(3)], "before")
    (path,) = folder.samples.iterdir()
    assert path.name == "heldout-before.parquet"
    (row,) = pq.read_table(path).to_pylist()
    assert (row["source"], row["step"], row["sample_id"]) == ("before", None, 2)


def test_samples_hold_the_reference_answers_of_their_prompts(make, folder):
    reporter = make()
    reporter.references = {101: "3 4"}
    reporter.heldout_samples([rollout(2), rollout(1)], "after")
    reporter.samples([rollout(2), rollout(1)], 1)
    for name in ("heldout-after", "step-00000001"):
        rows = pq.read_table(folder.samples / f"{name}.parquet").to_pylist()
        assert [(row["prompt_id"], row["reference"]) for row in rows] == [(102, None), (101, "3 4")]


def test_a_driver_that_lost_its_lease_while_it_wrote_replaces_no_file(tmp_path):
    """It may stand still between its look at the lease and its last byte: what counts is whose run it is as the file moves."""
    RunReporter(RunFolder(tmp_path), 1, Console(file=io.StringIO()), decode=spell).heldout_samples([rollout(1)], "before")
    write_draws(tmp_path / "evaluations" / "before.parquet", [])
    names = ["samples/heldout-before.parquet", "evaluations/before.parquet"]
    before = [(tmp_path / name).read_bytes() for name in names]

    def lost() -> None:
        if any(tmp_path.rglob("*.partial")):
            raise LeaseLost("another driver")

    late = RunReporter(RunFolder(tmp_path, lost), 1, Console(file=io.StringIO()), decode=spell)
    with pytest.raises(LeaseLost):
        late.heldout_samples([rollout(2)], "before")
    with pytest.raises(LeaseLost):
        late.heldout_draws([], "before")
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_without_a_decoder_samples_hold_ids(folder, output):
    reporter = RunReporter(folder, 5, Console(file=output))
    reporter.samples([rollout(3)], 1)
    (row,) = pq.read_table(folder.samples / "step-00000001.parquet").to_pylist()
    assert (row["prompt"], row["response"], row["token_ids"]) == (None, None, [3, 4, 5])


def test_a_line_that_is_no_event_is_shown_alone(make, folder, output):
    make().say("closing: [soon]")
    assert "closing: [soon]" in output.getvalue()
    assert not folder.events.exists()


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def test_a_silence_is_broken_by_what_goes_on(make, output, monkeypatch):
    monkeypatch.setattr(ticks, "EVERY_S", 0.05)
    reporter = make()
    reporter.event("starting", pools=["big"])
    until(lambda: len(re.findall(r"still starting engines: \d+ s", output.getvalue())) >= 2)
    reporter.phase("sft", 2)
    until(lambda: re.search(r"still sft 0/2: \d+ s", output.getvalue()) is not None)
    reporter.phase_step(step_report(1))
    until(lambda: re.search(r"still sft 1/2: \d+ s", output.getvalue()) is not None)
    reporter.phase_step(step_report(2))
    until(lambda: re.search(r"still finishing sft: \d+ s", output.getvalue()) is not None)
    reporter.close()
    ended = output.getvalue()
    time.sleep(0.2)
    assert output.getvalue() == ended, "a closed reporter says no more"


def test_nothing_is_added_to_a_run_that_speaks(make, output):
    reporter = make()
    reporter.event("starting", pools=["big"])
    reporter.close()
    assert "still" not in output.getvalue()


def test_a_terminal_shows_the_seconds_of_what_cannot_be_counted(folder, monkeypatch):
    monkeypatch.setattr(ticks, "EVERY_S", 0.05)
    output = io.StringIO()
    reporter = RunReporter(folder, 4, Console(file=output, force_terminal=True, width=100))
    try:
        reporter.event("starting", pools=["big"])
        until(lambda: re.search(r"starting engines .*0 s", Text.from_ansi(output.getvalue()).plain) is not None)
        assert "still" not in output.getvalue()
    finally:
        reporter.close()
