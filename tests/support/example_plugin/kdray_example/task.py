"""A generated task: `reverse: abcd = ` is answered by `dcba`."""

from __future__ import annotations

import numpy as np

from kdray.data.tasks import Example

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Reversal:
    """A word of `difficulty` + 2 letters, to be written backwards."""

    def num_prompts(self, difficulty: int) -> int:
        return len(LETTERS) ** (difficulty + 2)

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        word = "".join(LETTERS[index] for index in rng.integers(len(LETTERS), size=difficulty + 2))
        return Example(f"reverse: {word} = ", word[::-1])

    def grade(self, response: str, answer: str) -> bool:
        return response.strip() == answer
