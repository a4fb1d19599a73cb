"""Running sum: `a2b0c1: ` is answered step by step, `a2=2 b0=2 c1=0`: each letter, its digit, and the sum so far modulo 3.

An answer takes 5 x `difficulty` - 1 characters, each step needs the one before, and one wrong step spoils the answer: a task on
which small models fall behind as answers grow long.
"""

from __future__ import annotations

import re
import string

import numpy as np

from kdray.data.tasks.example import Example, exact_match

BASE = 3
"""Digits and sums are below it: few enough that a tiny model learns to add them in a hundred steps or so."""

_STEP = re.compile(r"([a-z])(\d)=(\d)")


class RunningSum:
    """`difficulty` digits, each behind a letter; from the 27th on, letters are repeated from the start of the alphabet."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts."""
        return int(BASE**difficulty)

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; the prompt has 2 x difficulty + 2 characters."""
        digits = [int(digit) for digit in rng.integers(BASE, size=difficulty)]
        letters = [string.ascii_lowercase[place % 26] for place in range(difficulty)]
        question = "".join(f"{letter}{digit}" for letter, digit in zip(letters, digits, strict=True))
        sums = np.cumsum(digits) % BASE
        steps = [f"{letter}{digit}={so_far}" for letter, digit, so_far in zip(letters, digits, sums, strict=True)]
        return Example(f"{question}: ", " ".join(steps))

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the response is the answer, ignoring surrounding whitespace: every step counts."""
        return exact_match(response, answer)

    def step_match(self, response: str, answer: str) -> float:
        """Compute the share of the answer's steps that the response has right at their place.

        A step is right if it has its letter and digit and adds the digit to the sum that the response wrote just before it: an
        error counts once, not again in all later steps. A step after one that cannot be read is compared with the answer.
        Steps beyond the answer's count as further wrong ones.
        """
        wanted, written = answer.split(), response.split()
        right, before = 0, 0
        for step, model in zip(written, wanted, strict=False):
            found = _STEP.fullmatch(step)
            digit = int(model[1])
            if found is not None:
                right += found[1] == model[0] and int(found[2]) == digit and int(found[3]) == (before + digit) % BASE
            before = int(found[3] if found is not None else model[-1])
        return right / max(len(wanted), len(written))
