"""Policy gradient of a response's reward, added to a distillation loss.

With alpha 0 and no staleness its expected gradient is that of -reward_weight x the expected reward. Under mixing it is weighted
token by token, as MiniLLM weights its rewards, which is biased; a loss that weights whole responses (`per_decision`) does
so with the reward too, and stays unbiased.
Source: Williams 1992; the leave-one-out baseline is in `kdray.rollouts.rewards`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from kdray.config.losses import LossSettings
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.importance import mixing_weight, staleness_ratio
from kdray.losses.policy_gradient import by_response, of_tokens
from kdray.losses.support import Buckets


def with_reward(loss: LossOutput, rows: Buckets, batch: LossBatch, settings: LossSettings) -> LossOutput:
    """distillation_weight x `loss` minus reward_weight x the sum over masked tokens of u_t A log q(y_t).

    Of the second term only log q carries gradient. A: advantage of the token's response, from the batch; u_t = (q_old / m_old)
    x (q / q_old bounded as the loss bounds it), or the product of q / m_old over the whole response (over `horizon` tokens to
    either side, if set) for a loss that weights whole responses. Unlike the log-ratios that a loss sums itself, the reward is
    neither discounted nor divided by a length.
    Args: rows: both models at the masked positions; batch: each row of it is one rollout, if the loss weights whole responses.
    Raises: TrainingError if the batch has no advantages, or lacks log m or log q of the sampler.
    """
    loss = replace(loss, total=settings.distillation_weight * loss.total)
    if settings.reward_weight == 0.0:
        return loss
    logprobs = rows.token_logprobs
    assert logprobs is not None
    advantages = batch.masked("advantages").to(logprobs.dtype)
    weights = _weights(logprobs.detach(), batch, settings)
    term = -settings.reward_weight * (weights * advantages * logprobs).sum()
    return replace(loss, total=loss.total + term, sums={**loss.sums, "reward_gradient": term.detach()})


def _weights(current: torch.Tensor, batch: LossBatch, settings: LossSettings) -> torch.Tensor:
    """u_t, [N]. Args: current: [N] log q_theta of the sampled tokens."""
    student = batch.masked("student_logprobs").to(current.dtype)
    mixture = batch.masked("mixture_logprobs").to(current.dtype)
    if settings.response_window is None:
        return mixing_weight(student, mixture) * staleness_ratio(current, student, *settings.staleness_bound)[0]
    log_ratios = by_response((current - mixture).double(), batch.mask)
    length = log_ratios.shape[1]
    window = min(settings.response_window, length)
    # Sums over t - window .. t + window, from cumulative sums with a 0 in front.
    sums = pad(log_ratios.cumsum(-1), (1, 0))
    place = torch.arange(length, device=sums.device)
    high = sums[:, (place + window + 1).clamp(max=length)]
    low = sums[:, (place - window).clamp(min=0)]
    return of_tokens((high - low).exp(), batch.mask).to(current.dtype)
