"""Losses with their settings bound: looked up by `loss_function`, and with what they read of the student as an `Objective`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pkgutil import resolve_name

import torch

from kdray.config import PretrainingSettings
from kdray.config.losses import LossSettings, Reads
from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.policy_gradient import Whitening
from kdray.losses.pretraining import pretraining
from kdray.losses.reward import with_reward
from kdray.losses.rollout_gap import rollout_gap, rollout_gap_of_logits
from kdray.losses.sft import sft
from kdray.losses.support import Buckets, buckets, buckets_loss, divergence_loss, divergence_sum

LossFunction = Callable[..., LossOutput]


def loss_function(settings: LossSettings | None, whitening: Whitening | None = None) -> LossFunction:
    """Look up the loss of the settings, to be called as `loss(student_logits, batch, settings)`; None means supervised.

    Args: whitening: statistics of the whole step, for losses that use whitening; see `return_sums`.
    """
    if settings is None:
        return sft
    implementation = resolve_name(settings.implementation)
    function: LossFunction = implementation
    if settings.divergence:
        function = divergence_loss(implementation)
    elif settings.reads == "buckets":
        function = buckets_loss(implementation)
    bound: LossFunction = function if whitening is None else partial(function, whitening=whitening)
    as_it_is = not settings.reads_buckets or (settings.reward_weight == 0.0 and settings.distillation_weight == 1.0)
    return bound if as_it_is else partial(_rewarded, bound)


def _rewarded(function: LossFunction, logits: torch.Tensor, batch: LossBatch, settings: LossSettings) -> LossOutput:
    """A loss of whole logits with its reward term."""
    return with_reward(function(logits, batch, settings), buckets(batch.masked_rows(logits), batch), batch, settings)


def divergence_of(settings: LossSettings) -> Callable[[Buckets], torch.Tensor]:
    """The divergence of the settings, bound to them, for `chunked_divergence`. Raises: ValueError if they name another loss."""
    if not settings.divergence:
        raise ValueError(f"loss.type={settings.type} is no divergence")
    divergence = resolve_name(settings.implementation)
    return lambda rows: divergence(rows, settings)


@dataclass(frozen=True)
class Objective:
    """A loss with settings and statistics of the step bound, and what it reads of the student."""

    reads: Reads
    """As `LossSettings.reads`; a divergence reads `token`."""
    of_logits: Callable[[torch.Tensor, LossBatch], LossOutput]
    """(logits [B, S, vocab] aligned with the token that they predict, batch) -> the loss."""
    of_buckets: Callable[[Buckets, LossBatch], LossOutput] | None = None
    """(both models at the batch's masked positions, batch) -> the loss; None if it reads more of the student than those."""

    @classmethod
    def of(cls, settings: LossSettings | None, whitening: Whitening | None = None) -> Objective:
        """The loss of the settings; None means supervised. Args: whitening: as for `loss_function`."""
        function = loss_function(settings, whitening)

        def of_logits(logits: torch.Tensor, batch: LossBatch) -> LossOutput:
            loss = function(logits, batch, settings)
            return replace(loss, sums={**loss.sums, **rollout_gap_of_logits(logits, batch)})

        if settings is None:
            return cls("token", of_logits)
        implementation = resolve_name(settings.implementation)
        step = {} if whitening is None else {"whitening": whitening}

        def of_buckets(rows: Buckets, batch: LossBatch) -> LossOutput:
            if settings.divergence:
                loss = divergence_sum(implementation, rows, settings)
            else:
                loss = implementation(rows, batch, settings, **step)
            loss = with_reward(loss, rows, batch, settings)
            return replace(loss, sums={**loss.sums, **rollout_gap(rows.token_logprobs, batch)})

        if settings.reads_buckets:
            reads: Reads = "token" if settings.divergence else "buckets"
            return cls(reads, lambda logits, batch: of_buckets(buckets(batch.masked_rows(logits), batch), batch), of_buckets)
        return cls(settings.reads, of_logits)

    @classmethod
    def of_text(cls, settings: PretrainingSettings) -> Objective:
        """The loss on pretraining text."""
        return cls("token", lambda logits, batch: pretraining(logits, batch, settings))
