"""Reverse KL: mode-seeking, penalises the student for probability where the teacher has little."""

from __future__ import annotations

import torch

from kdray.config import ReverseKLLoss
from kdray.losses.support import Buckets, kl_terms


def reverse_kl(rows: Buckets, settings: ReverseKLLoss | None = None) -> torch.Tensor:
    """KL(student || teacher) of each position, nats, [N]. Its gradient in the student's logits is q (log q / p - KL).

    Source: GKD, Agarwal et al. 2024 (arXiv 2306.13649), its beta -> 1 limit.
    """
    return rows.row_sums(kl_terms(rows.student, rows.teacher))
