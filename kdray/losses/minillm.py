"""MiniLLM: the policy gradient of the sequence-level reverse KL, split in a single-step and a long term.

With alpha 0, no length normalisation and gamma 1 its expected gradient is the gradient of KL(student || teacher) over
whole responses. Mixing (alpha > 0) with the single-token weight w_t, length normalisation and discounting each change
that expectation: they are MiniLLM's trades of bias for variance.
Source: MiniLLM, Gu et al. 2024 (arXiv 2306.08543), equations 3 to 6.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from kdray.config import MiniLLMLoss
from kdray.importance import mixing_weight, staleness_ratio
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.support import buckets


def minillm(student_logits: torch.Tensor, batch: LossBatch, settings: MiniLLMLoss) -> LossOutput:
    """Sum over masked tokens of KL(q || p)(prefix_t) - w_t R_{t+1} log q(y_t); only KL and log q carry gradient.

    r_t = log p(y_t) / q(y_t); R_{t+1} = sum over t' > t of gamma^(t' - t - 1) r_t', divided by the number of its terms
    under length_norm. w_t = (q_old / m_old) min(q / q_old, staleness_cap). The single-step KL is on the support and its
    tail and takes no w_t: it depends on the prefix alone, where the mean of w_t is 1; w_t would only add variance.
    Args: student_logits: [B, S, vocab], aligned with the token that they predict; each row is one rollout.
    """
    rows = batch.masked_rows(student_logits)  # [N, vocab]
    logprobs = rows.gather(-1, batch.masked("token_ids").unsqueeze(-1)).squeeze(-1)  # [N]
    current = logprobs.detach()

    rewards = current.new_zeros(batch.mask.shape)  # [B, S]
    rewards[batch.mask] = batch.masked("teacher_logprobs").to(current) - current
    returns = later_sums(rewards, settings.gamma)
    if settings.length_norm:
        count = batch.mask.sum(-1, keepdim=True) - batch.mask.cumsum(-1)  # response tokens after each one
        returns = returns / count.clamp(min=1)

    sampled = batch.masked("student_logprobs").to(current)
    mixing = mixing_weight(sampled, batch.masked("mixture_logprobs").to(current))
    staleness, clipped = staleness_ratio(current, sampled, settings.staleness_cap)
    policy_gradient = -(mixing * staleness * returns[batch.mask] * logprobs).sum()

    # Without the single-step term the KL is still measured, at no cost for the backward pass.
    both = buckets(rows if settings.single_step else rows.detach(), batch)
    single_step = both.reverse_kl() if settings.single_step else torch.zeros_like(policy_gradient)
    return LossOutput(
        total=single_step + policy_gradient,
        sums={
            "policy_gradient": policy_gradient.detach(),
            "single_step": single_step.detach(),
            "importance_weight": mixing.sum(),
            "importance_weight_sq": mixing.square().sum(),
            "staleness_ratio": staleness.sum(),
            "staleness_clipped": clipped.sum(),
            "log_ratio": rewards.sum(),
            **both.metric_sums(),
        },
    )


def later_sums(values: torch.Tensor, gamma: float) -> torch.Tensor:
    """out[b, t] = sum over t' > t of gamma^(t' - t - 1) values[b, t'], [B, S], in log2(S) passes."""
    total = pad(values[:, 1:], (0, 1))
    stride = 1
    # Each pass doubles the window: gamma^stride times the window that starts where this one ends.
    while stride < values.shape[1]:
        total = total + gamma**stride * pad(total[:, stride:], (0, stride))
        stride *= 2
    return total
