"""Trackers: settings for destinations of a run's numbers besides its own files.

A tracker from another distribution is a subclass of `TrackerSettings`, registered under its `type` in the entry-point group
`kdray.trackers`; see docs/extending.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import SerializeAsAny

from kdray.config.base import Settings
from kdray.config.registry import SettingsRegistry

TRACKERS: SettingsRegistry = SettingsRegistry("kdray.trackers", "tracker")


@TRACKERS.root
class TrackerSettings(Settings):
    """A destination of a run's numbers and events."""

    implementation: ClassVar[str]
    """Implementation as `module:name`: called with the settings, it returns a `kdray.runs.trackers.Tracker`."""

    type: str
    """Name of the tracker; a subclass narrows it to a `Literal` of its own."""


@TRACKERS.add("tensorboard")
class TensorBoardTracker(TrackerSettings):
    """Curves for TensorBoard, in `tb/` of the run folder: distillation's in `tb/` itself, those of other phases in
    `tb/<phase>`."""

    implementation = "kdray.runs.tensorboard:TensorBoard"

    type: Literal["tensorboard"] = "tensorboard"


@TRACKERS.add("prometheus")
class PrometheusTracker(TrackerSettings):
    """Gauges among Ray's metrics, which every node exports for Prometheus: `ray_kdray_<metric>` with the labels `run`, `phase`
    and `of` (the teacher and staleness, for numbers of a part), and the counter `ray_kdray_events_total` by `kind`."""

    implementation = "actors.run_metrics:RayMetrics"

    type: Literal["prometheus"] = "prometheus"


TrackerSource = Annotated[SerializeAsAny[TrackerSettings], TRACKERS.member(short=True)]
"""A tracker of any kind, or its name if it needs no other settings."""
