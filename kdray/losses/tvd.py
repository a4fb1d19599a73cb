"""Total variation distance: symmetric, bounded by 1, and insensitive to relative errors of small probabilities."""

from __future__ import annotations

import torch

from kdray.config import TVDLoss
from kdray.losses.support import Buckets


def tvd(rows: Buckets, settings: TVDLoss | None = None) -> torch.Tensor:
    """Half the L1 distance between the two distributions of each position, in [0, 1], [N].

    Its gradient does not vanish as the student approaches the teacher; buckets where both agree exactly give none.
    Source: f-DISTILL, Wen et al. 2023 (arXiv 2307.15190).
    """
    return 0.5 * rows.row_sums((rows.teacher.exp() - rows.student.exp()).abs())
