"""Generated questions with exact graders: last letters, coin flip, arithmetic, and letters with an opinion or before a judge.
No file, no network. `STAGES` are lessons about them for tiny models alone.

To add one: a file here with a class of the shape of `Task`, and a line in `kdray.config.tasks.TASKS`; or the same class in a
distribution of its own, under the entry-point group `kdray.tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np

from kdray.config.tasks import TASKS
from kdray.data.tasks.example import Example, Lesson, Task, exact_match
from kdray.data.tasks.stages import STAGES
from kdray.errors import DataError

__all__ = ["STAGES", "Example", "Lesson", "Task", "exact_match", "generate_examples", "lesson", "shares", "task"]

# After this many draws per existing prompt without a new one, nothing is left but with probability e^-30.
_MISSES_PER_PROMPT = 30


def task(name: str) -> Task:
    """The task called `name`. Raises: ValueError where there is none."""
    made: Task = TASKS.get(name)()
    return made


def lesson(name: str) -> Lesson:
    """The stage or the task called `name`. Raises: ValueError where there is none."""
    return STAGES[name] if name in STAGES else task(name)


def shares(size: int, weights: Sequence[float]) -> list[int]:
    """`size` split in proportion to the weights, of which some are above 0: whole numbers, the largest remainders rounded up,
    the first ones first.
    """
    exact = [size * weight / sum(weights) for weight in weights]
    whole = [int(part) for part in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (whole[index] - exact[index], index))
    for index in by_remainder[: size - sum(whole)]:
        whole[index] += 1
    return whole


def generate_examples(
    tasks: Sequence[str],
    difficulty: int,
    size: int,
    seed: int,
    exclude: AbstractSet[str] = frozenset(),
    weights: Mapping[str, float] | None = None,
) -> list[Example]:
    """`size` examples with different prompts, none of them in `exclude`, in a shuffled order that the seed fixes.

    Args: weights: by task, what its share is in proportion to, 0 for those it does not name; None gives equal ones. Where that
          makes no whole numbers, see `shares`.
    Raises: DataError where a task has fewer different prompts than its share.
    """
    names = list(dict.fromkeys(tasks))
    examples: list[Example] = []
    parts = shares(size, [1.0 if weights is None else weights.get(name, 0.0) for name in names])
    for name, share in zip(names, parts, strict=True):
        # A stream of its own: a task's examples do not depend on which tasks stand beside it.
        rng = np.random.default_rng([seed, difficulty, *name.encode()])
        examples += _distinct(name, rng, difficulty, share, exclude)
    order = np.random.default_rng([seed, difficulty]).permutation(len(examples))
    return [examples[index] for index in order]


def _distinct(
    name: str,
    rng: np.random.Generator,
    difficulty: int,
    share: int,
    taken: AbstractSet[str],
) -> list[Example]:
    drawn = task(name)
    exist = drawn.num_prompts(difficulty)
    found: dict[str, Example] = {}
    misses = 0
    while len(found) < share:
        if share > exist or misses > _MISSES_PER_PROMPT * exist:
            used = "" if share > exist else f", and all but {len(found)} of them are held out or used already"
            raise DataError(
                f"task {name} has {exist} different prompts at difficulty {difficulty}{used}: {share} were asked "
                "for; raise data.prompts.difficulty, or lower data.prompts.size or data.heldout_size"
            )
        example = drawn.generate(rng, difficulty)
        if example.prompt in found or example.prompt in taken:
            misses += 1
        else:
            found[example.prompt] = replace(example, task=name)
            misses = 0
    return list(found.values())
