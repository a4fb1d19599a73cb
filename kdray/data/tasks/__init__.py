"""Generated questions with exact graders: last letters, coin flip, arithmetic, sums written out step
by step, and letters with an opinion or with a judge.
They need no file and no network. `STAGES` are lessons derived from them, for training tiny models only.

To add a task: a file here with a class that implements `Task`, and a line in `kdray.config.tasks.TASKS`; or the same class in a
separate distribution, under the entry-point group `kdray.tasks`.
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

# After this many draws per existing prompt without a new one, an unseen prompt remains with probability e^-30 at most.
_MISSES_PER_PROMPT = 30


def task(name: str) -> Task:
    """Return the task called `name`. Raises: ValueError if there is none."""
    made: Task = TASKS.get(name)()
    return made


def lesson(name: str) -> Lesson:
    """Return the stage or task called `name`. Raises: ValueError if there is none."""
    return STAGES[name] if name in STAGES else task(name)


def shares(size: int, weights: Sequence[float]) -> list[int]:
    """Split `size` into integers in proportion to the weights, which must not all be 0, by the largest-remainder method.

    Of equal remainders, the first are rounded up.
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
    """Generate `size` examples with distinct prompts, none of them in `exclude`, in a shuffled order that the seed fixes.

    Args: weights: relative share of each task, 0 for tasks it does not name; None gives equal shares. They are rounded as in
          `shares`.
    Raises: DataError if a task has fewer distinct prompts than its share.
    """
    names = list(dict.fromkeys(tasks))
    examples: list[Example] = []
    parts = shares(size, [1.0 if weights is None else weights.get(name, 0.0) for name in names])
    for name, share in zip(names, parts, strict=True):
        # A separate random stream, so that a task's examples do not depend on the other tasks.
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
