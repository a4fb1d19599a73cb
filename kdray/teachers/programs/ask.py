"""Input and output of a program: calls to the teacher by text, a question in, an answer out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kdray.errors import KdrayError

Result = TypeVar("Result")


class Unparsable(KdrayError, ValueError):
    """A response holds no answer: the expected part is missing, or a limit truncated it. The rollout is then empty."""


class Ask(Protocol):
    """A call to the teacher."""

    def __call__(self, text: str, stage: str, index: int = 0) -> Awaitable[str]:
        """Return the teacher's response to the text, stripped of surrounding white space.

        Args: stage: name of the call in the program's settings; index: distinguishes calls of the same stage, from 0. The same
              text, stage and index in the same rollout get the same response.
        Raises: Unparsable if a limit truncates the response, or the text leaves no room for one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """Question of one rollout."""

    text: str
    """The prompt's question, without `data.prefix`."""
    sibling: int = 0
    """Index of the rollout among the prompt's samples, from 0."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Text that the student is trained on."""

    text: str
    question: str | None = None
    """Prompt to train it under, if not the rollout's own."""


def found(pattern: str | None, response: str) -> str:
    """The first group of the pattern in the response, or its whole match; the response itself if the pattern is None.

    Raises: Unparsable if there is no match, or only white space.
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
    """Results of the calls, in order; all have ended before the first failure is raised, so that none is left running."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
