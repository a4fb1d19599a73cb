"""Branch-Solve-Merge for a judge: criteria, concurrent scores on each criterion, one verdict; in both orders of the answers."""

from __future__ import annotations

import re

from kdray.config.programs import BranchSolveMergeProgram
from kdray.teachers.programs.ask import Answer, Ask, Question, Unparsable, found, side_by_side


async def branch_solve_merge(settings: BranchSolveMergeProgram, question: Question, ask: Ask) -> Answer:
    """See `kdray.teachers.programs.PROGRAMS`. Odd siblings judge the swapped answers, and their verdict is mapped back."""
    turned = question.sibling % 2 == 1
    asked = settings.swap(question.text) if turned else question.text
    branches = await ask(settings.branch.format(question=asked), "branch")
    criteria = [match.group(1).strip() for match in re.finditer(settings.criterion, branches)][: settings.max_criteria]
    if not criteria:
        raise Unparsable(f"no criterion in {branches[:200]!r}")

    async def solve(number: int, criterion: str) -> str:
        scores = await ask(settings.solve.format(question=asked, criterion=criterion), "solve", number)
        return settings.line.format(number=number + 1, criterion=criterion, scores=scores)

    evaluations = "".join(await side_by_side(solve(number, criterion) for number, criterion in enumerate(criteria)))
    verdict = found(settings.answer, await ask(settings.merge.format(question=asked, evaluations=evaluations), "merge"))
    if verdict not in settings.swapped:
        raise Unparsable(f"{verdict!r} is no verdict")
    return Answer(settings.reply.format(verdict=settings.swapped[verdict] if turned else verdict))
