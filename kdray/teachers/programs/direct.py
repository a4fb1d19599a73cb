"""System 1: the question, and the teacher's immediate response."""

from __future__ import annotations

from kdray.config.programs import DirectProgram
from kdray.teachers.programs.ask import Answer, Ask, Question, found


async def direct(settings: DirectProgram, question: Question, ask: Ask) -> Answer:
    """See `kdray.teachers.programs.PROGRAMS`."""
    response = await ask(settings.ask.format(question=question.text), "answer")
    return Answer(found(settings.answer, response))
