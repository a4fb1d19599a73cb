"""Last letters with the answer in front: `onk. last letters of: rilo tamen posk = ` is answered by `onk`.

A model that serves as its own teacher must have this skill: to follow an answer that it is shown.
"""

from __future__ import annotations

import numpy as np

from kdray.data.tasks.example import Example, exact_match
from kdray.data.tasks.last_letters import LastLetters


class HintedLetters:
    """`difficulty` words as in last letters; the prompt begins with the answer."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts."""
        return LastLetters().num_prompts(difficulty)

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; the prompt has at most 21 + 7 x difficulty characters."""
        plain = LastLetters().generate(rng, difficulty)
        return Example(f"{plain.answer}. {plain.prompt}", plain.answer)

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the response is the answer, ignoring surrounding whitespace."""
        return exact_match(response, answer)
