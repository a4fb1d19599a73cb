"""Interface of environments: a class that the settings build, and an episode of it for every rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kdray.types import Prompt


@dataclass(frozen=True, slots=True)
class Reply:
    """What the environment writes after a turn of the model."""

    text: str
    """Text, tokenized as it stands by the student's tokenizer; may be empty."""
    last: bool = False
    """The rollout ends with this reply."""


class Episode(Protocol):
    """The environment's side of one rollout."""

    def reply(self, turn: str) -> Reply | None:
        """Answer the model's turn so far; None if it has not finished, and goes on writing.

        Args: turn: text since the prompt or the last reply; it ends with a token that holds one of the environment's `pauses`.
        An exception ends the run, reported with the prompt and the sample.
        """
        ...


class Environment(Protocol):
    """What answers the model; built from its settings, called with them."""

    pauses: str
    """ASCII characters. Sampling pauses after a token that holds one of them, and the episode is asked for its reply."""

    def start(self, prompt: Prompt, seed: int) -> Episode:
        """Begin a rollout. Replies must follow from prompt, seed and turns alone: a resumed run draws its samples again.

        Args: seed: unsigned 64-bit, the sample's own.
        """
        ...
