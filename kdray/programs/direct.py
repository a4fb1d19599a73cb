"""System 1: the question, and what the teacher says to it at once."""

from __future__ import annotations

from kdray.programs.ask import Answer, Ask, Question, found
from kdray.settings.programs import DirectProgram


async def direct(settings: DirectProgram, question: Question, ask: Ask) -> Answer:
    """See `kdray.programs.PROGRAMS`."""
    response = await ask(settings.ask.format(question=question.text), "answer")
    return Answer(found(settings.answer, response))
