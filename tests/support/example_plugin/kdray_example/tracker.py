"""A tracker: every number of a run as a line of a CSV file in its folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kdray.config import Config
from kdray.config.trackers import TrackerSettings


class CsvTracker(TrackerSettings):
    """Writes `<file>` in the run folder, a line for every number of every step."""

    implementation = "kdray_example.tracker:Csv"

    type: Literal["csv"] = "csv"
    file: str = "numbers.csv"
    """Name of the file."""


class Csv:
    def __init__(self, settings: CsvTracker) -> None:
        self._name = settings.file

    def start(self, config: Config, folder: Path) -> None:
        # A resumed run goes on with its file.
        self._file = (folder / self._name).open("a", newline="", encoding="utf-8")
        self._lines = csv.writer(self._file)

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._lines.writerows((phase, step, name, value) for name, value in metrics.items())

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._lines.writerow(("event", "", kind, ""))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._lines.writerow(("summary", summary["steps"], "lost_samples", summary["lost_samples"]))
        self._file.close()
