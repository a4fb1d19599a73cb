"""Filter rules: criteria for leaving responses out of training.

A rule from another distribution is a subclass of `FilterRuleSettings`, registered under its `type` in the entry-point group
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
    """A rule that drops the responses which fail it. The ledger and the metric `filtered/<type>` refer to it by its `type`."""

    implementation: ClassVar[str]
    """Implementation as `module:name`: called with the settings, it returns a `kdray.rollouts.filters.FilterRule`."""
    reads_text: ClassVar[bool] = True
    """The rule depends on the text of a response, and not only on how it ended."""
    needs_siblings: ClassVar[bool] = False
    """The rule compares the responses to a prompt, so there must be several per prompt."""
    needs_grader: ClassVar[bool] = False
    """The rule depends on whether a response is right."""

    type: str
    """Name of the rule; a subclass narrows it to a `Literal` of its own."""

    @property
    def setting(self) -> str:
        """The setting that enabled the rule, for messages."""
        return f"rollout.filters.rules (type={self.type})"


@FILTERS.add("unparsable")
class UnparsableRule(FilterRuleSettings):
    """Drops responses that a program could not parse."""

    implementation = "kdray.rollouts.filters:Unparsable"
    reads_text = False

    type: Literal["unparsable"] = "unparsable"


@FILTERS.add("finished")
class FinishedRule(FilterRuleSettings):
    """Drops responses that `max_new_tokens` truncated."""

    implementation = "kdray.rollouts.filters:Finished"
    reads_text = False

    type: Literal["finished"] = "finished"


@FILTERS.add("pattern")
class PatternRule(FilterRuleSettings):
    """Drops responses that a regular expression does not match anywhere."""

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
    """Drops responses that the grader marks wrong."""

    implementation = "kdray.rollouts.filters:Correct"
    needs_grader = True

    type: Literal["correct"] = "correct"

    @property
    def setting(self) -> str:
        return "rollout.filters.correct=true"


@FILTERS.add("agreement")
class AgreementRule(FilterRuleSettings):
    """Drops responses that differ from the most frequent answer to their prompt; see `rollout.filters.agreement`."""

    implementation = "kdray.rollouts.filters:Agree"
    needs_siblings = True

    type: Literal["agreement"] = "agreement"
    agreement: Agreement
    """Required number of responses with that answer."""

    @property
    def setting(self) -> str:
        return f"rollout.filters.agreement={self.agreement}"


@FILTERS.add("distinct")
class DistinctRule(FilterRuleSettings):
    """Drops all but one of several identical responses to a prompt."""

    implementation = "kdray.rollouts.filters:Distinct"

    type: Literal["distinct"] = "distinct"


class FilterSettings(Settings):
    """Filters on the responses to train on. Responses to the same prompt (`samples_per_prompt`) vote together."""

    finished: bool = True
    """Drop responses that `max_new_tokens` truncated, and those that a program could not parse."""
    pattern: str | None = None
    """Drop responses that this regular expression does not match anywhere."""
    correct: bool = False
    """Drop responses that the grader marks wrong: `data.grader`, or a generated task's own."""
    agreement: Agreement | None = None
    """Self-consistency: keep the most frequent answer among a prompt's responses and drop the others; if it has no `plurality`
    (a tie), no `majority` of all of them, or is not `unanimous`, drop all. The compared value is the answer that `data.grader`
    extracts from each (a number, a letter), or the text if no grader is set."""
    distinct: bool = False
    """Keep only one of several identical responses to a prompt."""
    rules: list[Annotated[SerializeAsAny[FilterRuleSettings], FILTERS.member(short=True)]] = Field(default=[])
    """Further rules, applied after those above in this order: `type: my_filter` of an installed distribution with its own keys,
    or another instance of one above."""

    @model_validator(mode="after")
    def _compiles(self) -> FilterSettings:
        if self.pattern is not None:
            regular_expression("pattern", self.pattern)
        return self

    def in_order(self) -> list[FilterRuleSettings]:
        """All rules in order of application; a response is attributed to the first that it fails."""
        return [
            *([UnparsableRule(), FinishedRule()] if self.finished else []),
            *([] if self.pattern is None else [PatternRule(pattern=self.pattern)]),
            *([CorrectRule()] if self.correct else []),
            *([] if self.agreement is None else [AgreementRule(agreement=self.agreement)]),
            *([DistinctRule()] if self.distinct else []),
            *self.rules,
        ]
