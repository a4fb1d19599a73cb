"""MiniLLM as its reference code computes it, for comparison: the paper's estimator with that code's deviations.

Kept from the code: r_t counts twice (the return starts at t, not t + 1, in addition to the single-step term); gamma is 0.95;
the return is divided by the number of remaining tokens, including t; rewards are divided by a scale and clipped; returns are
whitened; q / m is used as a PPO ratio whose clip depends on the advantage's sign; q and p of rewards and weights are those at
sampling time. Different here: sums are divided by the response tokens of the whole step, not averaged per micro-batch, and
whitening uses the real tokens of the whole step, without the zeros of padding, so that the gradient does not depend on how a
batch is split; the single-step term is on support and tail, not on the full row. The loss on pretraining text is not part of
this term. Defaults are those of its training scripts; its parser has no reward scaling and a reward clip of 1. Without
single-step term, clip, whitening, scaling and length norm, at gamma 1, the expected gradient on fresh samples at alpha 0 is
that of KL(student || teacher) over whole responses.
Source: microsoft/LMOps, folder minillm, losses.py, arguments and scripts.
"""

from __future__ import annotations

import torch

from kdray.config import LMOpsLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.policy_gradient import Whitening, sampled_tokens, whitened_returns
from kdray.losses.support import Buckets


def lmops(rows: Buckets, batch: LossBatch, settings: LMOpsLoss, whitening: Whitening | None = None) -> LossOutput:
    """Sum over masked tokens of KL(q || p)(prefix_t) + max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps)).

    A_t: whitened returns from t on; rho_t = q_theta(y_t) / m_old(y_t), with gradient. Since rho_t is q_old / m_old even before
    the first update, the clip zeroes the gradient on {A > 0, rho > 1 + eps} and {A < 0, rho < 1 - eps} from the start.
    Args: rows: both models at the masked positions; batch: each row of it is one rollout.
          whitening: statistics of the whole step, required by settings.whitening.
    """
    tokens = sampled_tokens(rows, batch)
    advantages = whitened_returns(batch, settings, whitening, tokens.current.dtype)
    ratio = (tokens.logprobs - tokens.mixture).exp()
    surrogate = -advantages * ratio
    flat = torch.zeros_like(batch.mask[batch.mask])
    if settings.clip is not None:
        low, high = 1.0 - settings.clip, 1.0 + settings.clip
        surrogate = torch.maximum(surrogate, -advantages * ratio.clamp(low, high))
        flat = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    policy_gradient = surrogate.sum()

    single_step = rows.reverse_kl() if settings.single_step else torch.zeros_like(policy_gradient)
    return LossOutput(
        total=single_step + policy_gradient,
        sums={
            "policy_gradient": policy_gradient.detach(),
            "single_step": single_step.detach(),
            "staleness_ratio": (tokens.current - tokens.student).exp().sum(),
            **batch.shares("ppo_clipped", flat),
            **tokens.metric_sums(),
            **rows.metric_sums(),
        },
    )
