"""Restoring a run's files at a resume, and its final counts; shared by all drivers of the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kdray.config import Config
from kdray.rollouts.schedules import Schedules
from kdray.runs.folder import RunFolder
from kdray.runs.ledger import Ledger, Totals


def restore_run_state(
    folder: RunFolder, ledger: Ledger, schedules: Schedules, steps: int, progress: Mapping[str, Any] | None
) -> tuple[int, Totals]:
    """Restore files and schedules to the state of a checkpoint; return the steps done there and their totals.

    Lines of later steps are dropped: those are trained again, and count once.
    Args: steps: number of distillation steps, beyond which checkpoints are of fine-tuning; progress: the progress in the
          checkpoint's marker; None if there is no checkpoint, so that the run starts from scratch.
    """
    start_step = 0 if progress is None else min(steps, int(progress["step"]))
    folder.truncate_metrics(start_step)
    ledger.truncate(start_step)
    if progress is None:
        return 0, Totals()
    schedules.restore(progress["schedules"])
    return start_step, Totals(**progress["totals"])


def carried_progress(progress: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a checkpoint's progress that the checkpoints of the resumed run repeat."""
    names = ("before", "program", "stage", "distilled", "totals", "schedules")
    of_control = {name: progress[name] for name in ("after", "control_tokens") if progress["stage"] == "control"}
    # A run that an earlier version began has no score of the teacher.
    return {name: progress[name] for name in names} | {"teacher": progress.get("teacher")} | of_control


def final_counts(ledger: Ledger, totals: Totals, config: Config) -> dict[str, int]:
    """Return the counts in summary.json that come from the ledger and the loop."""
    lost, duplicated = ledger.check(config.training.steps, config.training.batch_size)
    return {"steps": config.training.steps, **asdict(totals), "lost_samples": lost, "duplicated_samples": duplicated}
