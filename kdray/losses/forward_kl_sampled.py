"""Forward KL estimated at the sampled token: sequence-level distillation on teacher samples, and unbiased under mixing."""

from __future__ import annotations

import torch

from kdray.config import ForwardKLSampledLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.support import at_tokens


def forward_kl_sampled(student_logits: torch.Tensor, batch: LossBatch, settings: ForwardKLSampledLoss) -> LossOutput:
    """Sum over masked tokens of (p / m) log(p / q) at the sampled token, nats; only log q carries gradient.

    Given the prefix, value and gradient are unbiased estimates of those of KL(teacher || student), whichever student sampled
    the token, since m is the density it was sampled from. With one teacher p / m is at most 1 / alpha; at alpha 1 it is 1, and
    this is sequence-level distillation on the teacher's samples, minus their constant entropy. Against an ensemble p is the
    mean of the teachers and m has the one that sampled, so that p / m is unbounded where the others like a token that both
    the sampler and the student find unlikely.
    Args: student_logits: [B, S, vocab], aligned with the token that they predict.
    Source: Kim & Rush 2016 (arXiv 1606.07947) for alpha 1; importance sampling otherwise.
    """
    logprobs = at_tokens(batch.masked_rows(student_logits), batch.masked("token_ids"))
    teacher = batch.masked("teacher_logprobs").to(logprobs.dtype)
    weight = (teacher - batch.masked("mixture_logprobs").to(logprobs.dtype)).exp()
    log_ratio = teacher - logprobs
    return LossOutput(total=(weight * log_ratio).sum(), sums={"log_ratio": log_ratio.detach().sum()})
