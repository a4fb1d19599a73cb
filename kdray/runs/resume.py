"""What a driver does with the files of a run when it starts and when it ends. Whatever drives the loop does the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kdray.config import Config
from kdray.rollouts.schedules import Schedules
from kdray.runs.folder import RunFolder
from kdray.runs.ledger import Ledger, Totals


def rewind(
    folder: RunFolder, ledger: Ledger, schedules: Schedules, steps: int, progress: Mapping[str, Any] | None
) -> tuple[int, Totals]:
    """Bring files and schedules to where a checkpoint stands; returns the steps done there and their totals.

    Lines of later steps go: these are trained again, and count once.
    Args: steps: of distillation, beyond which checkpoints are of fine-tuning; progress: what the checkpoint's marker says; None
          where there is no checkpoint, and a run begins anew.
    """
    start_step = 0 if progress is None else min(steps, int(progress["step"]))
    folder.truncate_metrics(start_step)
    ledger.truncate(start_step)
    if progress is None:
        return 0, Totals()
    schedules.restore(progress["schedules"])
    return start_step, Totals(**progress["totals"])


def counts(ledger: Ledger, totals: Totals, config: Config) -> dict[str, int]:
    """The numbers of summary.json that the ledger and the loop have counted."""
    lost, duplicated = ledger.check(config.training.steps, config.training.batch_size)
    return {"steps": config.training.steps, **asdict(totals), "lost_samples": lost, "duplicated_samples": duplicated}
