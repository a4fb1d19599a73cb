"""Graders: settings for the comparison of a response with the reference answer.

A grader from another distribution is a subclass of `GraderSettings`, registered under its `type` in the entry-point group
`kdray.graders`; see docs/extending.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from kdray.config.base import Settings, regular_expression
from kdray.config.registry import SettingsRegistry

GRADERS: SettingsRegistry = SettingsRegistry("kdray.graders", "grader")


@GRADERS.root
class GraderSettings(Settings):
    """A rule that marks a response right or wrong."""

    implementation: ClassVar[str]
    """Implementation as `module:name`: called with the settings, it returns a `kdray.data.graders.Grader`."""
    needs_reference: ClassVar[bool] = True
    """The rule reads the reference answer, so a prompt without one cannot be graded."""

    type: str
    """Name of the grader; a subclass narrows it to a `Literal` of its own."""


@GRADERS.add("exact")
class ExactGrader(GraderSettings):
    """Exact match of the response with the reference answer, ignoring surrounding white space."""

    implementation = "kdray.data.graders:Exact"

    type: Literal["exact"] = "exact"


@GRADERS.add("last_number")
class LastNumberGrader(GraderSettings):
    """Equality of the last number in the response and the last one in the reference answer. If either contains `####`, as the
    answers of GSM8K do, the text before it is ignored. $1,200 is 1200, and 42.0 is 42."""

    implementation = "kdray.data.graders:LastNumber"

    type: Literal["last_number"] = "last_number"


@GRADERS.add("regex")
class RegexGrader(GraderSettings):
    """Exact match of a regular expression's group in the response with the reference answer, ignoring surrounding white
    space."""

    implementation = "kdray.data.graders:Regex"

    type: Literal["regex"] = "regex"
    pattern: str
    """Regular expression with one group, the answer; its last match counts."""
    reference_pattern: str | None = None
    """The same for the reference answer; None takes all of it."""

    @model_validator(mode="after")
    def _one_group(self) -> RegexGrader:
        for setting in ("pattern", "reference_pattern"):
            value = getattr(self, setting)
            groups = 1 if value is None else regular_expression(setting, value).groups
            if groups != 1:
                raise ValueError(
                    f"{setting}={value!r:.200}: {groups} groups; put the answer, and nothing else, in one ( ), others in (?: )"
                )
        return self


@GRADERS.add("multiple_choice")
class MultipleChoiceGrader(GraderSettings):
    """Equality of the letter chosen by the response and the reference answer's: `B`, `(B)`, `B. Paris`, `the answer is B`."""

    implementation = "kdray.data.graders:MultipleChoice"

    type: Literal["multiple_choice"] = "multiple_choice"
    letters: Annotated[str, Field(pattern=r"^[A-Z]{2,26}$")] = "ABCDE"
    """Letters of the choices."""


@GRADERS.add("math")
class MathGrader(GraderSettings):
    """Mathematical equality of the last expression in the response (in LaTeX, also boxed, or plain) with the reference's, by
    math-verify: 1/2 is 0.5, and (x + 1)^2 is x^2 + 2x + 1. Takes milliseconds to seconds a response."""

    implementation = "kdray.data.math_equality:MathEquality"

    type: Literal["math"] = "math"


GraderSource = Annotated[SerializeAsAny[GraderSettings] | None, GRADERS.member(short=True)]
"""A grader of any kind, or its name if it needs no other settings; None disables grading."""
