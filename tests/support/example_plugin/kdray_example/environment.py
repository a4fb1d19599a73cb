"""An environment: whenever the model asks, it is told the next letter of the answer."""

from __future__ import annotations

from typing import Literal

from kdray.config.environments import EnvironmentSettings
from kdray.rollouts.environments import Reply
from kdray.types import Prompt


class HintsEnvironment(EnvironmentSettings):
    """Writes the letters of the reference answer, one after each mark."""

    implementation = "kdray_example.environment:Hints"

    type: Literal["hints"] = "hints"
    marks: str = "?"
    """Characters by which the model asks."""


class Hints:
    def __init__(self, settings: HintsEnvironment) -> None:
        self.pauses = settings.marks

    def start(self, prompt: Prompt, seed: int) -> Hinted:
        return Hinted(prompt.answer or "")


class Hinted:
    def __init__(self, left: str) -> None:
        self._left = left

    def reply(self, turn: str) -> Reply | None:
        letter, self._left = self._left[:1], self._left[1:]
        # Nothing is left to tell: the rollout is over.
        return Reply(letter, last=not letter)
