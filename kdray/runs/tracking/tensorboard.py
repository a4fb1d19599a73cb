"""TensorBoard tracker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdray.config import Config
from kdray.config.trackers import TensorBoardTracker
from kdray.runs.folder import RunFolder
from kdray.runs.tracking.trackers import DISTILL

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """`kdray.runs.tracking.trackers.Tracker` that writes a run's curves, with a writer per phase."""

    def __init__(self, settings: TensorBoardTracker) -> None:
        self._folder = Path()
        self._writers: dict[str, SummaryWriter] = {}

    def start(self, config: Config, folder: Path) -> None:
        self._folder = RunFolder(folder).tensorboard

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        if phase not in self._writers:
            # The import takes seconds and loads torch; a run that ends before its first step avoids the cost.
            from torch.utils.tensorboard import SummaryWriter

            # Curves of distillation are written to the folder itself.
            folder = self._folder / ("" if phase == DISTILL else phase)
            # Purge what an interrupted run wrote beyond the step that its resume continues from.
            self._writers[phase] = SummaryWriter(str(folder), purge_step=step)
        for name, value in metrics.items():
            # A curve cannot show None, NaN or infinity; metrics.jsonl has null there.
            if value is not None and math.isfinite(value):
                self._writers[phase].add_scalar(name, float(value), step)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Ignored: TensorBoard shows curves only."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        for writer in self._writers.values():
            writer.close()
