"""Losses on the logits of two models, for custom training loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from kdray.config.base import Settings
from kdray.config.explain import explain
from kdray.config.losses import LossSettings, LossSource
from kdray.errors import ConfigError, TrainingError
from kdray.losses.batch import LossBatch


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    loss: LossSettings | Mapping[str, Any] | str = "forward_kl",
) -> torch.Tensor:
    """Mean over the target tokens of a divergence between two models' next-token distributions, in nats.

    Args: student_logits, teacher_logits: [B, S, vocab] as a causal model returns them: [b, s] predicts input_ids[b, s + 1];
          any float dtype, reduced in at least float32; columns beyond the smaller vocabulary are cut. The teacher gets no
          gradient.
          input_ids: [B, S] token ids.
          mask: [B, S] bool, True at the tokens that are targets, such as `labels != -100`; position 0 is never one.
          loss: a divergence: its settings, a mapping such as {"type": "jsd", "beta": 0.9}, or its name.
    Raises: ConfigError for an unknown loss, or one that is not a divergence; TrainingError if no token is a target.
    """
    settings = _settings(loss)
    if not settings.divergence:
        raise ConfigError(
            f"loss.type={settings.type} needs more than two models' logits; choose a divergence, such as forward_kl or jsd, or "
            "give loss_function a LossBatch"
        )
    targets = mask[:, 1:].bool()
    if not targets.any():
        raise TrainingError("mask: no token after the first is a target; mark the response tokens")
    from kdray.losses import loss_function

    batch = LossBatch(
        token_ids=input_ids[:, 1:],
        mask=targets,
        vocab_size=min(student_logits.shape[-1], teacher_logits.shape[-1]),
        teacher_logits=teacher_logits[:, :-1].detach(),
    )
    return loss_function(settings)(student_logits[:, :-1], batch, settings).total / targets.sum()


class _Given(Settings):
    """The argument `loss`, as the setting of that name in a recipe."""

    loss: LossSource


def _settings(loss: LossSettings | Mapping[str, Any] | str) -> LossSettings:
    if isinstance(loss, LossSettings):
        return loss
    try:
        return _Given.model_validate({"loss": {"type": loss} if isinstance(loss, str) else loss}).loss
    except ValidationError as error:
        raise ConfigError("; ".join(explain(item, _Given) for item in error.errors())) from error
