"""Refusal of an update whose loss or gradient cannot be used: on all ranks alike, naming samples and the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from actors.student.backend import StudentBackend, Update
from kdray.errors import TrainingError
from kdray.types import TrainBatch


class NotFinite(TrainingError):
    """A loss or gradient that is not finite, before it moved the weights."""


_RATES = {
    "sft": "training.sft.learning_rate",
    "control": "training.sft.learning_rate",
    "finetune": "training.finetune.learning_rate",
}


def refuse_loss(
    backend: StudentBackend, not_finite: Sequence[str], wrong: Sequence[str], step: int, number: int, phase: str
) -> None:
    """Refuse an update before it is made, if any rank has a reason. A collective.

    Args: not_finite: this rank's losses that are not finite; wrong: other reasons, which no other batch would change; number:
          updates made before it in its step; phase: its name.
    Raises: TrainingError on all ranks, NotFinite if there are reasons of the first kind alone.
    """
    counts = backend.reduce([float(len(not_finite)), float(len(wrong))])
    if not any(counts):
        return
    found = sorted(reason for rank in backend.gather([*not_finite, *wrong]) for reason in rank)
    message = (
        f"step {step}: the loss of the batch cannot be used: {'; '.join(found[:8])}. {_what_now(number).capitalize()}. "
        f"Where it is not finite, lower {_RATES.get(phase, 'training.learning_rate')} or look at these samples"
    )
    raise TrainingError(message) if counts[1] else NotFinite(message)


def refuse_gradient(moved: Update, batch: TrainBatch, number: int) -> None:
    """Refuse the outcome of an update if its gradient was not finite. Args: number: updates made before it in its step.

    Raises: NotFinite if the optimizer was not stepped, TrainingError if it was.
    """
    if math.isfinite(moved.grad_norm):
        return
    samples = batch.sample_ids[:8].tolist()
    message = f"step {batch.step}: the gradient is not finite (here with samples {samples} and others)"
    if moved.applied:
        raise TrainingError(f"{message}; continue from the last checkpoint")
    raise NotFinite(f"{message}; {_what_now(number)}")


def _what_now(number: int) -> str:
    """State of the optimizer after a failed update. Args: number: updates made before it in its step."""
    return "the optimizer was not moved" if number == 0 else f"{number} updates of the step were made: go back to a checkpoint"
