"""Generated questions with exact graders: last letters, coin flip, arithmetic. No file, no network.

To add one: a file here with a class of the shape of `Task`, a line in `TASKS`, and its name in `kdray.settings.data.TaskName`.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np

from kdray.errors import DataError
from kdray.tasks.arithmetic import Arithmetic
from kdray.tasks.coin_flip import CoinFlip
from kdray.tasks.example import Example, Task, exact_match
from kdray.tasks.hinted_letters import HintedLetters
from kdray.tasks.last_letters import LastLetters

__all__ = ["TASKS", "Example", "Task", "exact_match", "generate_examples"]

TASKS: dict[str, Task] = {task.name: task for task in (LastLetters(), CoinFlip(), Arithmetic(), HintedLetters())}

# After this many draws per existing prompt without a new one, nothing is left but with probability e^-30.
_MISSES_PER_PROMPT = 30


def generate_examples(
    tasks: Sequence[str], difficulty: int, size: int, seed: int, exclude: AbstractSet[str] = frozenset()
) -> list[Example]:
    """`size` examples with different prompts, none of them in `exclude`, in a shuffled order that the seed fixes.

    Each task gives the same share; where `size` does not divide, the first tasks give one more.
    Raises: DataError where a task has fewer different prompts than its share.
    """
    names = list(dict.fromkeys(tasks))
    examples: list[Example] = []
    for index, name in enumerate(names):
        share = size // len(names) + (index < size % len(names))
        # A stream of its own: a task's examples do not depend on which tasks stand beside it.
        rng = np.random.default_rng([seed, difficulty, *name.encode()])
        examples += _distinct(TASKS[name], rng, difficulty, share, exclude)
    order = np.random.default_rng([seed, difficulty]).permutation(len(examples))
    return [examples[index] for index in order]


def _distinct(
    task: Task,
    rng: np.random.Generator,
    difficulty: int,
    share: int,
    taken: AbstractSet[str],
) -> list[Example]:
    exist = task.num_prompts(difficulty)
    found: dict[str, Example] = {}
    misses = 0
    while len(found) < share:
        if share > exist or misses > _MISSES_PER_PROMPT * exist:
            used = "" if share > exist else f", and all but {len(found)} of them are held out or used already"
            raise DataError(
                f"task {task.name} has {exist} different prompts at difficulty {difficulty}{used}: {share} were asked "
                "for; raise data.prompts.difficulty, or lower data.prompts.size or data.heldout_size"
            )
        example = task.generate(rng, difficulty)
        if example.prompt in found or example.prompt in taken:
            misses += 1
        else:
            found[example.prompt] = replace(example, task=task.name)
            misses = 0
    return list(found.values())
