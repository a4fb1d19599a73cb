"""Reverse KL at every position of the samples, prefixes taken as given."""

from __future__ import annotations

import torch

from kdray.config import ReverseKLLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.support import buckets


def reverse_kl(student_logits: torch.Tensor, batch: LossBatch, settings: ReverseKLLoss) -> LossOutput:
    """Sum over masked tokens of KL(student || teacher) on the support and its tail, in nats.

    Args: student_logits: [B, S, vocab], aligned with the token that they predict.
    Source: GKD, Agarwal et al. 2024 (arXiv 2306.13649), its beta -> 1 limit.
    """
    both = buckets(batch.masked_rows(student_logits), batch)
    return LossOutput(total=both.reverse_kl(), sums=both.metric_sums())
