"""MiniLLM: the policy gradient of the sequence-level reverse KL, split into a single-step and a long term.

With alpha 0, no length normalisation and gamma 1, and a support that covers the vocabulary, its expected gradient is the
gradient of KL(student || teacher) over whole responses. Mixing (alpha > 0) with the single-token weight w_t, length
normalisation, discounting and whitening each change that expectation: they trade bias for variance. In particular, w_t does not
remove the bias of mixing; `per_decision` does. It departs from equations 5 to 7 and Algorithm 1 in five points. The paper's
gradient is R times that of min[rho, clip(rho, 1 - eps, 1 + eps)], rho = q / m and eps 0.2: none above 1 + eps, whatever the
sign of R; here only q / q_old is bounded, from above (`staleness_cap`), so that mixing alone never clips (`lmops` has the
reference code's clip, which depends on the sign). The paper weights the single-step term by w_t as well. Equation 6 divides by
T - t - 1, here the number of rewards, T - t, divides. The single-step term is on support and tail. The sum is divided by the
response tokens of the update, not by the number of responses.
Source: MiniLLM, Gu et al. 2024 (arXiv 2306.08543), equations 3 to 6.
"""

from __future__ import annotations

import torch

from kdray.config import MiniLLMLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.importance import staleness_ratio
from kdray.losses.policy_gradient import Whitening, returns_after, returns_from, sampled_tokens, whitened_returns
from kdray.losses.support import Buckets


def minillm(rows: Buckets, batch: LossBatch, settings: MiniLLMLoss, whitening: Whitening | None = None) -> LossOutput:
    """Sum over masked tokens of KL(q || p)(prefix_t) - w_t R_{t+1} log q(y_t); only KL and log q carry gradient.

    r_t = log p(y_t) / q(y_t); R_{t+1} = sum over t' > t of gamma^(t' - t - 1) r_t', divided by the number of its terms under
    length_norm. w_t = (q_old / m_old) x (q / q_old bounded by the staleness settings), the first factor 1 without
    settings.mixing_weight. The single-step KL is on the support and
    its tail and takes no w_t: it depends only on the prefix, given which w_t has mean 1, so w_t would only add variance.
    Without the single-step term the return starts at the token itself, as in equation 2: r_t is a one-sample estimate of that
    KL, and without either the token would get no credit. Under whitening r_t uses the sampler's q, whose returns are known
    before the step's first forward pass.
    Args: rows: both models at the masked positions; batch: each row of it is one rollout.
          whitening: statistics of the whole step, required by settings.whitening.
    """
    tokens = sampled_tokens(rows, batch)
    if settings.whitening:
        returns = whitened_returns(batch, settings, whitening, tokens.current.dtype)
    else:
        returns_of = returns_after if settings.single_step else returns_from
        returns = returns_of(tokens.rewards, batch.mask, settings.gamma, settings.length_norm)
    staleness, clipped = staleness_ratio(tokens.current, tokens.student, settings.staleness_cap, settings.staleness)
    weights = tokens.mixing * staleness if settings.mixing_weight else staleness
    policy_gradient = -(weights * returns * tokens.logprobs).sum()

    single_step = rows.reverse_kl() if settings.single_step else torch.zeros_like(policy_gradient)
    return LossOutput(
        total=single_step + policy_gradient,
        sums={
            "policy_gradient": policy_gradient.detach(),
            "single_step": single_step.detach(),
            "staleness_ratio": staleness.sum(),
            **batch.shares("staleness_clipped", clipped),
            **tokens.metric_sums(),
            **rows.metric_sums(),
        },
    )
