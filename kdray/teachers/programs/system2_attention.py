"""System 2 Attention: the prompt is rewritten without irrelevant parts, and the rewritten prompt is answered."""

from __future__ import annotations

from kdray.config.programs import System2AttentionProgram
from kdray.teachers.programs.ask import Answer, Ask, Question, found


async def system2_attention(settings: System2AttentionProgram, question: Question, ask: Ask) -> Answer:
    """See `kdray.teachers.programs.PROGRAMS`."""
    rewritten = await ask(settings.rewrite.format(question=question.text), "rewrite")
    response = await ask(settings.respond.format(rewritten=rewritten), "respond")
    return Answer(found(settings.answer, response))
