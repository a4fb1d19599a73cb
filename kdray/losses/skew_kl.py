"""Skew KL, forward and reverse: mixing a share of the first distribution into the second bounds value and gradient.

Source: DistiLLM, Ko et al. 2024 (arXiv 2402.03898); `skew` is its skew coefficient, 0.1 by default there.
"""

from __future__ import annotations

import torch

from kdray.config import SkewForwardKLLoss, SkewReverseKLLoss
from kdray.losses.support import Buckets, kl_terms, log_mixture


def skew_forward_kl(rows: Buckets, settings: SkewForwardKLLoss) -> torch.Tensor:
    """KL(p || skew p + (1 - skew) q) of each position, nats, [N]; p is the teacher. At most -log(skew)."""
    return rows.row_sums(kl_terms(rows.teacher, log_mixture(rows.teacher, rows.student, settings.skew)))


def skew_reverse_kl(rows: Buckets, settings: SkewReverseKLLoss) -> torch.Tensor:
    """KL(q || skew q + (1 - skew) p) of each position, nats, [N]; q is the student. At most -log(skew)."""
    return rows.row_sums(kl_terms(rows.student, log_mixture(rows.student, rows.teacher, settings.skew)))
