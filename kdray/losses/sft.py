"""Cross entropy of given text: supervised fine-tuning on reference answers, sequence-level distillation on a teacher's."""

from __future__ import annotations

import torch

from kdray.config import SequenceLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.support import at_tokens


def sft(student_logits: torch.Tensor, batch: LossBatch, settings: SequenceLoss | None = None) -> LossOutput:
    """Sum over masked tokens of -w log q(token), in nats; w is 1 if the batch has no weights.

    On responses sampled from the teacher its expectation is KL(teacher || student) over whole responses plus the teacher's
    entropy.
    Args: student_logits: [B, S, vocab], aligned with the token that they predict.
    Source: Kim & Rush 2016 (arXiv 1606.07947), section 3.2, for sequence-level distillation.
    """
    logprobs = at_tokens(batch.masked_rows(student_logits), batch.masked("token_ids"))
    return LossOutput(total=-(logprobs if batch.weights is None else batch.masked("weights") * logprobs).sum())
