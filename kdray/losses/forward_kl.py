"""Forward KL: mass-covering, penalises the student for missing probability that the teacher has."""

from __future__ import annotations

import torch

from kdray.config import ForwardKLLoss
from kdray.losses.support import Buckets, kl_terms


def forward_kl(rows: Buckets, settings: ForwardKLLoss | None = None) -> torch.Tensor:
    """KL(teacher || student) of each position, nats, [N]. Its gradient in the student's logits is q - p.

    Source: Hinton et al. 2015 (arXiv 1503.02531) at temperature 1, per token.
    """
    return rows.row_sums(kl_terms(rows.teacher, rows.student))
