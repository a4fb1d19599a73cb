"""Generalised Jensen-Shannon divergence at every position of the samples, prefixes taken as given."""

from __future__ import annotations

import math

import torch

from kdray.config import JSDLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.support import buckets, kl_terms


def jsd(student_logits: torch.Tensor, batch: LossBatch, settings: JSDLoss) -> LossOutput:
    """Sum over masked tokens of beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q, in nats.

    p is the teacher, q the student, both on the support and its tail. The gradient shrinks with beta near 0 and with
    1 - beta near 1: JSD / beta tends to forward KL, JSD / (1 - beta) to reverse KL.
    Args: student_logits: [B, S, vocab], aligned with the token that they predict.
    Source: GKD, Agarwal et al. 2024 (arXiv 2306.13649), equation 1.
    """
    both = buckets(batch.masked_rows(student_logits), batch)
    beta = settings.beta
    mixture = torch.logaddexp(both.teacher + math.log(beta), both.student + math.log1p(-beta))
    terms = beta * kl_terms(both.teacher, mixture) + (1.0 - beta) * kl_terms(both.student, mixture)
    return LossOutput(total=both.sum(terms), sums=both.metric_sums())
