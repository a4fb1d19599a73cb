"""A loss: the squared Hellinger distance, a divergence that is bounded by 1."""

from __future__ import annotations

from typing import Literal

import torch

from kdray.config import LossSettings
from kdray.losses.support import Buckets


class HellingerLoss(LossSettings):
    """Squared Hellinger distance between teacher and student at every position of the samples."""

    implementation = "kdray_example.loss:hellinger"
    divergence = True

    type: Literal["hellinger"] = "hellinger"


def hellinger(rows: Buckets, settings: HellingerLoss) -> torch.Tensor:
    """Half the sum over ids of (sqrt p - sqrt q)^2 of each position, [N]."""
    return 0.5 * rows.row_sums((torch.exp(rows.student / 2) - torch.exp(rows.teacher / 2)).square())
