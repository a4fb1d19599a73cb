"""Shared parts of the policy-gradient losses: sampled tokens under every model, returns, whitening over a whole step.

The reward of a token is r_t = log p(y_t) / q(y_t). Against an ensemble's geometric mean g it is log g(y_t) + log Z(prefix_t) -
log q(y_t), the mean over teachers of their rewards: Z depends on the prefix, which the student writes. Everything here is
detached except `SampledTokens.logprobs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from kdray.config.losses import LossSettings
from kdray.errors import TrainingError
from kdray.losses.batch import LossBatch
from kdray.losses.importance import mixing_weight
from kdray.losses.support import Buckets
from kdray.types import TrainBatch


@dataclass(frozen=True)
class SampledTokens:
    """Log-probabilities of the N sampled tokens, row by row, all in the dtype of the student's rows."""

    logprobs: torch.Tensor  # [N] log q_theta of the sampled token, with gradient
    current: torch.Tensor  # [N] the same, detached
    student: torch.Tensor  # [N] log q of the sampler
    mixture: torch.Tensor  # [N] log m of the sampler
    teacher: torch.Tensor  # [N] log p
    log_z: torch.Tensor  # [N] log Z of an ensemble's geometric mean; 0 for a single teacher

    @property
    def mixing(self) -> torch.Tensor:
        """q / m of the sampler, [N]."""
        return mixing_weight(self.student, self.mixture)

    @property
    def rewards(self) -> torch.Tensor:
        """log p / q_theta, [N], detached; of an ensemble, the mean over its teachers."""
        return self.teacher + self.log_z - self.current

    def metric_sums(self) -> dict[str, torch.Tensor]:
        """Detached sums that every policy-gradient loss reports."""
        return {"log_ratio": self.rewards.sum()}


def sampled_tokens(rows: Buckets, batch: LossBatch) -> SampledTokens:
    """The sampled tokens of a micro-batch. Args: rows: both models at its masked positions, from `buckets`.

    Raises: TrainingError if the sampler recorded no log m, log q or log p.
    """
    logprobs = rows.token_logprobs
    assert logprobs is not None
    return SampledTokens(
        logprobs=logprobs,
        current=logprobs.detach(),
        student=batch.masked("student_logprobs").to(logprobs.dtype),
        mixture=batch.masked("mixture_logprobs").to(logprobs.dtype),
        teacher=batch.masked("teacher_logprobs").to(logprobs.dtype),
        log_z=_log_z(batch, logprobs.dtype),
    )


def _log_z(batch: LossBatch, dtype: torch.dtype) -> torch.Tensor:
    """log Z at the masked tokens, [N]; 0 where a single teacher gave the columns."""
    if batch.log_z is None:
        return torch.zeros_like(batch.masked("teacher_logprobs"), dtype=dtype)
    return batch.masked("log_z").to(dtype)


# ------------------------------------------------------------------------------------------------------- returns


