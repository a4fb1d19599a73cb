"""Curves of a run for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdray.config import Config
from kdray.config.trackers import TensorBoardTracker
from kdray.runs.folder import RunFolder
from kdray.runs.trackers import DISTILL

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """A `kdray.runs.trackers.Tracker`; a writer for each phase."""

    def __init__(self, settings: TensorBoardTracker) -> None:
        self._folder = Path()
        self._writers: dict[str, SummaryWriter] = {}

    def start(self, config: Config, folder: Path) -> None:
        self._folder = RunFolder(folder).tensorboard

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        if phase not in self._writers:
            # Importing it takes seconds and loads torch; a run that ends before its first step does not pay for it.
            from torch.utils.tensorboard import SummaryWriter

            # Distillation's curves stand in the folder itself.
            folder = self._folder / ("" if phase == DISTILL else phase)
            # What an interrupted run wrote beyond the step that its resume continues from is forgotten.
            self._writers[phase] = SummaryWriter(str(folder), purge_step=step)
        for name, value in metrics.items():
            # A curve cannot show what is not a number; metrics.jsonl holds null there.
            if value is not None and math.isfinite(value):
                self._writers[phase].add_scalar(name, float(value), step)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """TensorBoard has curves alone."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        for writer in self._writers.values():
            writer.close()
