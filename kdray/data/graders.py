"""Graders, which compare a response with the reference answer of its prompt.

Their settings are in `kdray.config.graders`. A run grades through `Grading`, which reports the context of a grader's failure.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from decimal import Decimal

import numpy as np

from kdray.config import Config
from kdray.config.graders import ExactGrader, LastNumberGrader, MultipleChoiceGrader, RegexGrader
from kdray.config.plugins import implemented
from kdray.data.tasks import exact_match, task
from kdray.errors import ConfigError, DataError, ResponseError
from kdray.types import Prompt

_SHOWN = 80

_MARKER = "####"
"""Separator between the working and the result in GSM8K answers."""

_NUMBER = re.compile(
    r"""
    (?:(?<![\w).,])[-+\u2212](?=\$?[.0-9]))?   # a sign, which after a digit or a bracket is a minus between two numbers
    \$?
    (?:
        [0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?   # thousands apart
      | [0-9]+(?:\.[0-9]+)?
      | (?<![\w.])\.[0-9]+
    )
    (?:[eE][-+]?[0-9]{1,3}(?![0-9]))?
    """,
    re.VERBOSE,
)


class Grader(ABC):
    """Base class of the graders that `GraderSettings` build."""

    @abstractmethod
    def grade(self, prompt: Prompt, response: str) -> bool:
        """Return True for a correct response. An exception ends the run, reported with the prompt's id and text."""

    def value(self, prompt: Prompt, response: str) -> float:
        """Compute the reward of a response (`loss.reward_weight`), finite; by default 1 for a correct one and 0 for others."""
        return float(self.grade(prompt, response))

    def step_match(self, prompt: Prompt, response: str) -> float | None:
        """Compute the share of the response's steps that are right, in [0, 1]; None if the answer has no steps."""
        return None

    def answer_of(self, response: str) -> Hashable | None:
        """Extract the answer by which responses are compared (`rollout.filters.agreement`); None if there is none."""
        return response.strip()

    def check(self, prompt: Prompt) -> None:
        """Check the reference answer of a prompt. Raises: ValueError if no response can be compared with it."""
        return


class Exact(Grader):
    """Exact match with the reference, ignoring surrounding whitespace."""

    def __init__(self, settings: ExactGrader) -> None: ...

    def grade(self, prompt: Prompt, response: str) -> bool:
        return exact_match(response, _reference(prompt))


class LastNumber(Grader):
    """Match of the last number in the response with that of the reference."""

    def __init__(self, settings: LastNumberGrader) -> None: ...

    def grade(self, prompt: Prompt, response: str) -> bool:
        return self.answer_of(response) == self._wanted(prompt)

    def answer_of(self, response: str) -> Decimal | None:
        found = _NUMBER.findall(response.rpartition(_MARKER)[2])
        # Exact, unlike float: 0.1 equals 0.10, and integers may have any length.
        return Decimal(found[-1].translate(_PLAIN)) if found else None

    def check(self, prompt: Prompt) -> None:
        self._wanted(prompt)

    def _wanted(self, prompt: Prompt) -> Decimal:
        wanted = self.answer_of(_reference(prompt))
        if wanted is None:
            raise ValueError(f"no number in the reference answer {_short(_reference(prompt))}")
        return wanted


_PLAIN = str.maketrans({"\u2212": "-", ",": None, "$": None})


class Regex(Grader):
    """Match of the group that a pattern captures."""

    def __init__(self, settings: RegexGrader) -> None:
        self._pattern = re.compile(settings.pattern)
        self._reference = None if settings.reference_pattern is None else re.compile(settings.reference_pattern)

    def grade(self, prompt: Prompt, response: str) -> bool:
        return self.answer_of(response) == self._wanted(prompt)

    def answer_of(self, response: str) -> str | None:
        return _last_group(self._pattern, response)

    def check(self, prompt: Prompt) -> None:
        self._wanted(prompt)

    def _wanted(self, prompt: Prompt) -> str:
        reference = _reference(prompt)
        wanted = reference.strip() if self._reference is None else _last_group(self._reference, reference)
        if wanted is None:
            raise ValueError(f"reference_pattern is not found in the reference answer {_short(reference)}")
        return wanted


class MultipleChoice(Grader):
    """Match of the chosen letter. Explicit forms are tried first, since a lone `A` in a sentence is an article."""

    def __init__(self, settings: MultipleChoiceGrader) -> None:
        upper = f"[{settings.letters}]"
        either = f"[{settings.letters}{settings.letters.lower()}]"
        # Tried in this order: the first pattern with a match decides, by its last match.
        self._ways = [
            re.compile(way)
            for way in (
                rf"\\boxed\{{\s*(?:\\text\{{)?\s*\(?({either})\)?\s*\}}",
                rf"(?i:answer|choice|option)(?:\s+(?i:is|would\s+be))?\s*[:=]?\s*[(\[*\"']*({upper})(?![\w'])",
                rf"(?i:answer|choice|option)(?:\s+(?i:is|would\s+be)\s*:?|\s*[:=])\s*[(\[*\"']*({either})(?![\w'])(?!\s+\w)",
                rf"\A\W*({either})\W*\Z",
                rf"[(\[]({either})[)\]]",
                rf"(?m:^)\W*({upper})[).:](?!\w)",
                rf"(?<![\w'])({upper})\W*\Z",
            )
        ]

    def grade(self, prompt: Prompt, response: str) -> bool:
        return self.answer_of(response) == self._wanted(prompt)

    def answer_of(self, response: str) -> str | None:
        text = response.rpartition(_MARKER)[2]
        return next((found.upper() for way in self._ways if (found := _last_group(way, text)) is not None), None)

    def check(self, prompt: Prompt) -> None:
        self._wanted(prompt)

    def _wanted(self, prompt: Prompt) -> str:
        wanted = self.answer_of(_reference(prompt))
        if wanted is None:
            raise ValueError(f"no letter of a choice in the reference answer {_short(_reference(prompt))}")
        return wanted


class ByTask(Grader):
    """Grader of generated prompts, which delegates to the task that the prompt's domain names."""

    def __init__(self, names: Sequence[str]) -> None:
        self._tasks = {name: task(name) for name in names}

    def grade(self, prompt: Prompt, response: str) -> bool:
        assert prompt.domain is not None
        return self._tasks[prompt.domain].grade(response, _reference(prompt))

    def step_match(self, prompt: Prompt, response: str) -> float | None:
        assert prompt.domain is not None
        share = getattr(self._tasks[prompt.domain], "step_match", None)
        return None if share is None else float(share(response, _reference(prompt)))


class Grading:
    """A run's grader. Errors name grader, prompt and response; a failed grader never counts as a wrong response."""

    def __init__(self, name: str, grader: Grader, needs_reference: bool = True) -> None:
        """Args: name: the setting that selected the grader, for messages; needs_reference: see `GraderSettings`."""
        self.name = name
        self.needs_reference = needs_reference
        self._grader = grader

    def __call__(self, prompt: Prompt, response: str) -> bool:
        """Return True for a correct response. Raises: ResponseError if the grader raised, or did not return a bool."""
        try:
            right = self._grader.grade(prompt, response)
        # A plugin's grader may raise anything.
        except Exception as error:
            raise ResponseError(self._failed(prompt, f"{type(error).__name__}: {error}", response)) from error
        if not isinstance(right, bool | np.bool_):
            raise ResponseError(self._failed(prompt, f"grade gave {right!r:.{_SHOWN}}, neither True nor False", response))
        return bool(right)

    def value(self, prompt: Prompt, response: str) -> float:
        """See `Grader`. Raises: ResponseError if the grader raised, or did not return a finite number."""
        if type(self._grader).value is Grader.value:
            return float(self(prompt, response))
        try:
            value = float(self._grader.value(prompt, response))
        # As in `__call__`.
        except Exception as error:
            raise ResponseError(self._failed(prompt, f"{type(error).__name__}: {error}", response)) from error
        if not math.isfinite(value):
            raise ResponseError(self._failed(prompt, f"value gave {value}, no finite number", response))
        return value

    def step_match(self, prompt: Prompt, response: str) -> float | None:
        """See `Grader`. Raises: ResponseError if the grader raised, or returned a number outside [0, 1]."""
        try:
            share = self._grader.step_match(prompt, response)
        # As in `__call__`.
        except Exception as error:
            raise ResponseError(self._failed(prompt, f"{type(error).__name__}: {error}", response)) from error
        if share is not None and not 0.0 <= share <= 1.0:
            raise ResponseError(self._failed(prompt, f"step_match gave {share}, not a share from 0 to 1", response))
        return None if share is None else float(share)

    def can_grade(self, prompt: Prompt) -> bool:
        """Return True if the prompt has the reference answer, or the grader needs none."""
        return prompt.answer is not None or not self.needs_reference

    def answer_of(self, prompt: Prompt, response: str) -> Hashable | None:
        """See `Grader`. Raises: ResponseError if the grader raised."""
        try:
            return self._grader.answer_of(response)
        # As in `__call__`.
        except Exception as error:
            raise ResponseError(self._failed(prompt, f"{type(error).__name__}: {error}", response)) from error

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Check all reference answers. Raises: DataError naming the first prompt whose answer the grader cannot use."""
        for prompt in filter(self.can_grade, prompts):
            try:
                self._grader.check(prompt)
            # As in `__call__`.
            except Exception as error:
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                raise DataError(
                    f"{self.name} on prompt {prompt.prompt_id}: {reason}; correct the row or data.prompts.answer_column, or "
                    "choose another grader"
                ) from error

    def _failed(self, prompt: Prompt, reason: str, response: str) -> str:
        asked = f"prompt {prompt.prompt_id} ({_short(prompt.text)})"
        return f"{self.name} failed on {asked} with the response {_short(response)}: {reason}"


def _reference(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError("the prompt has no reference answer")
    return prompt.answer


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the group of the pattern's last match, stripped; None without one."""
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0][1].strip() if last and last[0][1] is not None else None


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def grading_of(config: Config) -> Grading | None:
    """Return the run's grader: `data.grader`, or else that of the generated tasks; None if the prompts have no grader.

    Raises: ConfigError if it cannot be loaded.
    """
    settings, tasks = config.data.grader, config.data.prompts.graded_tasks
    if settings is not None:
        grader = implemented(settings)
        if not isinstance(grader, Grader):
            raise ConfigError(
                f"data.grader.type={settings.type}: {settings.implementation} is no subclass of kdray.data.graders.Grader; "
                "derive it from that class"
            )
        return Grading(f"data.grader.type={settings.type}", grader, settings.needs_reference)
    return Grading(f"the grader of {', '.join(tasks)}", ByTask(tasks)) if tasks else None
