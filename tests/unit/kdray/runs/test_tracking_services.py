"""Weights & Biases and MLflow: what their own files hold after a run, a resume and a failure. Nothing leaves the machine."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kdray.config import Config, parse_config
from kdray.config.plugins import implemented
from kdray.errors import ConfigError
from kdray.runs.folder import TRACKER_IDS, RunFolder, read_lines
from kdray.runs.reporter import RunReporter
from kdray.runs.tracking.background import Background
from kdray.runs.tracking.trackers import Trackers
from kdray.types import StepReport

KEY = "5ecre7" * 7
PART = "teacher/main/staleness_0/importance_weight_ess"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    # No login of whoever runs the tests.
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def config(tmp_path: Path, *trackers: Any) -> Config:
    tiny = {"type": "tiny"}
    run = {"name": "told", "output": str(tmp_path), "trackers": list(trackers)}
    return parse_config({"run": run, "student": {"model": tiny}, "teachers": {"t": {"model": tiny}}})


def run(config: Config, steps: range, summary: Mapping[str, Any] | None, resume: bool = False) -> None:
    folder = RunFolder.create(config, resume)
    reporter = RunReporter(folder, 4, trackers=Trackers(config, folder.path))
    reporter.event("start", resumed_step=steps.start - 1 or None)
    if not resume:
        reporter.phase("sft", 1)
        reporter.phase_step(report(1, 3.0))
    for step in steps:
        reporter.step(report(step, 1.0 / step), {PART: 0.75, "rollout_gap": math.nan})
    if summary is None:
        reporter.event("stopped", reason="asked")
    else:
        reporter.finish(summary)
    reporter.close()


def report(step: int, loss: float) -> StepReport:
    return StepReport(step, loss, 40, grad_norm=1.5, learning_rate=1e-3, seconds=0.25)


def failures(config: Config) -> list[dict[str, Any]]:
    return [line for line in read_lines(config.run_folder / "events.jsonl") if line["kind"] == "tracker_failed"]


# -------------------------------------------------------------------------------------------------- Weights & Biases


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a file of Weights & Biases: a header of 7 bytes, then a log of LevelDB's form."""
    from wandb.proto import wandb_internal_pb2

    held, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(held):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(held[place + 4 : place + 6], "little"), held[place + 6]
        if place + 7 + length > len(held):
            return
        part += held[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last part of one.
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def ended(path: Path) -> list[Any]:
    """All records, once there is that of the end: the service's process writes the file a moment after the run has ended."""
    deadline = time.monotonic() + 60
    while True:
        records = list(wandb_records(path))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, "the run was not ended"
        time.sleep(0.05)


def wandb_files(config: Config) -> list[Path]:
    return sorted((config.run_folder / "wandb").glob("offline-run-*/run-*.wandb"))


def entries(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_a_run_at_weights_and_biases_holds_numbers_events_and_summary(tmp_path: Path) -> None:
    settings = {"type": "wandb", "mode": "offline", "project": "small", "entity": "us", "tags": ["first"]}
    told = config(tmp_path, settings)
    run(told, range(1, 3), {"steps": 2, "after": {"reverse_kl": 0.25}, "torch": "2"})
    assert failures(told) == []
    (file,) = wandb_files(told)
    records = ended(file)
    (start,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (start.entity, start.project, start.display_name, list(start.tags)) == ("us", "small", "told", ["first"])
    assert entries(start.config.update)["training"]["steps"] == told.training.steps
    rows = [entries(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [(row.get("sft/step"), row.get("sft/loss"), row.get("step"), row.get("loss")) for row in rows] == [
        (1.0, 3.0, None, None),
        (None, None, 1.0, 1.0),
        (None, None, 2.0, 0.5),
    ]
    assert [row.get(PART) for row in rows] == [None, 0.75, 0.75]
    assert not any("rollout_gap" in row for row in rows)
    axes = {record.metric.name: record.metric.step_metric for record in records if record.WhichOneof("record_type") == "metric"}
    assert (axes["sft/loss"], axes["loss"], axes[PART]) == ("sft/step", "step", "step")
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= entries(record.summary.update)
    assert (summary["summary/after/reverse_kl"], summary["summary/torch"], summary["events/phase"]) == (0.25, "2", 2)
    (end,) = [record.exit for record in records if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0


def test_a_resumed_run_is_the_same_run_at_weights_and_biases(tmp_path: Path) -> None:
    told = config(tmp_path, {"type": "wandb", "mode": "offline"})
    run(told, range(1, 3), None)
    # Its folder is named by the second.
    time.sleep(1.1)
    run(told, range(3, 5), {"steps": 4}, resume=True)
    assert failures(told) == []
    first, second = wandb_files(told)
    assert first.name == second.name
    ends = [record.exit.exit_code for file in (first, second) for record in ended(file) if record.HasField("exit")]
    assert ends == [130, 0]
    other = config(tmp_path, {"type": "wandb", "mode": "offline", "project": "other"})
    run(other, range(5, 6), None, resume=True)
    assert len({file.name for file in wandb_files(told)}) == 2


def test_no_key_is_written_anywhere(tmp_path: Path) -> None:
    told = config(tmp_path, {"type": "wandb", "mode": "offline"})
    run(told, range(1, 2), {"steps": 1})
    ended(wandb_files(told)[0])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_secrets_in_a_services_error_stay_out_of_the_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise ConnectionError(f"{KEY} refused by https://me:{KEY}@host/x")

    monkeypatch.setattr(wandb, "init", refuse)
    told = config(tmp_path, {"type": "wandb", "mode": "online"})
    run(told, range(1, 3), {"steps": 2})
    (failure,) = failures(told)
    assert failure["reason"] == "ConnectionError: *** refused by https://***@host/x"
    assert len(read_lines(told.run_folder / "metrics.jsonl")) == 2


# ------------------------------------------------------------------------------------------------------------ MLflow


def test_a_run_at_mlflow_is_continued_by_a_resume(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    told = config(tmp_path, {"type": "mlflow", "experiment": "small", "tags": {"of": "us"}})
    run(told, range(1, 3), None)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    (held,) = client.search_runs([experiment.experiment_id])
    assert (held.info.status, held.info.run_name, held.data.tags["of"]) == ("KILLED", "told", "us")
    assert held.data.params["training.steps"] == str(told.training.steps)
    assert held.data.tags["last_event"].endswith("stopped reason=asked")

    run(told, range(3, 5), {"steps": 4, "after": {"reverse_kl": 0.25}, "torch": "2"}, resume=True)
    assert failures(told) == []
    (held,) = client.search_runs([experiment.experiment_id])
    assert held.info.status == "FINISHED"
    for name, expected in {"loss": [1.0, 0.5, 1 / 3, 0.25], "sft/loss": [3.0], PART: [0.75] * 4}.items():
        history = client.get_metric_history(held.info.run_id, name)
        assert [(each.step, each.value) for each in sorted(history, key=lambda each: each.step)] == list(enumerate(expected, 1))
    assert held.data.metrics["summary/after/reverse_kl"] == 0.25
    assert (held.data.tags["summary.torch"], held.data.tags["events.phase"]) == ("2", "1")
    assert "rollout_gap" not in held.data.metrics
    assert list(json.loads((told.run_folder / TRACKER_IDS).read_text()).values()) == [held.info.run_id]


def test_an_address_with_a_password_is_refused_without_repeating_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.trackers.0.*MLFLOW_TRACKING_PASSWORD") as refused:
        config(tmp_path, {"type": "mlflow", "tracking_uri": "http://me:hunter22@host:5000"})
    assert "hunter22" not in str(refused.value)


def test_a_server_that_is_not_there_costs_its_curves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told = config(tmp_path, {"type": "mlflow", "tracking_uri": "http://127.0.0.1:9"})
    run(told, range(1, 3), {"steps": 2})
    assert [line["tracker"] for line in failures(told)] == ["mlflow"]
    assert len(read_lines(told.run_folder / "metrics.jsonl")) == 2


# --------------------------------------------------------------------------------------------------------- background


class Slow:
    """A tracker whose calls wait until they may go on."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.told: list[Any] = []

    def start(self, config: Config, folder: Path) -> None:
        self.may.wait(60)

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self.told.append((step, dict(metrics)))

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        raise ConnectionError("gone")

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self.told.append(summary)


def log_steps(tracker: Background, steps: int) -> None:
    for step in range(steps):
        tracker.log(step, {}, "distill")


def test_a_run_goes_on_while_its_tracker_waits(tmp_path: Path) -> None:
    slow = Slow()
    tracker = Background(slow)
    tracker.start(config(tmp_path), tmp_path)
    metrics = {"loss": 1.0}
    tracker.log(1, metrics, "distill")
    metrics["loss"] = 2.0
    assert slow.told == []
    slow.may.set()
    tracker.close({"steps": 1})
    assert slow.told == [(1, {"loss": 1.0}), {"steps": 1}]


def test_a_tracker_that_stays_behind_is_given_up(tmp_path: Path) -> None:
    slow = Slow()
    tracker = Background(slow, longest=3, patience_s=0.05)
    tracker.start(config(tmp_path), tmp_path)
    # Three wait in the queue, and at most one is being made.
    with pytest.raises(TimeoutError, match="3 calls behind the run"):
        log_steps(tracker, 9)
    slow.may.set()
    stuck = Slow()
    tracker = Background(stuck, patience_s=0.05)
    tracker.start(config(tmp_path), tmp_path)
    with pytest.raises(TimeoutError, match="not done"):
        tracker.close(None)
    stuck.may.set()


def test_an_error_of_the_thread_reaches_the_run(tmp_path: Path) -> None:
    slow = Slow()
    slow.may.set()
    tracker = Background(slow)
    tracker.start(config(tmp_path), tmp_path)
    tracker.event("start", {})
    with pytest.raises(ConnectionError, match="gone"):
        tracker.close(None)
    with pytest.raises(ConnectionError, match="gone"):
        tracker.log(1, {}, "distill")
    assert slow.told == []


def test_the_implementations_are_those_of_the_settings(tmp_path: Path) -> None:
    told = config(tmp_path, "wandb", "mlflow")
    assert all(isinstance(implemented(each), Background) for each in told.run.trackers)
