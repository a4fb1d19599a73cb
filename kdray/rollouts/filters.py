"""Filters that exclude responses of a batch from training.

The staleness bound relies on fixed slots, so a filter removes a response's tokens from the loss and keeps its sample in the
batch; the ledger records the rule that excluded it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdray.config.filters import (
    AgreementRule,
    CorrectRule,
    DistinctRule,
    FilterSettings,
    FinishedRule,
    PatternRule,
    UnparsableRule,
)
from kdray.config.plugins import implemented
from kdray.data.graders import Grading
from kdray.errors import ResponseError
from kdray.types import Prompt, Rollout


@dataclass(frozen=True, slots=True)
class Response:
    """Input of a rule: a decoded response with its prompt."""

    rollout: Rollout
    text: str
    """Decoded text, stripped of surrounding whitespace."""
    prompt: Prompt
    grading: Grading | None = None

    @property
    def sample_id(self) -> int:
        return self.rollout.sample_id

    def is_right(self) -> bool:
        """Return True if the grader accepts it; False for a prompt that cannot be graded. For rules with `needs_grader`."""
        assert self.grading is not None
        return self.grading.can_grade(self.prompt) and self.grading(self.prompt, self.text)

    def answer(self) -> Hashable | None:
        """Answer by which responses are compared; None if it has none. Without a grader, the text."""
        return self.text if self.grading is None else self.grading.answer_of(self.prompt, self.text)


class FilterRule(ABC):
    """Filter that a rule's settings build: a subclass, or any object with this method."""

    @abstractmethod
    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        """Return the sample ids of the responses to exclude.

        Args: responses: those to one prompt that passed the rules before; drawn: number of responses drawn for it in all.
        """


class Unparsable(FilterRule):
    """Exclude responses without an answer that a program could parse."""

    def __init__(self, settings: UnparsableRule) -> None: ...

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if each.rollout.finish_reason == "unparsable"]


class Finished(FilterRule):
    """Exclude truncated responses."""

    def __init__(self, settings: FinishedRule) -> None: ...

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if each.rollout.finish_reason not in ("stop", "ended")]


class Pattern(FilterRule):
    """Exclude responses without a match of the pattern."""

    def __init__(self, settings: PatternRule) -> None:
        self._pattern = re.compile(settings.pattern)

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if not self._pattern.search(each.text)]


class Correct(FilterRule):
    """Exclude wrong responses."""

    def __init__(self, settings: CorrectRule) -> None: ...

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if not each.is_right()]


class Agree(FilterRule):
    """Exclude responses whose answer is not the one that most responses to the prompt give."""

    def __init__(self, settings: AgreementRule) -> None:
        self._agreement = settings.agreement

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        answers = {each.sample_id: each.answer() for each in responses}
        ranked = Counter(answer for answer in answers.values() if answer is not None).most_common()
        # A response that was the only one drawn (the others are the data's answers) has nothing to agree with.
        if not ranked or drawn < 2:
            return list(answers)
        wanted, count = ranked[0]
        tied = len(ranked) > 1 and ranked[1][1] == count
        # A response that failed another rule, or has no answer, counts as a vote against.
        enough = {"plurality": not tied, "majority": 2 * count > drawn, "unanimous": count == drawn}[self._agreement]
        return [sample_id for sample_id, answer in answers.items() if not enough or answer != wanted]


class Distinct(FilterRule):
    """Exclude duplicates: responses with the same text as an earlier one."""

    def __init__(self, settings: DistinctRule) -> None: ...

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        firsts = {each.text: each.sample_id for each in reversed(responses)}
        return [each.sample_id for each in responses if firsts[each.text] != each.sample_id]


class Filters:
    """Rules of `rollout.filters` in order; the first that a response fails is reported.

    Reference answers from the data pass every rule and have no vote.
    """

    def __init__(
        self,
        settings: FilterSettings,
        decode: Callable[[np.ndarray], str],
        grade: Grading | None,
        prompts: Mapping[int, Prompt],
    ) -> None:
        """Args: grade: required by rules that depend on correctness; prompts: all prompts that are sampled for, by id.

        Raises: ConfigError if a rule cannot be loaded.
        """
        self._rules: list[tuple[str, FilterRule]] = [(each.type, implemented(each)) for each in settings.in_order()]
        self._decode = decode
        self._grade = grade
        self._prompts = prompts

    def __call__(self, rollouts: Sequence[Rollout]) -> dict[int, str]:
        """Return the rule that each excluded rollout failed, by sample id. Rollouts of one prompt are compared with each other.

        Raises: ResponseError if a rule or the grader failed.
        """
        groups: dict[int, list[Response]] = {}
        for rollout in rollouts:
            if not rollout.has_writer("data"):
                text = self._decode(rollout.token_ids).strip()
                response = Response(rollout, text, self._prompts[rollout.prompt_id], self._grade)
                groups.setdefault(rollout.prompt_id, []).append(response)
        dropped: dict[int, str] = {}
        for group in groups.values():
            left = group
            for name, rule in self._rules:
                failed = _failing(name, rule, left, len(group))
                dropped |= {each.sample_id: name for each in left if each.sample_id in failed}
                left = [each for each in left if each.sample_id not in failed]
                if not left:
                    break
        return dropped


def _failing(name: str, rule: FilterRule, responses: Sequence[Response], drawn: int) -> set[int]:
    """Sample ids of the responses to one prompt (at least one) that fail a rule. Raises: ResponseError naming the rule."""
    ids = [each.sample_id for each in responses]
    where = f"rollout.filters: {name} on prompt {responses[0].prompt.prompt_id}, samples {ids}"
    try:
        failed = set(rule.failing(responses, drawn))
    except ResponseError:
        raise
    # A plugin's rule may raise anything.
    except Exception as error:
        raise ResponseError(f"{where}: {type(error).__name__}: {error}") from error
    others = failed.difference(ids)
    if others:
        raise ResponseError(f"{where}: it left out {sorted(others, key=str)}, which are no samples that it was given")
    return failed
