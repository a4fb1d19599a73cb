"""A filter: responses that are stuck in a loop are left out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Literal

from kdray.config.base import Positive
from kdray.config.filters import FilterRuleSettings
from kdray.rollouts.filters import FilterRule, Response


class RepetitionRule(FilterRuleSettings):
    """Leaves out responses that hold the same character many times in a row."""

    implementation = "kdray_example.filter:Repetition"

    type: Literal["repetition"] = "repetition"
    longest: Positive = 3
    """Most times that a character may follow itself."""


class Repetition(FilterRule):
    def __init__(self, settings: RepetitionRule) -> None:
        self._longest = settings.longest

    def failing(self, responses: Sequence[Response], drawn: int) -> Collection[int]:
        return [each.sample_id for each in responses if self._longest_run(each.text) > self._longest]

    def _longest_run(self, text: str) -> int:
        return max((len(list(run)) for _, run in groupby(text)), default=0)
