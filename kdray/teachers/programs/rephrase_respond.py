"""Rephrase and Respond: the teacher rephrases the question, then answers it, in two calls or in one."""

from __future__ import annotations

from kdray.config.programs import RephraseRespondProgram
from kdray.teachers.programs.ask import Answer, Ask, Question, found


async def rephrase_respond(settings: RephraseRespondProgram, question: Question, ask: Ask) -> Answer:
    """See `kdray.teachers.programs.PROGRAMS`."""
    if settings.steps == 1:
        response = await ask(settings.at_once.format(question=question.text), "respond")
    else:
        rephrased = await ask(settings.rephrase.format(question=question.text), "rephrase")
        response = await ask(settings.respond.format(question=question.text, rephrased=rephrased), "respond")
    return Answer(found(settings.answer, response))
