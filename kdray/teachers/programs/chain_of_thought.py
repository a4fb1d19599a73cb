"""Chain of thought: a response reasons and ends with an answer; the reasoning is dropped."""

from __future__ import annotations

from kdray.config.programs import ChainOfThoughtProgram
from kdray.teachers.programs.ask import Answer, Ask, Question, found


async def chain_of_thought(settings: ChainOfThoughtProgram, question: Question, ask: Ask) -> Answer:
    """See `kdray.teachers.programs.PROGRAMS`."""
    response = await ask(settings.think.format(question=question.text), "think")
    return Answer(found(settings.answer, response))
