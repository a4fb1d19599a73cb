"""A grader: the reference answer stands somewhere in the response."""

from __future__ import annotations

from typing import Literal

from kdray.config.graders import GraderSettings
from kdray.data.graders import Grader
from kdray.types import Prompt


class ContainsGrader(GraderSettings):
    """The response contains the reference answer."""

    implementation = "kdray_example.grader:Contains"

    type: Literal["contains"] = "contains"
    ignore_case: bool = True
    """Capital and small letters count as the same."""


class Contains(Grader):
    def __init__(self, settings: ContainsGrader) -> None:
        self._ignore_case = settings.ignore_case

    def grade(self, prompt: Prompt, response: str) -> bool:
        wanted = prompt.answer or ""
        return wanted.lower() in response.lower() if self._ignore_case else wanted in response
