"""Names of generated tasks, and of lessons about them, as settings hold them.

A task from another distribution is a class with the interface of `kdray.data.tasks.Task`, registered under its name in the
entry-point group `kdray.tasks`; see docs/extending.md.
"""

from __future__ import annotations

from typing import Annotated, Any

from kdray.config.registry import NameOf, Registry

_MODULE = "kdray.data.tasks"

TASKS: Registry[Any] = Registry(
    "kdray.tasks",
    "task",
    {
        "last_letters": f"{_MODULE}.last_letters:LastLetters",
        "coin_flip": f"{_MODULE}.coin_flip:CoinFlip",
        "arithmetic": f"{_MODULE}.arithmetic:Arithmetic",
        "multiplication": f"{_MODULE}.multiplication:Multiplication",
        "running_sum": f"{_MODULE}.running_sum:RunningSum",
        "spelled_sum": f"{_MODULE}.spelled_sum:SpelledSum",
        "subtraction_game": f"{_MODULE}.subtraction_game:SubtractionGame",
        "backed_letters": f"{_MODULE}.opinion:BackedLetters",
        "misled_letters": f"{_MODULE}.opinion:MisledLetters",
        "judged_letters": f"{_MODULE}.judged_letters:JudgedLetters",
        "hinted_letters": f"{_MODULE}.hinted_letters:HintedLetters",
    },
    verbs=("generate", "num_prompts", "grade"),
)
"""Classes of tasks, by name; instances are created without arguments."""

STAGES = (
    "letters_rephrase",
    "letters_join",
    "letters_steps",
    "coin_rephrase",
    "coin_turns",
    "sum_steps",
    "rewrite_misled",
    "rewrite_backed",
    "judge_branch",
    "judge_solve",
    "judge_merge",
    "calculator_call",
    "calculator_read",
    "game_move",
)
"""Calls of System-2 programs and turns beside an environment, as tasks for tiny models: `kdray.data.tasks.stages`."""

TaskName = Annotated[str, NameOf(TASKS)]
"""Name of a generated task."""

LessonName = Annotated[str, NameOf(TASKS, beside=STAGES)]
"""Name of a generated task, or of a stage."""
