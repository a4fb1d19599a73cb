"""Objectives: one a file, found by the `type` of the loss settings.

To add a divergence: write `name(rows, settings) -> one value a row` in its own file and enter it in DIVERGENCES. To add any
other: write `name(student_logits, batch, settings) -> LossOutput` and enter it in LOSSES. Either gets a settings class in
`kdray.config.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kdray.config import LossSettings
from kdray.losses.adaptive_kl import adaptive_kl
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.chunked import chunked_divergence
from kdray.losses.forward_kl import forward_kl
from kdray.losses.forward_kl_sampled import forward_kl_sampled
from kdray.losses.hinton import hinton
from kdray.losses.jsd import jsd
from kdray.losses.lmops import lmops
from kdray.losses.minillm import minillm
from kdray.losses.mse_logit import mse_logit
from kdray.losses.per_decision import per_decision
from kdray.losses.policy_gradient import Whitening, return_sums
from kdray.losses.reverse_kl import reverse_kl
from kdray.losses.sft import sft
from kdray.losses.skew_kl import skew_forward_kl, skew_reverse_kl
from kdray.losses.support import Buckets, Divergence, divergence_loss
from kdray.losses.tvd import tvd
from kdray.losses.uld import uld
from kdray.losses.vopd import vopd

LossFunction = Callable[..., LossOutput]

DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "adaptive_kl": adaptive_kl,
    "mse_logit": mse_logit,
    "hinton": hinton,
}
"""One value a row out of both models' rows: over a support and its tail, the whole vocabulary, or hidden states."""

LOSSES: dict[str, LossFunction] = {
    "minillm": minillm,
    "lmops": lmops,
    "per_decision": per_decision,
    "vopd": vopd,
    "forward_kl_sampled": forward_kl_sampled,
    "sft": sft,
    "uld": uld,
    "sequence": sft,
    **{name: divergence_loss(divergence) for name, divergence in DIVERGENCES.items()},
}


def loss_function(settings: LossSettings | None, whitening: Whitening | None = None) -> LossFunction:
    """The loss that the settings name, to call as `loss(student_logits, batch, settings)`; None is supervised.

    Args: whitening: statistics of the whole step, which losses with `whitening: true` need; see `return_sums`.
    """
    function = LOSSES["sft" if settings is None else settings.type]
    return function if whitening is None else partial(function, whitening=whitening)


def divergence_of(settings: LossSettings) -> Callable[[Buckets], torch.Tensor]:
    """The divergence that the settings name, bound to them, for `chunked_divergence`. Raises: KeyError if it is none."""
    divergence = DIVERGENCES[settings.type]
    return lambda rows: divergence(rows, settings)


__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "LossBatch",
    "LossOutput",
    "Whitening",
    "chunked_divergence",
    "divergence_of",
    "loss_function",
    "return_sums",
]
