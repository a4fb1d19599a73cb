"""The Prometheus tracker and its dashboard: names, labels and values that Ray is given, and names that the panels ask for."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from actors import run_metrics
from actors.run_metrics import EVENTS, STEP, RayMetrics, exported
from kdray.config import parse_config
from kdray.config.plugins import implemented
from kdray.runs.metrics import METRICS

DASHBOARD = Path(__file__).parents[3] / "cluster" / "manifests" / "grafana-dashboard.json"
TINY = {"type": "tiny"}


class Metric:
    """A metric of Ray that keeps what it is given."""

    made: dict[str, Metric]

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] = ()) -> None:
        assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name), "Prometheus takes no other names"
        self.description, self.keys, self.values = description, set(tag_keys), {}
        assert name not in Metric.made, "a metric is made once"
        Metric.made[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == self.keys
        self.values[tuple(tags.values())] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.set(self.values.get(tuple(tags.values()), 0.0) + value, tags)


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RayMetrics:
    Metric.made = {}
    monkeypatch.setattr(run_metrics, "Gauge", Metric)
    monkeypatch.setattr(run_metrics, "Counter", Metric)
    run = {"name": "told", "output": str(tmp_path), "trackers": ["prometheus"]}
    config = parse_config({"run": run, "student": {"model": TINY}, "teachers": {"t": {"model": TINY}}})
    made: Any = implemented(config.run.trackers[0])
    made.start(config, tmp_path)
    assert isinstance(made, RayMetrics)
    return made


def test_numbers_become_gauges_by_run_phase_and_part(tracker: RayMetrics) -> None:
    part = "teacher/main/staleness_0/importance_weight_ess"
    tracker.log(1, {"loss": 2.0, part: 0.75, "rollout_gap": None, "grad_norm": math.nan}, "distill")  # type: ignore[dict-item]
    tracker.log(2, {"loss": 1.5}, "distill")
    tracker.log(1, {"loss": 3.0}, "sft")
    assert Metric.made["kdray_loss"].values == {("told", "distill", ""): 1.5, ("told", "sft", ""): 3.0}
    assert "nats/token" in Metric.made["kdray_loss"].description
    assert Metric.made["kdray_importance_weight_ess"].values == {("told", "distill", "teacher/main/staleness_0"): 0.75}
    assert Metric.made[STEP].values == {("told", "distill", ""): 2.0, ("told", "sft", ""): 1.0}
    assert not Metric.made.keys() & {"kdray_rollout_gap", "kdray_grad_norm"}


def test_events_are_counted_by_kind(tracker: RayMetrics) -> None:
    for kind in ("checkpoint", "retry", "checkpoint"):
        tracker.event(kind, {"step": 1})
    tracker.close(None)
    assert Metric.made[EVENTS].values == {("told", "checkpoint"): 2.0, ("told", "retry"): 1.0}


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads(DASHBOARD.read_text())
    there = {f"ray_{exported(name)[0]}" for name in METRICS} | {f"ray_{STEP}", f"ray_{EVENTS}_total"}
    asked = set(re.findall(r"ray_kdray_\w+", DASHBOARD.read_text()))
    assert asked <= there
    assert len(asked) > 15
    # Waits by stage and by teacher, age of the queue, replicas, versions, tokens, staleness, bytes.
    wanted = """wait_rollout_s wait_teacher_s wait_sync_s wait_s queue_age_s teacher_replicas step tokens_per_s staleness_mean
        staleness_max published_bytes train_step_s"""
    assert {f"ray_kdray_{name}" for name in wanted.split()} <= asked
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    labels = {label for expression in _expressions(board) for label in re.findall(r"(\w+)=~?\"", expression)}
    assert labels <= {"run", "phase", "of", "kind"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def _expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]
