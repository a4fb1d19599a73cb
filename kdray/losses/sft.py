"""Cross entropy of the reference answers: supervised fine-tuning, before distillation and as its control."""

from __future__ import annotations

import torch

from kdray.losses.batch import LossBatch, LossOutput


def sft(student_logits: torch.Tensor, batch: LossBatch, settings: None = None) -> LossOutput:
    """Sum over masked tokens of -log q(token), in nats.

    Args: student_logits: [B, S, vocab], aligned with the token that they predict.
    """
    rows = batch.masked_rows(student_logits)
    return LossOutput(total=-rows.gather(-1, batch.masked("token_ids").unsqueeze(-1)).sum())
