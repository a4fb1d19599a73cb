"""Notes at start on settings under which the applied gradient is not the documented one."""

from __future__ import annotations

from collections.abc import Iterator

from kdray.config import Config

FEW_RESPONSES = 16
"""Responses of an update below which the ratio of two sums differs noticeably from that of their means; docs/losses.md has
figures."""


def gradient_notes(config: Config) -> Iterator[str]:
    """One line for each setting that biases the gradient of a loss over whole responses."""
    loss, training = config.loss, config.training
    if loss.importance_weight == "q/m":
        name, objective = f"loss.type={loss.type}", "KL"
        remedy = "remove rollout.filters, or use a divergence, which takes the prefixes as given"
    elif config.rewarded:
        # A policy gradient over whole responses, whatever divergence stands beside it.
        name, objective, remedy = "loss.reward_weight", "reward", "remove one of them"
    else:
        # A divergence is a mean over the sampled tokens, with their prefixes taken as given.
        return
    if training.loss_tokens is None and training.update_size < FEW_RESPONSES:
        setting = "batch_size" if training.mini_batch_size is None else "mini_batch_size"
        yield (
            f"training.{setting}={training.update_size} with {name}: the loss is divided by the random number of tokens "
            f"of so few responses, which biases its gradient (docs/losses.md); raise training.{setting} to {FEW_RESPONSES} or "
            "more, or set training.loss_tokens to a constant"
        )
    if config.rollout.filters is not None and (rules := config.rollout.filters.in_order()):
        yield (
            f"rollout.filters ({', '.join(rule.type for rule in rules)}) with {name}: the responses that are kept are no "
            f"samples of the student, so the expected gradient is not that of the {objective} over its responses "
            f"(docs/losses.md); {remedy}"
        )
