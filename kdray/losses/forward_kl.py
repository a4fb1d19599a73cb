"""Forward KL at every position of the samples, prefixes taken as given."""

from __future__ import annotations

import torch

from kdray.config import ForwardKLLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.support import buckets


def forward_kl(student_logits: torch.Tensor, batch: LossBatch, settings: ForwardKLLoss) -> LossOutput:
    """Sum over masked tokens of KL(teacher || student) on the support and its tail, in nats.

    Args: student_logits: [B, S, vocab], aligned with the token that they predict.
    Source: Hinton et al. 2015 (arXiv 1503.02531) at temperature 1, per token.
    """
    both = buckets(batch.masked_rows(student_logits), batch)
    return LossOutput(total=both.forward_kl(), sums=both.metric_sums())