def by_response(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of the N masked tokens, packed by row without gaps: [B, T], 0 after the last.

    Args: values: [N], row by row; mask: [B, S]. The inverse: `of_tokens`.
    """
    there = _there(mask)
    return values.new_zeros(there.shape).masked_scatter(there, values)


def of_tokens(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The inverse of `by_response`, [N]."""
    return rows[_there(mask)]


def _there(mask: torch.Tensor) -> torch.Tensor:
    """Mask of the positions of `by_response` that hold a token, [B, T] bool."""
    counts = mask.sum(-1, keepdim=True)
    return torch.arange(max(1, int(counts.max())), device=mask.device) < counts


def later_sums(values: torch.Tensor, gamma: float) -> torch.Tensor:
    """out[b, t] = sum over t' > t of gamma^(t' - t - 1) values[b, t'], [B, T], in log2(T) passes."""
    total = pad(values[:, 1:], (0, 1))
    stride = 1
    # Each pass doubles the window: gamma^stride times the window that starts where this one ends.
    while stride < values.shape[1]:
        total = total + gamma**stride * pad(total[:, stride:], (0, stride))
        stride *= 2
    return total


def returns_after(rewards: torch.Tensor, mask: torch.Tensor, gamma: float, length_norm: bool) -> torch.Tensor:
    """R_{t+1}: the discounted rewards after each token; divided by their number under length_norm.

    Time runs over the targets of a row: context between them neither counts nor discounts.
    Args: rewards: [N], of the masked tokens row by row; mask: [B, S] bool. Returns: [N]; 0 at the last token of a row.
    """
    returns = of_tokens(later_sums(by_response(rewards, mask), gamma), mask)
    return returns / tokens_after(mask).clamp(min=1) if length_norm else returns


def returns_from(rewards: torch.Tensor, mask: torch.Tensor, gamma: float, length_norm: bool) -> torch.Tensor:
    """R_t: the discounted rewards of each token and those after it; arguments as in `returns_after`."""
    returns = rewards + gamma * returns_after(rewards, mask, gamma, length_norm=False)
    return returns / (tokens_after(mask) + 1) if length_norm else returns


def tokens_after(mask: torch.Tensor) -> torch.Tensor:
    """Number of response tokens after each one in its row, [N]."""
    return (mask.sum(-1, keepdim=True) - mask.cumsum(-1))[mask]


# ----------------------------------------------------------------------------------------------------- whitening


@dataclass(frozen=True)
class Whitening:
    """Mean and standard deviation of the returns of a whole step, the same on every rank and in every micro-batch."""

    mean: float
    std: float

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> Whitening:
        """Compute the statistics from the output of `return_sums`, summed over all ranks."""
        count, total, squares = (float(value) for value in sums)
        mean = total / max(count, 1.0)
        variance = max(squares / max(count, 1.0) - mean**2, 0.0)
        # The floor is the reference code's: returns that are all equal become 0, not 0 / 0.
        return cls(mean=mean, std=math.sqrt(variance + 1e-8))


def return_sums(batch: TrainBatch, settings: LossSettings | None) -> np.ndarray | None:
    """Number, sum and sum of squares of the returns at the real tokens of `batch`: float64 [3].

    None if the settings use no whitening. Known before any forward pass, since these returns use the sampler's log q. The three
    numbers are additive over shards; padding rows contribute nothing.
    """
    if settings is None or not settings.whitens:
        return None
    tensors = LossBatch.from_train_batch(batch, vocab_size=0)
    returns = recorded_returns(tensors, settings, torch.float64)
    return np.array([len(returns), float(returns.sum()), float(returns.square().sum())])


def recorded_returns(batch: LossBatch, settings: LossSettings, dtype: torch.dtype) -> torch.Tensor:
    """Returns [N] from the recorded log p and log q, before whitening: they do not change with theta."""
    form = settings.returns
    assert form is not None, f"loss.type={settings.type} forms no returns"
    recorded = batch.masked("teacher_logprobs").to(dtype) + _log_z(batch, dtype) - batch.masked("student_logprobs").to(dtype)
    if form.reward_scaling is not None:
        recorded = recorded / form.reward_scaling
    if form.reward_clip is not None:
        recorded = recorded.clamp(-form.reward_clip, form.reward_clip)
    returns_of = returns_from if form.own_reward else returns_after
    return returns_of(recorded, batch.mask, form.gamma, form.length_norm)


def whitened_returns(batch: LossBatch, settings: LossSettings, whitening: Whitening | None, dtype: torch.dtype) -> torch.Tensor:
    """`recorded_returns`, normalised by the step's statistics if the settings use whitening; [N].

    Raises: TrainingError if they do and no statistics are given: a micro-batch alone cannot compute them.
    """
    returns = recorded_returns(batch, settings, dtype)
    if not settings.whitens:
        return returns
    if whitening is None:
        raise TrainingError(
            f"loss.whitening=true with loss.type={settings.type}: the loss was called without the step's statistics; "
            "add up return_sums over the ranks and pass Whitening.from_sums of them to loss_function"
        )
    return (returns - whitening.mean) / whitening.std
