"""Trackers: what they are told, in which order, and that one that fails costs the run nothing but its own curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdray.config import Config, parse_config
from kdray.config.trackers import TensorBoardTracker
from kdray.runs.folder import RunFolder, read_lines
from kdray.runs.reporter import RunReporter
from kdray.runs.tracking import tensorboard
from kdray.runs.tracking.trackers import Trackers
from kdray.types import StepReport

TINY = {"type": "tiny"}


def config(tmp_path: Path, *trackers: Any) -> Config:
    run = {"name": "told", "output": str(tmp_path), "trackers": list(trackers)}
    return parse_config({"run": run, "student": {"model": TINY}, "teachers": {"t": {"model": TINY}}})


class Recorder:
    """A tracker that keeps what it is told, and fails where it is asked to."""

    made: list[Recorder]

    def __init__(self, settings: TensorBoardTracker) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.fails_at = ""
        Recorder.made.append(self)

    def start(self, config: Config, folder: Path) -> None:
        self._note("start", config.run.name, folder)

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._note("log", step, metrics["loss"], phase)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._note("event", kind, dict(fields))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self._note("close", summary)

    def _note(self, verb: str, *what: Any) -> None:
        if verb == self.fails_at:
            raise ConnectionError("gone")
        self.told.append((verb, *what))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    Recorder.made = []
    monkeypatch.setattr(tensorboard, "TensorBoard", Recorder)
    return Recorder.made


def reporter(config: Config) -> RunReporter:
    folder = RunFolder.create(config)
    return RunReporter(folder, 2, Console(file=io.StringIO()), trackers=Trackers(config, folder.path))


def report(step: int, loss: float) -> StepReport:
    return StepReport(step, loss, 40, grad_norm=1.5, learning_rate=1e-3, seconds=0.25)


def run(told: RunReporter) -> None:
    told.event("start", resumed_step=None)
    told.phase("sft", 1)
    told.phase_step(report(1, 3.0))
    told.step(report(1, 0.5), {})
    told.finish({"steps": 2})
    told.close()


def test_a_tracker_is_told_everything_in_order(tmp_path: Path, recorders: list[Recorder]) -> None:
    run(reporter(config(tmp_path, "tensorboard")))
    (only,) = recorders
    assert only.told == [
        ("start", "told", tmp_path / "told"),
        ("event", "start", {"resumed_step": None}),
        ("event", "phase", {"name": "sft", "total": 1}),
        ("log", 1, 3.0, "sft"),
        ("event", "phase", {"name": "distill", "total": 2}),
        ("log", 1, 0.5, "distill"),
        ("close", {"steps": 2}),
    ]


def test_a_run_that_does_not_end_has_no_summary_to_tell(tmp_path: Path, recorders: list[Recorder]) -> None:
    told = reporter(config(tmp_path, "tensorboard"))
    told.close()
    assert recorders[0].told[-1] == ("close", None)


@pytest.mark.parametrize("verb", ["log", "event", "close"])
def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path: Path, recorders: list[Recorder], verb: str) -> None:
    told = reporter(config(tmp_path, "tensorboard", "tensorboard"))
    recorders[0].fails_at = verb
    run(told)
    failures = [line for line in read_lines(tmp_path / "told" / "events.jsonl") if line["kind"] == "tracker_failed"]
    assert [(line["tracker"], line["during"], line["reason"]) for line in failures] == [
        ("tensorboard", verb, "ConnectionError: gone")
    ]
    steps = [line["step"] for line in read_lines(tmp_path / "told" / "metrics.jsonl")]
    assert steps == [1]
    lost, kept = recorders
    assert [entry for entry in kept.told if entry[0] in ("log", "close")] == [
        ("log", 1, 3.0, "sft"),
        ("log", 1, 0.5, "distill"),
        ("close", {"steps": 2}),
    ]
    assert any(entry[:2] == ("event", "tracker_failed") for entry in kept.told)
    # Nothing after its failure; closing it could fail again.
    assert not any(entry[0] == "close" for entry in lost.told)


def test_trackers_that_fail_together_are_each_told_once(tmp_path: Path, recorders: list[Recorder]) -> None:
    told = reporter(config(tmp_path, "tensorboard", "tensorboard"))
    for each in recorders:
        each.fails_at = "event"
    run(told)
    failures = [line for line in read_lines(tmp_path / "told" / "events.jsonl") if line["kind"] == "tracker_failed"]
    assert [line["tracker"] for line in failures] == ["tensorboard", "tensorboard-1"]


@pytest.mark.parametrize("broken", ["__init__", "start"])
def test_a_tracker_that_does_not_start_is_no_reason_not_to_train(
    tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Recorder, broken, fail)
    run(reporter(config(tmp_path, "tensorboard")))
    (failure,) = (line for line in read_lines(tmp_path / "told" / "events.jsonl") if line["kind"] == "tracker_failed")
    assert failure["during"] == "start"
    assert "no network" in failure["reason"]
    assert all(not each.told for each in recorders)


def test_without_trackers_nothing_is_written_beside(tmp_path: Path) -> None:
    run(reporter(config(tmp_path)))
    assert not (tmp_path / "told" / "tb").exists()
    assert len(read_lines(tmp_path / "told" / "metrics.jsonl")) == 1


def test_the_trackers_of_an_installed_distribution(tmp_path: Path, example_plugin: Path) -> None:
    run_folder = tmp_path / "told"
    told = reporter(config(tmp_path, "tensorboard", {"type": "csv", "file": "n.csv"}))
    told.step(report(1, 0.5), {"reverse_kl": 0.25})
    told.finish({"steps": 1, "lost_samples": 0})
    told.close()
    rows = list(csv.reader((run_folder / "n.csv").open()))
    assert ["distill", "1", "reverse_kl", "0.25"] in rows
    assert ["event", "", "phase", ""] in rows
    assert rows[-1] == ["summary", "1", "lost_samples", "0"]
    assert any((run_folder / "tb").iterdir())


def test_a_resumed_run_may_have_other_trackers_and_an_old_one_none(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, "tensorboard"))
    folder.config.write_text(folder.config.read_text().replace("  trackers:\n  - type: tensorboard\n", ""))
    assert "trackers" not in folder.config.read_text()
    for trackers in (["tensorboard"], [], ["tensorboard", "tensorboard"]):
        RunFolder.create(config(tmp_path, *trackers), resume=True)
