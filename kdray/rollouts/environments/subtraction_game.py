"""The other player of the subtraction game, whose rules are in `kdray.data.tasks.subtraction_game`."""

from __future__ import annotations

import numpy as np

from kdray.config.environments import SubtractionGameEnvironment
from kdray.data.tasks.subtraction_game import MAX_TAKE, is_legal, pile_of, winning_move
from kdray.rollouts.environments.episode import Reply
from kdray.types import Prompt


class SubtractionGame:
    """A player against whom the model moves first."""

    pauses = ";"

    def __init__(self, settings: SubtractionGameEnvironment) -> None:
        self._perfect = settings.opponent == "perfect"

    def start(self, prompt: Prompt, seed: int) -> Game:
        """Raises: ValueError if the prompt names no pile."""
        question = prompt.question if isinstance(prompt.question, str) else prompt.text
        return Game(pile_of(question), None if self._perfect else np.random.default_rng(seed))


class Game:
    """One game."""

    def __init__(self, pile: int, rng: np.random.Generator | None) -> None:
        """Args: rng: draws the moves; None for a perfect player."""
        self._pile = pile
        self._rng = rng

    def reply(self, turn: str) -> Reply | None:
        """The other player's move; an empty last reply after the model's winning or illegal one."""
        move, _, rest = turn.partition(";")
        if rest or not is_legal(move, self._pile):
            return Reply("", last=True)
        self._pile -= int(move)
        if self._pile == 0:
            return Reply("", last=True)
        answer = self._move()
        self._pile -= answer
        return Reply(f"{answer};", last=self._pile == 0)

    def _move(self) -> int:
        if self._rng is None:
            return winning_move(self._pile) or 1
        return int(self._rng.integers(1, min(MAX_TAKE, self._pile) + 1))
