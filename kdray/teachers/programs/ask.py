"""What a program is given and what it gives: calls to the teacher by text, a question in, one answer out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kdray.errors import KdrayError

Result = TypeVar("Result")


class Unparsable(KdrayError, ValueError):
    """A response holds no answer: what it was asked for is not there, or a limit cut it. The rollout is empty then."""


class Ask(Protocol):
    """One call to the teacher."""

    def __call__(self, text: str, stage: str, index: int = 0) -> Awaitable[str]:
        """The teacher's response to the text, white space around it removed.

        Args: stage: name of the call in the program's settings; index: tells calls of one stage apart, from 0. The same text,
              stage and index in the same rollout get the same response.
        Raises: Unparsable where a limit cuts the response, or the text leaves no room for one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """What one rollout asks."""

    text: str
    """The prompt's question, without `data.prefix`."""
    sibling: int = 0
    """Which of the prompt's samples it is, from 0."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the student is to learn."""

    text: str
    question: str | None = None
    """The prompt to learn it under, where that is not the rollout's own."""


def found(pattern: str | None, response: str) -> str:
    """The first group of the pattern in the response, or its whole match; the response itself where the pattern is None.

    Raises: Unparsable where there is no match, or nothing but white space.
    """
    if pattern is None:
        text = response
    else:
        match = re.search(pattern, response)
        if match is None:
            raise Unparsable(f"no answer in {response[:200]!r}")
        text = match.group(1) if match.re.groups else match.group()
    if not (text or "").strip():
        raise Unparsable(f"an empty answer in {response[:200]!r}")
    return text.strip()


async def side_by_side(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """What the calls give, in their order; all have ended before the first failure is raised, so that none is left behind."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
