"""What a task is: a maker of questions with one right answer each, and the rule that checks an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Example:
    """A question and its only right answer. The prompt ends where the answer begins."""

    prompt: str
    answer: str
    task: str = ""
    """Name of the task that it came from."""


class Lesson(Protocol):
    """What a tiny model can be trained on."""

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """One example, every prompt of the task being equally likely."""
        ...


class Task(Lesson, Protocol):
    """A family of generated questions over printable ASCII, of a size set by `difficulty`; also for `data.prompts.tasks`.

    Registered as a class (`kdray.config.tasks.TASKS`), of which an instance is made without arguments.
    """

    def num_prompts(self, difficulty: int) -> int:
        """How many different prompts exist."""
        ...

    def grade(self, response: str, answer: str) -> bool:
        """Whether a response is right."""
        ...


def exact_match(response: str, answer: str) -> bool:
    """Whether response and answer are the same text, white space around them aside."""
    return response.strip() == answer.strip()
