"""Losses: one objective per file, named by its settings class in `kdray.config.losses`.

A loss is `name(student_logits, batch, settings) -> LossOutput`. A divergence is a function of both models' rows at each
position and nothing else, `name(rows, settings) -> one value per row`; the same function serves a support with its tail, the
whole vocabulary and hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name

import torch

from kdray.config.losses import LossSettings
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.chunked import chunked_divergence
from kdray.losses.functional import distillation_loss
from kdray.losses.policy_gradient import Whitening, return_sums
from kdray.losses.sft import sft
from kdray.losses.support import Buckets, divergence_loss

LossFunction = Callable[..., LossOutput]


def loss_function(settings: LossSettings | None, whitening: Whitening | None = None) -> LossFunction:
    """Look up the loss of the settings, to be called as `loss(student_logits, batch, settings)`; None means supervised.

    Args: whitening: statistics of the whole step, for losses that use whitening; see `return_sums`.
    """
    if settings is None:
        return sft
    implementation = resolve_name(settings.implementation)
    function: LossFunction = divergence_loss(implementation) if settings.divergence else implementation
    return function if whitening is None else partial(function, whitening=whitening)


def divergence_of(settings: LossSettings) -> Callable[[Buckets], torch.Tensor]:
    """The divergence of the settings, bound to them, for `chunked_divergence`. Raises: ValueError if they name another loss."""
    if not settings.divergence:
        raise ValueError(f"loss.type={settings.type} is no divergence")
    divergence = resolve_name(settings.implementation)
    return lambda rows: divergence(rows, settings)


__all__ = [
    "LossBatch",
    "LossFunction",
    "LossOutput",
    "Whitening",
    "chunked_divergence",
    "distillation_loss",
    "divergence_of",
    "loss_function",
    "return_sums",
]
