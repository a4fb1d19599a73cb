"""Trackers: settings of where a run's numbers go beside its own files.

A tracker of another distribution is a subclass of `TrackerSettings`, registered under its `type` in the entry-point group
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
    """Somewhere that is told of a run's numbers and events."""

    implementation: ClassVar[str]
    """The tracker as `module:name`: called with the settings, it gives a `kdray.runs.trackers.Tracker`."""

    type: str
    """Name of the tracker; a subclass narrows it to `Literal` of its own."""


@TRACKERS.add("tensorboard")
class TensorBoardTracker(TrackerSettings):
    """Curves for TensorBoard, in `tb/` of the run folder: distillation's in `tb/` itself, those of other phases in
    `tb/<phase>`."""

    implementation = "kdray.runs.tensorboard:TensorBoard"

    type: Literal["tensorboard"] = "tensorboard"


TrackerSource = Annotated[SerializeAsAny[TrackerSettings], TRACKERS.member(short=True)]
"""A tracker of any kind, or its name where it needs no other settings."""
