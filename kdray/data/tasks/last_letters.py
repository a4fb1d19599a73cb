"""Last-letter concatenation: `last letters of: rilo tamen posk = ` is answered by `onk`.

Source of the task: chain-of-thought prompting, Wei et al. 2022 (arXiv 2201.11903), section 5; here with nonsense words.
"""

from __future__ import annotations

import numpy as np

from kdray.data.tasks.example import Example, exact_match
from kdray.data.tasks.words import NUM_WORDS, nonsense_word


class LastLetters:
    """`difficulty` words; the answer is their last letters in order."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts."""
        return NUM_WORDS**difficulty

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; the prompt has at most 19 + 6 x difficulty characters."""
        words = [nonsense_word(rng) for _ in range(difficulty)]
        return Example(f"last letters of: {' '.join(words)} = ", "".join(word[-1] for word in words))

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the response is the answer, ignoring surrounding whitespace."""
        return exact_match(response, answer)
