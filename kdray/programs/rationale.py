"""Distilling step by step: one response of the teacher makes a label row and a rationale row, told apart by their prefixes."""

from __future__ import annotations

import re
from typing import Literal

from kdray.programs.ask import Answer, Ask, Question, Unparsable
from kdray.settings.programs import RationaleProgram


def row_kind(sample_id: int, samples_per_prompt: int) -> Literal["label", "rationale"]:
    """What a rollout of the `rationale` program teaches: a prompt's samples alternate, the label first."""
    return "label" if sample_id % samples_per_prompt % 2 == 0 else "rationale"


async def rationale(settings: RationaleProgram, question: Question, ask: Ask) -> Answer:
    """See `kdray.programs.PROGRAMS`. Both rows of a pair are of one response, which has to hold both parts."""
    response = await ask(settings.explain.format(question=question.text), "explain")
    assert settings.answer is not None
    match = re.search(settings.answer, response)
    if match is None or not (match["rationale"] or "").strip() or not (match["answer"] or "").strip():
        raise Unparsable(f"no rationale with an answer in {response[:200]!r}")
    if question.sibling % 2 == 0:
        return Answer(match["answer"].strip())
    return Answer(match["rationale"].strip(), question=settings.rationale_prefix + question.text)
