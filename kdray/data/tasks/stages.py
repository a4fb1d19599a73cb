"""Stages of System-2 programs, and turns beside an environment, as separate tasks: lessons that teach a tiny base model each
call of a program, and each turn.

A stage's prompt is the recipe's template filled with a question or with an earlier stage's answer, so keep this file in step
with configs/system2_*.yaml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdray.data.tasks.arithmetic import Arithmetic
from kdray.data.tasks.coin_flip import CoinFlip
from kdray.data.tasks.example import Example, Task
from kdray.data.tasks.judged_letters import JudgedLetters
from kdray.data.tasks.last_letters import LastLetters
from kdray.data.tasks.multiplication import Multiplication
from kdray.data.tasks.opinion import BackedLetters, MisledLetters
from kdray.data.tasks.subtraction_game import MAX_TAKE, SubtractionGame, pile_of, winning_move


@dataclass(frozen=True)
class Stage:
    """Lesson derived from the examples of a task."""

    name: str
    of: Task
    make: Callable[[Example, np.random.Generator], Example]

    def generate(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Generate an example, from a uniformly drawn example of the task."""
        return self.make(self.of.generate(rng, difficulty), rng)


def words_of(question: str) -> list[str]:
    """Return the words of a last-letters question."""
    return question.split(": ")[1].split(" = ")[0].split()


def mark_last_letters(question: str) -> str:
    """Hyphenate the last letter of each word: `last letters of: rilo tamen = ` gives `ril-o tame-n`."""
    return " ".join(f"{word[:-1]}-{word[-1]}" for word in words_of(question))


def turns(question: str) -> str:
    """Return a coin's turns, one letter each: `fnf` if the first and the third person flip it."""
    told = question.replace(". ", ".").split(".")[1:-1]
    return "".join("n" if "does not" in turn else "f" for turn in told)


def carried(left: str, right: str) -> str:
    """Write out the sum of two numbers with equally many digits, from the last digit: `7+8=15, 3+5+1=9`."""
    carry, steps = 0, []
    for a, b in zip(reversed(left), reversed(right), strict=True):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ", ".join(steps)


def _rephrase_letters(example: Example, rng: np.random.Generator) -> Example:
    return Example(f"rephrase: {example.prompt}", mark_last_letters(example.prompt))


def _join_letters(example: Example, rng: np.random.Generator) -> Example:
    return Example(f"join: {mark_last_letters(example.prompt)} = ", example.answer)


def _rephrase_coin(example: Example, rng: np.random.Generator) -> Example:
    return Example(f"rephrase: {example.prompt}", turns(example.prompt))


def _judge_coin(example: Example, rng: np.random.Generator) -> Example:
    return Example(f"turns: {turns(example.prompt)} = ", example.answer)


def _steps_of_sum(example: Example, rng: np.random.Generator) -> Example:
    left, right = example.prompt.rstrip("=").split("+")
    return Example(f"explain: {example.prompt}", f"{carried(left, right)}. final answer: {example.answer}")


def _steps_of_letters(example: Example, rng: np.random.Generator) -> Example:
    return Example(f"explain: {example.prompt}", f"{mark_last_letters(example.prompt)}. final answer: {example.answer}")


def _without_opinion(example: Example, rng: np.random.Generator) -> Example:
    question, _ = example.prompt.split("i think ")
    return Example(f"rewrite: {example.prompt}", question.rstrip())


def _criteria(example: Example, rng: np.random.Generator) -> Example:
    count = len(words_of(example.prompt))
    return Example(f"criteria: {example.prompt}", "\n".join(f"- word {number + 1}" for number in range(count)))


def _scores(example: Example, number: int) -> str:
    """Format the scores of a word, as in `n A1 B0`: its last letter, and 1 for each answer that has it there, else 0."""
    a, b = (part.split()[0] for part in example.prompt.split(": ")[2:4])
    right = words_of(example.prompt)[number][-1]
    return f"{right} A{int(a[number] == right)} B{int(b[number] == right)}"


def _scores_of_one(example: Example, rng: np.random.Generator) -> Example:
    number = int(rng.integers(len(words_of(example.prompt))))
    return Example(f"score word {number + 1}: {example.prompt}", _scores(example, number))


def _merge(example: Example, rng: np.random.Generator) -> Example:
    scores = [_scores(example, number) for number in range(len(words_of(example.prompt)))]
    return Example(f"merge: {' '.join(scores)} = ", example.answer)


def _calculator_call(example: Example, rng: np.random.Generator) -> Example:
    return Example(example.prompt, f"<<{example.prompt}")


def _calculator_read(example: Example, rng: np.random.Generator) -> Example:
    return Example(f"{example.prompt}<<{example.prompt}{example.answer}>>", example.answer)


def _game_move(example: Example, rng: np.random.Generator) -> Example:
    """A winning move, from any position of the game."""
    pile = pile_of(example.prompt)
    moves = ""
    while True:
        winning = winning_move(pile)
        assert winning is not None, "the first player can always win"
        if pile <= MAX_TAKE or rng.integers(3) == 0:
            return Example(f"{example.prompt}{moves}", f"{winning};")
        other = int(rng.integers(1, MAX_TAKE + 1))
        moves += f"{winning};{other};"
        pile -= winning + other


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("letters_rephrase", LastLetters(), _rephrase_letters),
        Stage("letters_join", LastLetters(), _join_letters),
        Stage("letters_steps", LastLetters(), _steps_of_letters),
        Stage("coin_rephrase", CoinFlip(), _rephrase_coin),
        Stage("coin_turns", CoinFlip(), _judge_coin),
        Stage("sum_steps", Arithmetic(), _steps_of_sum),
        Stage("rewrite_misled", MisledLetters(), _without_opinion),
        Stage("rewrite_backed", BackedLetters(), _without_opinion),
        Stage("judge_branch", JudgedLetters(), _criteria),
        Stage("judge_solve", JudgedLetters(), _scores_of_one),
        Stage("judge_merge", JudgedLetters(), _merge),
        Stage("calculator_call", Multiplication(), _calculator_call),
        Stage("calculator_read", Multiplication(), _calculator_read),
        Stage("game_move", SubtractionGame(), _game_move),
    )
}
