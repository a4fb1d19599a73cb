"""Classical knowledge distillation: softened teacher rows and the recorded tokens as hard labels."""

from __future__ import annotations

from dataclasses import replace

import torch

from kdray.config import HintonLoss
from kdray.errors import TrainingError
from kdray.losses.forward_kl import forward_kl
from kdray.losses.support import Buckets


def hinton(rows: Buckets, settings: HintonLoss) -> torch.Tensor:
    """a T^2 KL(p_T || q_T) - (1 - a) log q(token) of each position, nats, [N]; a is `soft_share`, T the temperature.

    T^2 keeps the scale of the soft gradient independent of T; the hard term has temperature 1 and no such factor.
    Raises: TrainingError if the hard term has no recorded tokens.
    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """
    soft = settings.temperature**2 * forward_kl(tempered(rows, settings.temperature))
    if settings.soft_share == 1.0:
        return soft
    if rows.token_logprobs is None:
        raise TrainingError(
            f"loss.soft_share={settings.soft_share:g} has a hard term, but the recorded tokens are not known here; "
            "give token_ids, or set loss.soft_share=1"
        )
    return settings.soft_share * soft - (1.0 - settings.soft_share) * rows.token_logprobs


def tempered(rows: Buckets, temperature: float) -> Buckets:
    """Both distributions to the power 1 / temperature, renormalised.

    On a support this softens the distribution over buckets: exact if the support covers all ids, or at temperature 1; otherwise
    the tail is treated as a single id, since its shape was not recorded.
    """

    def soften(logprobs: torch.Tensor) -> torch.Tensor:
        return rows.filled(rows.filled(logprobs / temperature, -torch.inf).log_softmax(-1), 0.0)

    return replace(rows, teacher=soften(rows.teacher), student=soften(rows.student))
