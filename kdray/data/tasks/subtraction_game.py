"""The subtraction game: two players in turn take one to three from a pile, and who takes the last one wins.

`rilo plays. pile 9: ` is answered by a whole game, the model's moves and the other player's in turn: `1;2;2;1;3;`.
"""

from __future__ import annotations

import re

import numpy as np

from kdray.data.tasks.example import Example
from kdray.data.tasks.words import NUM_WORDS, nonsense_word

MAX_TAKE = 3

_MOVE = re.compile(r"[1-9]")
_PILE = re.compile(r"pile (\d+): *\Z")


def pile_of(question: str) -> int:
    """Size of the pile that a question names. Raises: ValueError if it names none."""
    found = _PILE.search(question)
    if found is None:
        raise ValueError(f"{question!r:.100} names no pile at its end (`pile 9: `); use the prompts of task subtraction_game")
    return int(found[1])


def is_legal(move: str, pile: int) -> bool:
    """Whether the text of a move is a number that may be taken from the pile."""
    return _MOVE.fullmatch(move) is not None and int(move) <= min(MAX_TAKE, pile)


def winning_move(pile: int) -> int | None:
    """The number to take that leaves the other player a multiple of four; None if every move can be answered so."""
    return pile % (MAX_TAKE + 1) or None


class SubtractionGame:
    """A pile of at most 4 x `difficulty` + 3, of a size from which the first player can win."""

    def num_prompts(self, difficulty: int) -> int:
        """Number of distinct prompts."""
        return NUM_WORDS * MAX_TAKE * (difficulty + 1)

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example; its answer is the game against a player who can only lose, and takes one at a time."""
        pile = (MAX_TAKE + 1) * int(rng.integers(difficulty + 1)) + int(rng.integers(1, MAX_TAKE + 1))
        question = f"{nonsense_word(rng)} plays. pile {pile}: "
        moves = []
        while pile:
            moves.append(winning_move(pile) or 1)
            pile -= moves[-1]
        return Example(question, "".join(f"{move};" for move in moves))

    def grade(self, response: str, answer: str) -> bool:
        """Return True if the response is a game of legal moves from the answer's pile, of which the first player made the
        last."""
        *moves, rest = response.strip().split(";")
        pile = sum(int(move) for move in answer.split(";") if move)
        for move in moves:
            if not is_legal(move, pile):
                return False
            pile -= int(move)
        return not rest and pile == 0 and len(moves) % 2 == 1
