"""Arithmetic: `37+58=` is answered by `95`."""

from __future__ import annotations

import numpy as np

from kdray.data.tasks.example import Example, exact_match


class Arithmetic:
    """The sum of two numbers of exactly `difficulty` digits; a single digit may be 0."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts: 100 with one digit, 8,100 with two."""
        return num_numbers(difficulty) ** 2

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; the prompt has 2 + 2 x difficulty characters."""
        left, right = number(rng, difficulty), number(rng, difficulty)
        return Example(f"{left}+{right}=", str(left + right))

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the response is the answer, ignoring surrounding whitespace; leading zeros are wrong."""
        return exact_match(response, answer)


def num_numbers(digits: int) -> int:
    return 10 if digits == 1 else 9 * 10 ** (digits - 1)


def number(rng: np.random.Generator, digits: int) -> int:
    # Digit by digit, in Python integers: numbers beyond 18 digits do not fit the generator's 64 bits.
    first = int(rng.integers(0 if digits == 1 else 1, 10))
    return int(str(first) + "".join(str(digit) for digit in rng.integers(10, size=digits - 1)))
