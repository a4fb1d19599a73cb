"""On-policy distillation with a control variate: the sampled log-ratio as reward, the state's reverse KL as baseline.

At gamma 0 its expected gradient is that of the reverse KL at every position, prefixes taken as given, under any alpha: an
estimate, from one token, of the full-row loss `reverse_kl`. At gamma 1 and alpha 0 it is the gradient over whole responses.
Source: Oh et al. 2026 (arXiv 2605.07865), its closed-form value function; gamma is the usual discount.
"""

from __future__ import annotations

from kdray.config import VOPDLoss
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.importance import staleness_ratio
from kdray.losses.policy_gradient import returns_from, sampled_tokens
from kdray.losses.reverse_kl import reverse_kl
from kdray.losses.support import Buckets


def vopd(rows: Buckets, batch: LossBatch, settings: VOPDLoss) -> LossOutput:
    """Sum over masked tokens of -w_t (R_t + KL(q || p)(prefix_t)) log q(y_t); only log q carries gradient.

    R_t = sum over t' >= t of gamma^(t' - t) r_t', r_t = log p(y_t) / q(y_t), whose mean given the prefix is -KL: the baseline
    removes that part of its variance. The KL is on the support and its tail: a smaller support makes the baseline worse,
    without bias, as long as the support depends on the prefix alone (`support_with_token`).
    w_t = (q_old / m_old) x (q / q_old bounded by the staleness settings).
    Args: rows: both models at the masked positions; batch: each row of it is one rollout.
    """
    tokens = sampled_tokens(rows, batch)
    both = rows.detach()
    returns = returns_from(tokens.rewards, batch.mask, settings.gamma, length_norm=False)
    # The mean of an ensemble's reward is log Z - KL: both are its baseline.
    advantages = returns + reverse_kl(both) - tokens.log_z
    staleness, clipped = staleness_ratio(tokens.current, tokens.student, settings.staleness_cap, settings.staleness)
    policy_gradient = -(tokens.mixing * staleness * advantages * tokens.logprobs).sum()
    return LossOutput(
        total=policy_gradient,
        sums={
            "policy_gradient": policy_gradient.detach(),
            "staleness_ratio": staleness.sum(),
            **batch.shares("staleness_clipped", clipped),
            **tokens.metric_sums(),
            **both.metric_sums(),
        },
    )
