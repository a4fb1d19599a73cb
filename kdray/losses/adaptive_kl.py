"""Adaptive KL: forward KL to the extent that the student misses the teacher's head, reverse KL that it misses the tail."""

from __future__ import annotations

import torch

from kdray.config import AdaptiveKLLoss
from kdray.losses.forward_kl import forward_kl
from kdray.losses.reverse_kl import reverse_kl
from kdray.losses.support import Buckets


def adaptive_kl(rows: Buckets, settings: AdaptiveKLLoss) -> torch.Tensor:
    """h KL(p || q) + (1 - h) KL(q || p) of each position, nats, [N]; h = `head_share`, without gradient.

    Source: AKL, Wu et al. 2024 (arXiv 2404.02657).
    """
    share = head_share(rows, settings.head_mass)
    return share * forward_kl(rows) + (1.0 - share) * reverse_kl(rows)


@torch.no_grad()
def head_share(rows: Buckets, head_mass: float) -> torch.Tensor:
    """Share of the gap sum |p - q| that lies in the teacher's head, [N].

    The head is the teacher's most likely id, and the following ones as long as they sum to at most `head_mass`, as in the
    authors' code. The tail bucket is never part of the head, whatever its mass, since each of its ids is unlikely.
    """
    teacher = rows.filled(rows.teacher.exp(), 0.0)
    gap = (teacher - rows.filled(rows.student.exp(), 0.0)).abs()
    rank = rows.filled(teacher, -1.0)
    if rows.has_tail:
        rank[:, -1] = -1.0
    order = rank.argsort(dim=-1, descending=True)
    in_head = teacher.gather(-1, order).cumsum(-1) <= head_mass
    in_head[:, 0] = True
    total = gap.sum(-1)
    # Equal rows have no gap and no divergence: any share is correct, but 0 / 0 must be avoided.
    return (gap.gather(-1, order) * in_head).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny)
