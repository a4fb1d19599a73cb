"""Last letters with the answer in front: `onk. last letters of: rilo tamen posk = ` is answered by `onk`.

What a model that is to teach itself must be able to do: follow an answer that it is shown.
"""

from __future__ import annotations

import numpy as np

from kdray.data.tasks.example import Example, exact_match
from kdray.data.tasks.last_letters import LastLetters


class HintedLetters:
    """`difficulty` words as in last letters; the prompt begins with the answer."""

    def num_prompts(self, difficulty: int) -> int:
        """How many different prompts exist."""
        return LastLetters().num_prompts(difficulty)

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """One example; the prompt has at most 21 + 7 x difficulty characters."""
        plain = LastLetters().generate(rng, difficulty)
        return Example(f"{plain.answer}. {plain.prompt}", plain.answer)

    def grade(self, response: str, answer: str) -> bool:
        """Whether the response is the answer, white space around it aside."""
        return exact_match(response, answer)
