"""Spelled sum: `a2b0c1: ` is answered by `a2+0=2 b0+2=2 c1+2=0`: each letter and its digit, plus the sum before, modulo 3.

The running sum with its carry written out: what is added stands side by side, so that copying and adding are learned one after
the other, and a tiny model improves from step to step of its training where it has long plateaus on the running sum.
"""

from __future__ import annotations

import re

import numpy as np

from kdray.data.tasks.example import Example, exact_match
from kdray.data.tasks.running_sum import BASE, RunningSum

_STEP = re.compile(r"([a-z])(\d)\+(\d)=(\d)")


class SpelledSum:
    """`difficulty` digits, each behind a letter, as in the running sum."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts."""
        return RunningSum().num_prompts(difficulty)

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; the prompt has 2 x difficulty + 2 characters, the answer 7 x difficulty - 1."""
        short = RunningSum().generate(rng, difficulty)
        before, steps = "0", []
        for step in short.answer.split():
            term, so_far = step.split("=")
            steps.append(f"{term}+{before}={so_far}")
            before = so_far
        return Example(short.prompt, " ".join(steps))

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the response is the answer, ignoring surrounding whitespace: every step counts."""
        return exact_match(response, answer)

    def step_match(self, response: str, answer: str) -> float:
        """Compute the share of the answer's steps that the response has right at their place.

        A step is right if it has its letter and digit, takes over the sum that the response wrote just before it, and adds the
        two: an error counts once, not again in all later steps. A step after one that cannot be read is compared with the
        answer. Steps beyond the answer's count as further wrong ones.
        """
        wanted, written = answer.split(), response.split()
        right, before = 0, 0
        for step, model in zip(written, wanted, strict=False):
            found = _STEP.fullmatch(step)
            if found is not None:
                total = (before + int(model[1])) % BASE
                right += found.groups() == (model[0], model[1], str(before), str(total))
            before = int(found[4] if found is not None else model[-1])
        return right / max(len(wanted), len(written))
