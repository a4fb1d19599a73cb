"""Distillation from a teacher with another tokenizer: probabilities compared by rank, and by id for tokens that both have.

Rows come from `kdray.teachers.cross_tokenizer`: the teacher's row before a group of tokens is placed at the student's first
token of the group.
At such a position, over the teacher's K recorded ids with probabilities p_(1) >= p_(2) >= ..., and the student's K likeliest
q_(1) >= ...:

    ULD = sum_k |p_(k) - q_(k)| + |p_rest - q_rest|        Wasserstein-1 between sorted distributions, cut to K and a rest
    KL  = KL(p || q) over {the student's ids with which the teacher's tokens begin, the rest}    forward KL of a coarse graining
    loss = sorted_weight ULD + matched_weight KL

ULD is over the teacher's own probabilities, one for each of its ids; for the KL those of tokens with the same beginning add up.
If K covers the teacher's vocabulary, ULD is the paper's distance of the two rows. The paper pairs the t-th tokens of both
responses, and here groups of the same text are paired; GOLD sorts only what is not matched, and here all ids are.
Source: Universal Logit Distillation, Boizard et al. 2024 (arXiv 2402.12030); KL over matched ids as in TRL's GOLD.
"""

from __future__ import annotations

import torch

from kdray.config import ULDLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.support import kl_terms

UNMATCHED = -2
"""Marks in `support_ids` an id of the teacher whose text the student cannot produce."""


def uld(student_logits: torch.Tensor, batch: LossBatch, settings: ULDLoss) -> LossOutput:
    """Sum over aligned positions, nats and probabilities combined by their weights; positions without a row contribute nothing.

    Args: student_logits: [B, S, vocab], aligned with the token that they predict; batch: `support_ids` may name a student's id
          several times.
    """
    rows = batch.masked_rows(student_logits)  # [N, vocab]
    ids, teacher = batch.masked("support_ids"), batch.masked("support_logprobs").to(rows.dtype)  # [N, K]
    tail = batch.masked("tail_logprobs").to(rows.dtype).unsqueeze(-1)
    aligned = (ids != -1).any(-1)
    rows, ids, teacher, tail = (part[aligned] for part in (rows, ids, teacher, tail))
    by_rank = _sorted_distance(rows, ids, teacher, tail)
    by_id = _matched_kl(rows, *_merged(ids, teacher), tail)
    return LossOutput(
        total=settings.sorted_weight * by_rank.sum() + settings.matched_weight * by_id.sum(),
        sums={
            "uld": by_rank.detach().sum(),
            "matched_kl": by_id.detach().sum(),
            "aligned": aligned.sum(),
        },
    )


def _sorted_distance(rows: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """Distance of the sorted distributions, [N]. Args: rows: student [N, vocab]; ids, teacher: [N, K]; tail: [N, 1]; logs."""
    p = teacher.masked_fill(ids == -1, -torch.inf).exp().sort(-1, descending=True).values
    width = min(p.shape[-1], rows.shape[-1])
    q = rows.exp().topk(width, dim=-1).values
    # Slots that a row does not use have no rank: the student's mass there belongs to its rest.
    ranked = torch.arange(width, device=ids.device) < (ids != -1).sum(-1, keepdim=True)
    inside = q * ranked
    distance = (p[:, :width] * ranked - inside).abs().sum(-1)
    # The teacher's ids beyond the student's whole vocabulary have no counterpart by rank either.
    rest = tail.exp().squeeze(-1) + p[:, width:].sum(-1)
    return distance + (rest - (1.0 - inside.sum(-1))).abs()


def _merged(ids: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of the student's ids once, with the teacher's mass of all its slots; UNMATCHED likewise. Args, returns: [N, K]."""
    ids, order = ids.sort(dim=-1)
    starts = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()], dim=-1)
    place = starts.cumsum(-1)
    masses = torch.zeros_like(teacher).scatter_add_(-1, place, teacher.gather(-1, order).exp().masked_fill(ids == -1, 0.0))
    return torch.full_like(ids, -1).scatter_(-1, place, ids), masses.log()


def _matched_kl(rows: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the ids that both have plus a bucket for everything else, [N]. Args: ids: all different."""
    vocab = rows.shape[-1]
    matched = ids >= 0
    inside = torch.zeros(len(rows), vocab + 1, dtype=torch.bool, device=ids.device)
    inside = inside.scatter_(-1, ids.where(matched, vocab), True)[:, :vocab]
    # Masking with -inf instead of log(1 - Q) keeps all digits; a fully matched row has no rest on either side.
    student_rest = rows.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
    teacher_rest = torch.cat([teacher.masked_fill(ids != UNMATCHED, -torch.inf), tail], dim=-1).logsumexp(-1, keepdim=True)
    has_rest = inside.sum(-1, keepdim=True) < vocab
    terms = kl_terms(teacher.masked_fill(~matched, 0.0), rows.gather(-1, ids.clamp(min=0))).masked_fill(~matched, 0.0)
    rest = kl_terms(teacher_rest, student_rest.masked_fill(~has_rest, 0.0)).masked_fill(~has_rest, 0.0)
    return terms.sum(-1) + rest.squeeze(-1)
