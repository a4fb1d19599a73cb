"""Regression on the teacher's logits: the high-temperature limit of softened KL."""

from __future__ import annotations

import torch

from kdray.config import MSELogitLoss
from kdray.losses.support import Buckets


def mse_logit(rows: Buckets, settings: MSELogitLoss | None = None) -> torch.Tensor:
    """Half the mean squared difference between the centred logits of each position, squared nats, [N].

    Log-probabilities are logits up to a constant, which centring removes. The gradient is (z_q - z_p) / C over C buckets, both
    centred: the limit of `hinton` as its temperature grows. On a support, the log-masses of buckets are used as logits: the
    value does not bound that of the whole row, and a teacher mass of exactly 0 has no logit (the value is not finite).
    Source: Ba & Caruana 2014 (arXiv 1312.6184); the limit is section 2.1 of Hinton et al. 2015 (arXiv 1503.02531).
    """
    count = rows.present.sum(-1, keepdim=True)
    gap = rows.filled(rows.student - rows.teacher, 0.0)
    centred = rows.filled(gap - gap.sum(-1, keepdim=True) / count, 0.0)
    return 0.5 * centred.square().sum(-1) / count.squeeze(-1)
