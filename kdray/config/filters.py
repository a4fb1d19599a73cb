"""Rules that leave responses out of training.

A rule of another distribution is a subclass of `FilterRuleSettings`, registered under its `type` in the entry-point group
`kdray.filters`; see docs/extending.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from kdray.config.base import Settings, regular_expression
from kdray.config.registry import SettingsRegistry

FILTERS: SettingsRegistry = SettingsRegistry("kdray.filters", "filter")

Agreement = Literal["plurality", "majority", "unanimous"]


@FILTERS.root
class FilterRuleSettings(Settings):
    """A rule that leaves out the responses which fail it. The ledger and the metric `filtered/<type>` name it by its `type`."""

    implementation: ClassVar[str]
    """The rule as `module:name`: called with the settings, it gives a `kdray.rollouts.filters.FilterRule`."""
    reads_text: ClassVar[bool] = True
    """The rule goes by what a response says, and not by how it ended alone."""
    needs_siblings: ClassVar[bool] = False
    """The rule compares the responses to one prompt, of which there must be several."""
    needs_grader: ClassVar[bool] = False
    """The rule asks whether a response is right."""

    type: str
    """Name of the rule; a subclass narrows it to `Literal` of its own."""

    @property
    def setting(self) -> str:
        """The setting that chose the rule, in messages."""
        return f"rollout.filters.rules (type={self.type})"


@FILTERS.add("unparsable")
class UnparsableRule(FilterRuleSettings):
    """Leaves out responses that a program could not parse."""

    implementation = "kdray.rollouts.filters:Unparsable"
    reads_text = False

    type: Literal["unparsable"] = "unparsable"


@FILTERS.add("finished")
class FinishedRule(FilterRuleSettings):
    """Leaves out responses that `max_new_tokens` cut."""

    implementation = "kdray.rollouts.filters:Finished"
    reads_text = False

    type: Literal["finished"] = "finished"


@FILTERS.add("pattern")
class PatternRule(FilterRuleSettings):
    """Leaves out responses in which a regular expression is not found."""

    implementation = "kdray.rollouts.filters:Pattern"

    type: Literal["pattern"] = "pattern"
    pattern: str
    """The regular expression."""

    @model_validator(mode="after")
    def _compiles(self) -> PatternRule:
        regular_expression("pattern", self.pattern)
        return self


@FILTERS.add("correct")
class CorrectRule(FilterRuleSettings):
    """Leaves out responses that the grader calls wrong."""

    implementation = "kdray.rollouts.filters:Correct"
    needs_grader = True

    type: Literal["correct"] = "correct"

    @property
    def setting(self) -> str:
        return "rollout.filters.correct=true"


@FILTERS.add("agreement")
class AgreementRule(FilterRuleSettings):
    """Leaves out the responses to a prompt that differ from the answer most of them give; see `rollout.filters.agreement`."""

    implementation = "kdray.rollouts.filters:Agree"
    needs_siblings = True

    type: Literal["agreement"] = "agreement"
    agreement: Agreement
    """How many have to give that answer."""

    @property
    def setting(self) -> str:
        return f"rollout.filters.agreement={self.agreement}"


@FILTERS.add("distinct")
class DistinctRule(FilterRuleSettings):
    """Leaves out all but one of several equal responses to a prompt."""

    implementation = "kdray.rollouts.filters:Distinct"

    type: Literal["distinct"] = "distinct"


class FilterSettings(Settings):
    """Which responses are trained on. Those of one prompt (`samples_per_prompt`) vote together."""

    finished: bool = True
    """Leave out responses that `max_new_tokens` cut, and those that a program could not parse."""
    pattern: str | None = None
    """Leave out responses in which this regular expression is not found."""
    correct: bool = False
    """Leave out responses that the grader calls wrong: `data.grader`, or a generated task's own."""
    agreement: Agreement | None = None
    """Self-consistency: keep the answer that most of a prompt's responses give and leave out the others; where it has no
    `plurality` (a tie), no `majority` of all of them, or is not `unanimous`, leave out all. What is compared is the answer that
    `data.grader` finds in each (a number, a letter), or the texts where it is not set."""
    distinct: bool = False
    """Keep one of several equal responses to a prompt."""
    rules: list[Annotated[SerializeAsAny[FilterRuleSettings], FILTERS.member(short=True)]] = Field(default=[])
    """Further rules, applied after those above in this order: `type: my_filter` of an installed distribution with its own keys,
    or one of the above once more."""

    @model_validator(mode="after")
    def _compiles(self) -> FilterSettings:
        if self.pattern is not None:
            regular_expression("pattern", self.pattern)
        return self

    def in_order(self) -> list[FilterRuleSettings]:
        """Every rule, in the order in which they are applied: the first that a response fails is the one named."""
        return [
            *([UnparsableRule(), FinishedRule()] if self.finished else []),
            *([] if self.pattern is None else [PatternRule(pattern=self.pattern)]),
            *([CorrectRule()] if self.correct else []),
            *([] if self.agreement is None else [AgreementRule(agreement=self.agreement)]),
            *([DistinctRule()] if self.distinct else []),
            *self.rules,
        ]
