"""Which responses of a batch are trained on. The others keep their place in it and teach nothing.

Slots are what makes the staleness bound a guarantee, so a filter takes a response's tokens out of the loss and not its sample
out of the batch; the ledger says which rule did it.
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
    """A response as a rule sees it."""

    rollout: Rollout
    text: str
    """What it says, without white space around it."""
    prompt: Prompt
    grading: Grading | None = None

    @property
    def sample_id(self) -> int:
        return self.rollout.sample_id

    def is_right(self) -> bool:
        """The run's grader calls it right; False for a prompt that it cannot grade. For rules with `needs_grader`."""
        assert self.grading is not None
        return self.grading.can_grade(self.prompt) and self.grading(self.prompt, self.text)

    def answer(self) -> Hashable | None:
        """The part of it that counts where responses are compared; None where it has none. Without a grader, its text."""
        return self.text if self.grading is None else self.grading.answer_of(self.prompt, self.text)


class FilterRule(ABC):
    """What a rule's settings make. Subclass it, or give an object with this method."""

    @abstractmethod
    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        """Sample ids of the responses to leave out.

        Args: responses: those to one prompt that passed the rules before; drawn: how many were drawn for it in all.
        """


class Unparsable(FilterRule):
    """No answer that a program could read."""

    def __init__(self, settings: UnparsableRule) -> None: ...

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if each.rollout.finish_reason == "unparsable"]


class Finished(FilterRule):
    """Cut before its end."""

    def __init__(self, settings: FinishedRule) -> None: ...

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if each.rollout.finish_reason != "stop"]


class Pattern(FilterRule):
    """Without a pattern in it."""

    def __init__(self, settings: PatternRule) -> None:
        self._pattern = re.compile(settings.pattern)

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if not self._pattern.search(each.text)]


class Correct(FilterRule):
    """Wrong."""

    def __init__(self, settings: CorrectRule) -> None: ...

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if not each.is_right()]


class Agree(FilterRule):
    """Another answer than most responses to the prompt give."""

    def __init__(self, settings: AgreementRule) -> None:
        self._agreement = settings.agreement

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        answers = {each.sample_id: each.answer() for each in responses}
        ranked = Counter(answer for answer in answers.values() if answer is not None).most_common()
        # Beside the data's answers, one that was drawn alone agrees with nobody.
        if not ranked or drawn < 2:
            return list(answers)
        wanted, count = ranked[0]
        tied = len(ranked) > 1 and ranked[1][1] == count
        # A response that failed another rule, or that has no answer, counts as a vote against.
        enough = {"plurality": not tied, "majority": 2 * count > drawn, "unanimous": count == drawn}[self._agreement]
        return [sample_id for sample_id, answer in answers.items() if not enough or answer != wanted]


class Distinct(FilterRule):
    """The same text as one before it."""

    def __init__(self, settings: DistinctRule) -> None: ...

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        firsts = {each.text: each.sample_id for each in reversed(responses)}
        return [each.sample_id for each in responses if firsts[each.text] != each.sample_id]


class Filters:
    """The rules of `rollout.filters` in their order; the first that a response fails is named.

    The data's own answers pass every rule and have no vote.
    """

    def __init__(
        self,
        settings: FilterSettings,
        decode: Callable[[np.ndarray], str],
        grade: Grading | None,
        prompts: Mapping[int, Prompt],
    ) -> None:
        """Args: grade: needed by rules that ask whether a response is right; prompts: by id, all that are drawn for.

        Raises: ConfigError where a rule cannot be loaded.
        """
        self._rules: list[tuple[str, FilterRule]] = [(each.type, implemented(each)) for each in settings.in_order()]
        self._decode = decode
        self._grade = grade
        self._prompts = prompts

    def __call__(self, rollouts: Sequence[Rollout]) -> dict[int, str]:
        """The rule that each left-out rollout failed, by sample id. Rollouts of one prompt are compared with each other.

        Raises: ResponseError where a rule or the grader failed.
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
    """Ids of the responses to one prompt, at least one, that fail a rule. Raises: ResponseError naming the rule."""
    ids = [each.sample_id for each in responses]
    where = f"rollout.filters: {name} on prompt {responses[0].prompt.prompt_id}, samples {ids}"
    try:
        failed = set(rule.failing(responses, drawn))
    except ResponseError:
        raise
    # Whatever a rule of others raises.
    except Exception as error:
        raise ResponseError(f"{where}: {type(error).__name__}: {error}") from error
    others = failed.difference(ids)
    if others:
        raise ResponseError(f"{where}: it left out {sorted(others, key=str)}, which are no samples that it was given")
    return failed
