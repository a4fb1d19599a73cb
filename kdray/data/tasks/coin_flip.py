"""Coin flip: is a coin that starts heads up still heads up after each person flipped it or did not?

Source of the task: chain-of-thought prompting, Wei et al. 2022 (arXiv 2201.11903), section 5; here with nonsense names.
"""

from __future__ import annotations

import numpy as np

from kdray.data.tasks.example import Example, exact_match
from kdray.data.tasks.words import NUM_WORDS, nonsense_word


class CoinFlip:
    """`difficulty` people around the coin; the answer is `yes` or `no`, so that guessing scores a half."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts."""
        return (2 * NUM_WORDS) ** difficulty

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; the prompt has at most 44 + 24 x difficulty characters."""
        flips = rng.integers(2, size=difficulty)
        turns = [f"{nonsense_word(rng)} {'flips' if flip else 'does not flip'} it." for flip in flips]
        heads_up = int(flips.sum()) % 2 == 0
        return Example(f"a coin is heads up. {' '.join(turns)} is it still heads up? ", "yes" if heads_up else "no")

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the response is the answer, ignoring surrounding whitespace."""
        return exact_match(response, answer)
