"""Routing of prompts to teachers: the one that samples with the student, and all whose columns make its target.

A router is a pure function of the prompt and the sample id: a replay after a restart chooses the same teachers. Replicas of a
teacher and their failures are handled elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kdray.errors import ConfigError, DataError
from kdray.rollouts.seeds import sample_seed, uniforms
from kdray.teachers.ensemble import fixed_weights, weights_by_domain


class RoutablePrompt(Protocol):
    """Attributes of a prompt that a router reads."""

    @property
    def prompt_id(self) -> int: ...

    @property
    def text(self) -> str: ...

    @property
    def domain(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Teachers of one sample. Raises: ValueError if the fields contradict each other."""

    sampler: str
    """The teacher that samples with the student."""
    scorers: tuple[str, ...]
    """All teachers whose columns make the target, the sampler first."""
    weights: tuple[float, ...]
    """Their weights in the same order, summing to 1."""

    def __post_init__(self) -> None:
        if not self.scorers or self.scorers[0] != self.sampler or len(set(self.scorers)) != len(self.scorers):
            raise ValueError(f"scorers={self.scorers}: they must differ, and the sampler {self.sampler} must come first")
        if len(self.weights) != len(self.scorers) or min(self.weights) < 0.0 or not math.isclose(sum(self.weights), 1.0):
            raise ValueError(f"weights={self.weights} of teachers {self.scorers}: one each, 0 or more, with sum 1")


Router = Callable[[RoutablePrompt, int], Choice]
"""(prompt, sample id) -> its teachers."""


def single(teacher: str) -> Choice:
    """The same teacher for everything."""
    return Choice(sampler=teacher, scorers=(teacher,), weights=(1.0,))


def by_domain(mapping: Mapping[str, str], default: str | None = None) -> Router:
    """Route by the prompt's domain; prompts of another or no domain go to `default`.

    The router raises DataError if there is neither.
    """

    def route(prompt: RoutablePrompt, sample_id: int) -> Choice:
        teacher = default if prompt.domain is None else mapping.get(prompt.domain, default)
        if teacher is None:
            raise DataError(
                f"prompt {prompt.prompt_id}: domain={prompt.domain!r} is not in rollout.teachers.map, which knows "
                f"{', '.join(mapping) or 'none'}; add it there, or set rollout.teachers.default"
            )
        return single(teacher)

    return route


def by_rules(rules: Sequence[tuple[re.Pattern[str], str]], default: str | None = None) -> Router:
    """Route to the teacher of the first rule whose pattern matches anywhere in the prompt's text, else to `default`.

    The text is the one that was tokenized, including a chat template if one applies.
    The router raises DataError if no rule matches and there is no default.
    """

    def route(prompt: RoutablePrompt, sample_id: int) -> Choice:
        teacher = next((teacher for pattern, teacher in rules if pattern.search(prompt.text)), default)
        if teacher is None:
            patterns = ", ".join(repr(pattern.pattern) for pattern, _ in rules)
            raise DataError(
                f"prompt {prompt.prompt_id} matches none of rollout.teachers.rules ({patterns or 'there are none'}); "
                "add a rule for it, or set rollout.teachers.default"
            )
        return single(teacher)

    return route


def by_weights(weights: Mapping[str, float], seed: int) -> Router:
    """Route each sample to a teacher, drawn in proportion to the weights by a hash of (seed, sample id).

    Raises: ConfigError if a weight is negative or not finite, or if all are 0.
    """
    teachers = sorted(weights)  # the order of the recipe does not affect the draws
    shares = fixed_weights(teachers, weights)
    return lambda prompt, sample_id: single(teachers[_draw(shares, seed, sample_id)])


def ensemble(
    teachers: Sequence[str],
    weights: Mapping[str, float] | None = None,
    domain_weights: Mapping[str, Mapping[str, float]] | None = None,
    sampler: Literal["first", "rotate", "weights"] = "rotate",
    seed: int = 0,
) -> Router:
    """Use all teachers of positive weight for the target; one of them samples.

    Args: weights: shares for prompts whose domain has no shares of its own; None makes them equal, or with `domain_weights`
          requires a listed domain for every prompt.
          sampler: `first` in the order of `teachers`; `rotate`: in turn by sample id; `weights`: drawn in proportion to them
          by a hash of (seed, sample id).
    Raises: ConfigError if there are no teachers, one is listed twice, or the shares are invalid. The router raises DataError
            for an unknown domain if there is no default.
    """
    if not teachers or len(set(teachers)) != len(teachers):
        raise ConfigError(f"an ensemble of {list(teachers)}: name at least one teacher, and each once")
    if sampler not in ("first", "rotate", "weights"):
        raise ConfigError(f"the sampler of an ensemble is {sampler!r}; choose first, rotate or weights")
    default = dict.fromkeys(teachers, 1.0) if weights is None and not domain_weights else weights
    weights_of = weights_by_domain(teachers, domain_weights or {}, default)

    def route(prompt: RoutablePrompt, sample_id: int) -> Choice:
        try:
            shares = weights_of(prompt.domain)
        except DataError as error:
            raise DataError(f"prompt {prompt.prompt_id}: {error}") from None
        active = np.flatnonzero(shares)  # weight 0 in this domain: neither scores nor samples
        if sampler == "first":
            chosen = active[0]
        elif sampler == "rotate":
            chosen = active[sample_id % len(active)]
        else:
            chosen = active[_draw(shares[active], seed, sample_id)]
        order = [chosen, *active[active != chosen]]
        return Choice(
            sampler=teachers[chosen],
            scorers=tuple(teachers[index] for index in order),
            weights=tuple(float(shares[index]) for index in order),
        )

    return route


def _draw(weights: np.ndarray, seed: int, sample_id: int) -> int:
    """Draw an index in proportion to the weights, with the hash that also samples tokens, on a separate stream."""
    key = np.array([sample_seed(seed, "teacher_choice", sample_id)], dtype=np.uint64)
    cdf = np.cumsum(weights)
    # side="right": the first index whose cdf exceeds the point, so that weight 0 is never drawn.
    return int(np.searchsorted(cdf, uniforms(key, np.zeros(1, dtype=np.int64))[0] * cdf[-1], side="right"))
