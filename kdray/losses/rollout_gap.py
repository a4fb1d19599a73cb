"""Distance of the trainer's log q from the engine's, at tokens that the trained version itself sampled.

Both are the same model at the same prefix, so that the distance is one of arithmetic alone.
"""

from __future__ import annotations

import torch

from kdray.losses.batch import LossBatch
from kdray.rollouts.batching import FRESH

_ROWS = 128
"""Rows of logits that are reduced at once."""


@torch.no_grad()
def rollout_gap(logprobs: torch.Tensor | None, batch: LossBatch) -> dict[str, torch.Tensor]:
    """Sum of |log q_theta - log q of the sampler| over the tokens that the trained version sampled, and their number.

    Args: logprobs: log q_theta of the N masked tokens, [N]. Returns: an empty dict if the batch does not tell.
    """
    if logprobs is None or not _tells(batch):
        return {}
    group = batch.masked("group")
    is_fresh = torch.zeros_like(group, dtype=torch.bool)
    # By comparison with numbers: a table of the groups would be copied to the device in every chunk.
    for number in _fresh(batch):
        is_fresh |= group == number
    gaps = (logprobs - batch.masked("student_logprobs").to(logprobs.dtype)).abs()
    return {"rollout_gap": gaps.masked_fill(~is_fresh, 0.0).sum(), "rollout_gap_tokens": is_fresh.sum()}


@torch.no_grad()
def rollout_gap_of_logits(logits: torch.Tensor, batch: LossBatch) -> dict[str, torch.Tensor]:
    """`rollout_gap` from the student's logits [B, S, vocab], aligned with the token that they predict."""
    if not _tells(batch) or not _fresh(batch):
        return {}
    positions = batch.mask.flatten().nonzero()[:, 0]
    rows, tokens = logits.flatten(0, 1), batch.token_ids.flatten()
    found = []
    # A few rows at a time: a loss that reads whole logits has no memory to spare for another copy of them.
    for part in positions.split(_ROWS):
        mine = rows[part, : batch.vocab_size]
        mine = mine.to(torch.promote_types(mine.dtype, torch.float32))
        found.append(mine.gather(-1, tokens[part, None])[:, 0] - mine.logsumexp(-1))
    return rollout_gap(torch.cat(found), batch)


def _tells(batch: LossBatch) -> bool:
    return batch.student_logprobs is not None and batch.group is not None


def _fresh(batch: LossBatch) -> list[int]:
    """Numbers of the groups of tokens that the trained version sampled."""
    return [number for number, name in enumerate(batch.groups) if name.endswith(FRESH)]
