"""Distilling step by step: each response gives a label row and a rationale row, distinguished by their prefixes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from kdray.config.programs import RationaleProgram
from kdray.teachers.programs.ask import Answer, Ask, Question, Unparsable
from kdray.types import Rollout


def row_kind(sample_id: int, samples_per_prompt: int) -> Literal["label", "rationale"]:
    """Kind of training row of a `rationale` program's rollout: a prompt's samples alternate, the label first."""
    return "label" if sample_id % samples_per_prompt % 2 == 0 else "rationale"


def row_weights(rollouts: Sequence[Rollout], samples_per_prompt: int, rationale_weight: float) -> dict[int, float]:
    """Weights that make a batch's cross entropy the mean over label tokens plus `rationale_weight` times that of rationales.

    A loss is divided by all tokens, and rationales have many times more than labels: without these weights they would dominate.
    The data's own answers are labels. Source: Hsieh et al. 2023 (arXiv 2305.02301), eq. 3.
    """
    kinds = {
        rollout.sample_id: "label" if rollout.has_writer("data") else row_kind(rollout.sample_id, samples_per_prompt)
        for rollout in rollouts
    }
    tokens = Counter[str]()
    for rollout in rollouts:
        tokens[kinds[rollout.sample_id]] += rollout.num_targets
    share = {"label": 1.0, "rationale": rationale_weight}
    return {sample_id: share[kind] * tokens.total() / max(1, tokens[kind]) for sample_id, kind in kinds.items()}


async def rationale(settings: RationaleProgram, question: Question, ask: Ask) -> Answer:
    """See `kdray.teachers.programs.PROGRAMS`. Both rows of a pair come from one response, which must contain both parts."""
    response = await ask(settings.explain.format(question=question.text), "explain")
    assert settings.answer is not None
    match = re.search(settings.answer, response)
    if match is None or not (match["rationale"] or "").strip() or not (match["answer"] or "").strip():
        raise Unparsable(f"no rationale with an answer in {response[:200]!r}")
    if question.sibling % 2 == 0:
        return Answer(match["answer"].strip())
    return Answer(match["rationale"].strip(), question=settings.rationale_prefix + question.text)
