"""Multiplication: `37*58=` is answered by `2146`, or by a calculator's call before it: `<<37*58=2146>>2146`."""

from __future__ import annotations

import numpy as np

from kdray.data.tasks.arithmetic import num_numbers, number
from kdray.data.tasks.example import Example, exact_match


class Multiplication:
    """The product of two numbers of exactly `difficulty` digits; a single digit may be 0."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts: 100 with one digit, 8,100 with two."""
        return num_numbers(difficulty) ** 2

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; the prompt has 2 + 2 x difficulty characters."""
        left, right = number(rng, difficulty), number(rng, difficulty)
        return Example(f"{left}*{right}=", str(left * right))

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the text after the last call is the answer, ignoring surrounding whitespace."""
        return exact_match(response.rpartition(">>")[2], answer)
