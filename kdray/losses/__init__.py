"""Objectives: one a file, found by the `type` of the loss settings.

To add one: write `name(student_logits, batch, settings) -> LossOutput` in its own file, enter it below, and give it a
settings class in `kdray.config`.
"""

from __future__ import annotations

from collections.abc import Callable

from kdray.config import LossSettings
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.forward_kl import forward_kl
from kdray.losses.jsd import jsd
from kdray.losses.minillm import minillm
from kdray.losses.reverse_kl import reverse_kl
from kdray.losses.sft import sft

LossFunction = Callable[..., LossOutput]

LOSSES: dict[str, LossFunction] = {
    "minillm": minillm,
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "sft": sft,
}


def loss_function(settings: LossSettings | None) -> LossFunction:
    """The loss that the settings name, to call as `loss(student_logits, batch, settings)`; None is supervised."""
    return LOSSES["sft" if settings is None else settings.type]


__all__ = ["LOSSES", "LossBatch", "LossOutput", "loss_function"]
