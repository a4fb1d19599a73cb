"""Callbacks of the loop for every batch, as the config asks for them: filters, rewards, and weights of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from kdray.models.inspect import decoder
from kdray.rollouts.filters import Filters
from kdray.rollouts.rewards import Rewarding, Rewards
from kdray.runs.context import Checked
from kdray.teachers.programs import row_weights
from kdray.types import Rollout


class BatchHooks(TypedDict, total=False):
    """Fields of `kdray.loop.Hooks`, by name."""

    filters: Callable[[Sequence[Rollout]], dict[int, str]]
    rewards: Callable[[Sequence[Rollout]], Rewards | None]
    weights: Callable[[Sequence[Rollout]], dict[int, float] | None]


def batch_hooks(checked: Checked) -> BatchHooks:
    """The callbacks that the config asks for; the others are left at the loop's defaults."""
    config, dataset = checked.config, checked.dataset
    rollout, program = config.rollout, config.rollout.program
    prompts = {prompt.prompt_id: prompt for prompt in dataset.train}
    decode = decoder(checked.tokenizer)
    hooks = BatchHooks()
    if rollout.filters is not None:
        hooks["filters"] = Filters(rollout.filters, decode, dataset.grade, prompts)
    if config.rewarded:
        assert dataset.grade is not None
        hooks["rewards"] = Rewarding(decode, dataset.grade, prompts)
    weight = None if program is None else program.second_row_weight
    if weight is not None:
        # A program makes two kinds of rows.
        siblings = rollout.samples_per_prompt
        hooks["weights"] = lambda rollouts: row_weights(rollouts, siblings, weight)
    return hooks
