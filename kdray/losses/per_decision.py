"""Per-decision importance sampling: an unbiased policy gradient of the sequence-level reverse KL under mixing.

A reward at k is weighted by the ratios of the tokens up to k, and no later ones. The products grow without bound with response
length, so the exact form is for short responses and for tests; a horizon limits them to windows.
Source: Precup, Sutton & Singh 2000 (per-decision importance sampling), on MiniLLM's equation 3 (arXiv 2306.08543).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from kdray.config import PerDecisionLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.policy_gradient import by_response, of_tokens, sampled_tokens
from kdray.losses.reverse_kl import reverse_kl
from kdray.losses.support import Buckets


def per_decision(rows: Buckets, batch: LossBatch, settings: PerDecisionLoss) -> LossOutput:
    """Sum over masked tokens of W_t KL(q || p)(prefix_t) - W_t rho_t [sum over k > t of rho_{t+1..k} r_k] log q(y_t).

    rho_j = q_theta(y_j) / m_old(y_j): mixing and staleness combined, never capped; rho_{a..b} is its product over a to b; W_t =
    rho_{1..t-1}. Only KL and log q carry gradient. Its expectation is the gradient of KL(student || teacher) over whole
    responses for any alpha below 1 and any sampler that gives every id some mass, if the KL is on the whole row: with recorded
    ids that do not cover the vocabulary it is one on support and tail.
    With horizon h: k is at most t + h, and W_t = rho_{t-h..t-1}. h = 0 is the per-position reverse KL; for h at least the
    longest response's length minus one, the form is exact.
    Args: rows: both models at the masked positions; batch: each row of it is one rollout.
    """
    tokens = sampled_tokens(rows, batch)
    # Products of hundreds of ratios exceed the range of float32.
    log_ratios = by_response((tokens.current - tokens.mixture).double(), batch.mask)  # [B, T], one target after the other
    rewards = by_response(tokens.rewards.double(), batch.mask)
    length = log_ratios.shape[1]
    horizon = length if settings.horizon is None else min(settings.horizon, length)

    before = log_ratios.cumsum(-1) - log_ratios
    history = before - pad(before[:, : length - horizon], (horizon, 0))
    product, returns = torch.zeros_like(log_ratios), torch.zeros_like(log_ratios)
    for ahead in range(1, min(horizon + 1, length)):
        product = product + pad(log_ratios[:, ahead:], (0, ahead))
        returns = returns + product.exp() * pad(rewards[:, ahead:], (0, ahead))

    history_weight = of_tokens(history, batch.mask).exp()
    weight = of_tokens(history + log_ratios, batch.mask).exp()
    policy_gradient = -((weight * of_tokens(returns, batch.mask)).to(tokens.current) * tokens.logprobs).sum()
    single_step = (history_weight.to(tokens.current) * reverse_kl(rows)).sum()
    return LossOutput(
        total=single_step + policy_gradient,
        sums={
            "policy_gradient": policy_gradient.detach(),
            "single_step": single_step.detach(),
            "staleness_ratio": (tokens.current - tokens.student).exp().sum(),
            "trajectory_weight": weight.sum(),
            "trajectory_weight_sq": weight.square().sum(),
            **tokens.metric_sums(),
            **rows.metric_sums(),
        },
    )
