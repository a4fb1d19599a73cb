"""Universal self-consistency: a program runs several times, and the teacher picks the most consistent answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from kdray.config.programs import UniversalSettings
from kdray.teachers.programs.ask import Answer, Ask, Unparsable, found, side_by_side

CALLS_OF_ONE = 64
"""Maximum calls of one stage in a single run of a program."""


async def universal(settings: UniversalSettings, question: str, run: Callable[[Ask], Awaitable[Answer]], ask: Ask) -> Answer:
    """Select one of the parsable answers; no call is made if they are all the same.

    Args: run: the program on one question, given its calls.
    Raises: Unparsable if no answer is parsable, or the selection is none of them.
    Source: Chen et al. 2023 (arXiv 2311.17311).
    """

    async def one(number: int) -> Answer | None:
        def numbered(text: str, stage: str, index: int = 0) -> Awaitable[str]:
            return ask(text, stage, number * CALLS_OF_ONE + index)

        try:
            return await run(numbered)
        except Unparsable:
            return None

    drawn = await side_by_side(one(number) for number in range(settings.answers))
    answers = [answer for answer in drawn if answer is not None]
    if not answers:
        raise Unparsable(f"none of {settings.answers} answers is parsable")
    if len({answer.text for answer in answers}) == 1:
        return answers[0]
    listed = "".join(settings.line.format(number=number, answer=answer.text) for number, answer in enumerate(answers, 1))
    choice = found(settings.choice, await ask(settings.choose.format(question=question, answers=listed), "choose"))
    if not choice.isdecimal() or not 1 <= int(choice) <= len(answers):
        raise Unparsable(f"{choice!r} is none of {len(answers)} answers")
    return answers[int(choice) - 1]
