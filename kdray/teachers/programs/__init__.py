"""System-2 programs: a few lines over `ask` each, in a file each. Their settings are in `kdray.config.programs`.

To add one: a settings class there, a file here with a coroutine (settings, question, ask) -> answer, and a line in `PROGRAMS`.
`kdray.teachers.programs.sampler` runs them for many rollouts concurrently.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kdray.config.programs import ProgramSettings
from kdray.errors import DataError
from kdray.teachers.programs.ask import Answer, Ask, Question
from kdray.teachers.programs.branch_solve_merge import branch_solve_merge
from kdray.teachers.programs.chain_of_thought import chain_of_thought
from kdray.teachers.programs.direct import direct
from kdray.teachers.programs.rationale import rationale, row_kind, row_weights
from kdray.teachers.programs.rephrase_respond import rephrase_respond
from kdray.teachers.programs.system2_attention import system2_attention
from kdray.teachers.programs.universal import universal
from kdray.types import Prompt

__all__ = ["PROGRAMS", "check_prompts", "row_kind", "row_weights", "run_program"]

PROGRAMS: dict[str, Callable[[Any, Question, Ask], Awaitable[Answer]]] = {
    "direct": direct,
    "rephrase_respond": rephrase_respond,
    "system2_attention": system2_attention,
    "branch_solve_merge": branch_solve_merge,
    "chain_of_thought": chain_of_thought,
    "rationale": rationale,
}
"""By `rollout.program.type`: settings, question and calls -> the answer. Each raises Unparsable if there is none."""


async def run_program(settings: ProgramSettings, question: Question, ask: Ask) -> Answer:
    """Answer of one rollout, with perturbation and self-consistency as set. Raises: Unparsable."""
    program = PROGRAMS[settings.type]
    if settings.perturb:
        template = settings.perturb[question.sibling % len(settings.perturb)]
        question = Question(template.format(question=question.text), question.sibling)
    if settings.universal is None:
        return await program(settings, question, ask)
    return await universal(settings.universal, question.text, lambda calls: program(settings, question, calls), ask)


def check_prompts(settings: ProgramSettings, prompts: Sequence[Prompt]) -> None:
    """Raises: DataError naming the first prompt that the program cannot ask about."""
    for prompt in prompts:
        if not isinstance(prompt.question, str):
            raise DataError(
                f"prompt {prompt.prompt_id}: rollout.program.type={settings.type} puts questions into templates, and this "
                "one is chat messages; give the prompts as texts"
            )
        try:
            settings.check_question(prompt.question)
        except ValueError as error:
            raise DataError(f"prompt {prompt.prompt_id}: {error}") from error
