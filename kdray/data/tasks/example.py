"""Interface of a task: a generator of questions with exactly one correct answer, and a grader of responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Example:
    """A question and its only correct answer. The prompt ends where the answer begins."""

    prompt: str
    answer: str
    task: str = ""
    """Name of the task that generated it."""


class Lesson(Protocol):
    """Generator of examples that a tiny model can be trained on."""

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example, with all prompts of the task equally likely."""
        ...


class Task(Lesson, Protocol):
    """Family of generated questions in printable ASCII, whose size `difficulty` sets; also for `data.prompts.tasks`.

    Registered as a class (`kdray.config.tasks.TASKS`) that is instantiated without arguments. A task whose answers are written
    out in steps may also have `step_match(response, answer) -> float`, the share of right steps in [0, 1].
    """

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts."""
        ...

    def grade(self, response: str, answer: str) -> bool:
        """Return True for a correct response."""
        ...


def exact_match(response: str, answer: str) -> bool:
    """Return True if response and answer are the same text, ignoring surrounding whitespace."""
    return response.strip() == answer.strip()
