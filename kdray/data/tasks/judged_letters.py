"""Judging task: decide which of two answers to a last-letters question is correct.

Source of the task: LLM judges, Zheng et al. 2023 (arXiv 2306.05685), whose verdict may depend on the order of the answers;
here with nonsense words.
"""

from __future__ import annotations

import numpy as np

from kdray.data.tasks.example import Example, exact_match
from kdray.data.tasks.last_letters import LastLetters
from kdray.data.tasks.words import LAST_LETTERS, NUM_WORDS


class JudgedLetters:
    """`last letters of: rilo tamen = A: on B: sn which? ` is answered by `A`; the wrong answer differs in one letter."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts."""
        return NUM_WORDS**difficulty * difficulty * (len(LAST_LETTERS) - 1) * 2

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; the correct answer comes first or second with equal probability."""
        example = LastLetters().generate(rng, difficulty)
        place = int(rng.integers(difficulty))
        others = LAST_LETTERS.replace(example.answer[place], "")
        wrong = example.answer[:place] + others[int(rng.integers(len(others)))] + example.answer[place + 1 :]
        first = bool(rng.integers(2))
        a, b = (example.answer, wrong) if first else (wrong, example.answer)
        return Example(f"{example.prompt}A: {a} B: {b} which? ", "A" if first else "B")

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the response is the answer, ignoring surrounding whitespace."""
        return exact_match(response, answer)
