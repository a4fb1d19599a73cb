"""Loss on pretraining text: cross entropy of the text, blended with the forward KL to the teacher.

Source: MiniLLM, Gu et al. 2024 (arXiv 2306.08543), L_PT of algorithm 1, which is `teacher_share` 0; its reference code
(microsoft/LMOps, folder minillm) uses half of each.
"""

from __future__ import annotations

import torch

from kdray.config import PretrainingSettings
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.forward_kl import forward_kl
from kdray.losses.support import at_tokens, buckets


def pretraining(student_logits: torch.Tensor, batch: LossBatch, settings: PretrainingSettings) -> LossOutput:
    """Sum over masked tokens of (1 - share) * -log q(y_t) + share * KL(p || q)(prefix_t).

    The KL is on the support and its tail, and differs from the soft cross entropy of the reference code by the teacher's
    entropy, which has no gradient.
    Args: student_logits: [B, S, vocab], aligned with the token that they predict.
    """
    rows = batch.masked_rows(student_logits)
    cross_entropy = -at_tokens(rows, batch.masked("token_ids")).sum()
    sums = {"pretraining_loss": cross_entropy.detach()}
    total = (1.0 - settings.teacher_share) * cross_entropy
    if settings.teacher_share:
        divergence = forward_kl(buckets(rows, batch)).sum()
        sums["pretraining_kl"] = divergence.detach()
        total = total + settings.teacher_share * divergence
    return LossOutput(total=total, sums=sums)
