"""Generalised Jensen-Shannon divergence: interpolates between forward and reverse KL, and is bounded."""

from __future__ import annotations

import torch

from kdray.config import JSDLoss
from kdray.losses.support import Buckets, kl_terms, log_mixture


def jsd(rows: Buckets, settings: JSDLoss) -> torch.Tensor:
    """beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q, of each position, nats, [N].

    p is the teacher, q the student. The gradient shrinks with beta near 0 and with 1 - beta near 1: JSD / beta tends to
    forward KL, JSD / (1 - beta) to reverse KL.
    Source: GKD, Agarwal et al. 2024 (arXiv 2306.13649), equation 1.
    """
    beta = settings.beta
    mixture = log_mixture(rows.teacher, rows.student, beta)
    return rows.row_sums(beta * kl_terms(rows.teacher, mixture) + (1.0 - beta) * kl_terms(rows.student, mixture))
