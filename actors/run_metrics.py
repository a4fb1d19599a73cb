"""Prometheus tracker: a run's numbers as metrics of Ray, which every node exports beside Ray's own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Gauge

from kdray.config import Config
from kdray.config.trackers import PrometheusTracker
from kdray.runs.metrics import METRICS

PREFIX = "kdray_"
"""Ray adds `ray_` in front of it."""
STEP, EVENTS = f"{PREFIX}step", f"{PREFIX}events"
_LABELS = ("run", "phase", "of")


def exported(name: str) -> tuple[str, str]:
    """Split the name of a metric into that of the gauge and the label `of`: the part of the run that it describes.

    `teacher/main/staleness_0/importance_weight_ess` is `kdray_importance_weight_ess` of `teacher/main/staleness_0`.
    """
    of, _, leaf = name.rpartition("/")
    return PREFIX + re.sub(r"\W", "_", leaf), of


class RayMetrics:
    """`kdray.runs.tracking.trackers.Tracker` that sets gauges of Ray; it needs the driver's connection to the cluster."""

    def __init__(self, settings: PrometheusTracker) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._run = ""
        self._events = Counter(EVENTS, "Events of the run, as in events.jsonl", tag_keys=("run", "kind"))

    def start(self, config: Config, folder: Path) -> None:
        self._run = config.run.name

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._set(STEP, "Steps done in the phase", step, phase)
        for name, value in metrics.items():
            if value is not None and math.isfinite(value):
                gauge, of = exported(name)
                known = METRICS.get(name.rpartition("/")[2])
                self._set(gauge, "" if known is None else f"{known.meaning} ({known.unit})", value, phase, of)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._events.inc(1.0, {"run": self._run, "kind": kind})

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Nothing is left open: Ray exports the last values until the driver ends."""

    def _set(self, name: str, meaning: str, value: float, phase: str, of: str = "") -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, meaning, tag_keys=_LABELS)
        self._gauges[name].set(float(value), {"run": self._run, "phase": phase, "of": of})
