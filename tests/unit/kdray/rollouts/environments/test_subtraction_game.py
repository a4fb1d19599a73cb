"""The subtraction game: who can win, legal moves, both opponents, and a grader that agrees with the game as it was played."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from kdray.config.environments import SubtractionGameEnvironment
from kdray.data.tasks import generate_examples, task
from kdray.data.tasks.subtraction_game import is_legal, pile_of, winning_move
from kdray.rollouts.environments.subtraction_game import Game, SubtractionGame
from kdray.types import Prompt


@cache
def wins(pile: int) -> bool:
    """Whether who moves can win, by looking at every game."""
    return any(not wins(pile - take) for take in (1, 2, 3) if take <= pile)


def start(opponent: str, pile: int, seed: int = 0) -> Game:
    environment = SubtractionGame(SubtractionGameEnvironment.model_validate({"opponent": opponent}))
    prompt = Prompt(0, np.zeros(1, np.int32), question=f"rilo plays. pile {pile}: ")
    return environment.start(prompt, seed)


def played(game: Game, moves: list[str]) -> tuple[str, bool]:
    """The transcript, and whether the game ended with it."""
    text, over = "", False
    for move in moves:
        assert not over
        reply = game.reply(f"{move};")
        assert reply is not None
        text, over = f"{text}{move};{reply.text}", reply.last
    return text, over


@pytest.mark.parametrize("pile", range(1, 40))
def test_a_winning_move_leaves_a_lost_pile(pile: int) -> None:
    move = winning_move(pile)
    assert (move is not None) == wins(pile)
    assert move is None or not wins(pile - move)


@pytest.mark.parametrize("opponent", ["random", "perfect"])
@pytest.mark.parametrize("seed", range(5))
def test_who_plays_the_winning_moves_wins_and_the_grader_says_so(opponent: str, seed: int) -> None:
    for example in generate_examples(["subtraction_game"], 5, 40, seed):
        pile = pile_of(example.prompt)
        game, text, over = start(opponent, pile, seed), "", False
        while not over:
            move = winning_move(pile)
            reply = game.reply(f"{move};")
            assert reply is not None
            text, over = f"{text}{move};{reply.text}", reply.last
            assert reply.text or over
            pile -= (move or 0) + int(reply.text.rstrip(";") or 0)
        assert pile == 0
        assert task("subtraction_game").grade(text, example.answer)
        assert task("subtraction_game").grade(example.answer, example.answer)


def test_the_other_player_wins_where_it_can() -> None:
    text, over = played(start("perfect", 7), ["1", "1"])
    assert (text, over) == ("1;2;1;3;", True)
    assert not task("subtraction_game").grade(text, "3;1;3;")


@pytest.mark.parametrize(
    ("moves", "transcript"), [(["4"], "4;"), (["0"], "0;"), (["x"], "x;"), (["1", "4"], "1;1;4;"), (["01"], "01;"), ([""], ";")]
)
def test_an_illegal_move_loses_at_once(moves: list[str], transcript: str) -> None:
    text, over = played(start("perfect", 5), moves)
    assert over
    assert text == transcript
    assert not task("subtraction_game").grade(text, "1;1;3;")


def test_two_moves_in_one_turn_are_none() -> None:
    reply = start("random", 9).reply("1;2;")
    assert reply is not None
    assert (reply.text, reply.last) == ("", True)


def test_the_same_seed_plays_the_same_game_and_another_one_differs() -> None:
    games = [played(start("random", 40, seed), ["1"] * 5)[0] for seed in (1, 1, 2, 3)]
    assert games[0] == games[1]
    assert len(set(games)) == 3


@pytest.mark.parametrize(
    ("response", "right"),
    [
        *((won, True) for won in ("3;1;3;", "3;2;2;", "1;1;1;1;3;", " 3;1;3;\n")),
        *((lost, False) for lost in ("3;1;3", "3;1;2;1;", "3;1;", "", "7;", "3;1;3;1;", "3;-1;3;", "3;1;3;x")),
    ],
)
def test_grades(response: str, right: bool) -> None:
    assert task("subtraction_game").grade(response, "3;1;3;") == right


def test_legal_moves() -> None:
    assert [move for move in ("0", "1", "2", "3", "4", "1.0", " 1", "") if is_legal(move, 9)] == ["1", "2", "3"]
    assert not is_legal("3", 2)


def test_a_prompt_without_a_pile_is_refused() -> None:
    environment = SubtractionGame(SubtractionGameEnvironment())
    with pytest.raises(ValueError, match=r"'37\+58=' names no pile at its end"):
        environment.start(Prompt(0, np.zeros(1, np.int32), question="37+58="), 0)
