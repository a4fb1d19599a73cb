"""Cross entropy of the reference answers: supervised fine-tuning, before distillation and as its control."""

from __future__ import annotations

import torch

from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.support import at_tokens


def sft(student_logits: torch.Tensor, batch: LossBatch, settings: None = None) -> LossOutput:
    """Sum over masked tokens of -log q(token), in nats.

    Args: student_logits: [B, S, vocab], aligned with the token that they predict.
    """
    return LossOutput(total=-at_tokens(batch.masked_rows(student_logits), batch.masked("token_ids")).sum())
