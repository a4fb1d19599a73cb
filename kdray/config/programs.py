"""System-2 programs: chains of calls to the teacher that end in one answer; the student learns only that answer.

A template is the text of a call, with placeholders in braces; a literal brace is written twice. The default wording suits
instruction-tuned models; the recipes' terse templates suit tiny models.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdray.config.base import NonNegativeFloat, Positive, Settings

FINAL_ANSWER = r"(?is)final answer\s*:\s*(.*)"
"""Matches the text after `Final answer:`."""


class UniversalSettings(Settings):
    """Universal self-consistency: several answers, of which a further call selects the one most consistent with the others."""

    answers: Annotated[int, Field(ge=2, le=64)]
    """Number of times the program runs for one rollout."""
    line: str = "Answer {number}: {answer}\n"
    """Format of each listed answer, numbered from 1."""
    choose: str = (
        "Several answers to a question follow.\n\nQuestion: {question}\n\n{answers}\nWhich of them agrees best with the "
        "others? Reply with its number alone."
    )
    """Template of the selecting call."""
    choice: str = r"(\d+)"
    """Regular expression whose first group is the selected number in the reply."""

    @model_validator(mode="after")
    def _valid(self) -> UniversalSettings:
        check_template("rollout.program.universal.line", self.line, ("number", "answer"))
        check_template("rollout.program.universal.choose", self.choose, ("answers",), ("question",))
        check_pattern("rollout.program.universal.choice", self.choice, groups=1)
        return self


class ProgramBase(Settings):
    """Settings common to all programs. The class variables are facts that the rest of the program needs."""

    type: str
    """Name of the program; a subclass narrows it to a `Literal` of its own."""
    stages: ClassVar[tuple[str, ...]]
    """Names of the calls."""
    templates: ClassVar[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]]
    """Template settings, with the placeholders that each must and may use."""
    paired_rows: ClassVar[bool] = False
    """A prompt's samples come in pairs: two training rows made from one response."""

    max_stage_tokens: Positive = 1024
    """Maximum tokens of a call, prompt plus response; the engine must hold that many. A longer call makes the answer
    unparsable."""
    max_new_tokens: Positive = 256
    """Maximum tokens of a call's response; a truncated one makes the answer unparsable."""
    max_new_tokens_of: dict[str, Positive] = Field(default={})
    """Different limit for single stages, by name."""
    answer: str | None = None
    """Regular expression, searched in the last response, whose first group (or whole match, without a group) is the answer.
    None takes the whole response. Without a match the answer is unparsable."""
    perturb: list[str] = Field(default=[])
    """Templates of the question that should not change its answer: sample i of a prompt uses number i, cycling. With several
    samples per prompt, answers that are not robust differ."""
    universal: UniversalSettings | None = None
    """Universal self-consistency within every rollout; None disables it."""

    @model_validator(mode="after")
    def _valid(self) -> ProgramBase:
        for name, (must, may) in self.templates.items():
            check_template(f"rollout.program.{name}", getattr(self, name), must, may)
        for number, template in enumerate(self.perturb):
            check_template(f"rollout.program.perturb.{number}", template, ("question",))
        if self.answer is not None:
            check_pattern("rollout.program.answer", self.answer)
        stages = (*self.stages, "choose") if self.universal is not None else self.stages
        unknown = sorted(set(self.max_new_tokens_of) - set(stages))
        if unknown:
            raise ValueError(
                f"rollout.program.max_new_tokens_of names {', '.join(unknown)}, but the stages are {', '.join(stages)}"
            )
        for stage in stages:
            limit = self.response_tokens(stage)
            if limit >= self.max_stage_tokens:
                raise ValueError(
                    f"rollout.program.max_stage_tokens={self.max_stage_tokens} leaves no room for a prompt beside the {limit} "
                    f"response tokens of stage {stage}; raise it"
                )
        return self

    def check_question(self, question: str) -> None:
        """Raises: ValueError with setting and remedy if the program cannot ask about this question."""

    def response_tokens(self, stage: str) -> int:
        """Maximum tokens of a stage's response."""
        return self.max_new_tokens_of.get(stage, self.max_new_tokens)

    @property
    def row_prefix(self) -> str | None:
        """Text before the question in the second row of a pair, in place of `data.prefix`; None without pairs."""
        return None

    @property
    def second_row_weight(self) -> float | None:
        """Weight of the tokens in a pair's second row relative to the first; None without pairs."""
        return None


class DirectProgram(ProgramBase):
    """A single call with the question: the teacher's System 1, as a control for the other programs."""

    stages: ClassVar = ("answer",)
    templates: ClassVar = {"ask": (("question",), ())}

    type: Literal["direct"]
    ask: str = "{question}"
    """Template of the call."""


class RephraseRespondProgram(ProgramBase):
    """The teacher rephrases and expands the question, then answers it: in two calls, or in one.

    Source: Rephrase and Respond, Deng et al. 2023 (arXiv 2311.04205)."""

    stages: ClassVar = ("rephrase", "respond")
    templates: ClassVar = {
        "rephrase": (("question",), ()),
        "respond": (("rephrased",), ("question",)),
        "at_once": (("question",), ()),
    }

    type: Literal["rephrase_respond"]
    steps: Literal[1, 2] = 2
    """Number of calls: 2 rephrases in one and answers in another, 1 does both in one response."""
    rephrase: str = (
        "{question}\n\nRewrite the question above in clearer and more detailed words, so that it is easier to answer well. "
        "Keep everything it says. Write the rewritten question alone."
    )
    """Template of the first of two calls."""
    respond: str = (
        "Question: {question}\nThe same question in more detail: {rephrased}\n\nAnswer the question. Write the answer alone."
    )
    """Template of the second of two calls."""
    at_once: str = (
        "{question}\n\nFirst rewrite the question in clearer and more detailed words, then answer it. End with a line that "
        "begins with `Final answer:`."
    )
    """Template of the only call."""

    @model_validator(mode="before")
    @classmethod
    def _answer_of_steps(cls, tree: Any) -> Any:
        # A single response also holds the rephrased question; setting the default here preserves it in a dump.
        if isinstance(tree, dict) and tree.get("steps") == 1:
            return {"answer": FINAL_ANSWER} | tree
        return tree


class System2AttentionProgram(ProgramBase):
    """The teacher rewrites the prompt without irrelevant parts, such as opinions, then answers the rewritten prompt.

    Source: System 2 Attention, Weston and Sukhbaatar 2023 (arXiv 2311.11829).
    """

    stages: ClassVar = ("rewrite", "respond")
    templates: ClassVar = {"rewrite": (("question",), ()), "respond": (("rewritten",), ())}

    type: Literal["system2_attention"]
    rewrite: str = (
        "Here is a text by a user:\n\n{question}\n\nRewrite it so that it holds the question and the facts that an answer "
        "needs, without opinions, guesses and what is beside the point. Write the rewritten text alone."
    )
    """Template of the first call."""
    respond: str = "{rewritten}\n\nAnswer without bias. Write the answer alone."
    """Template of the second call, which does not see the original question."""


class BranchSolveMergeProgram(ProgramBase):
    """A judge of two answers: lists criteria, scores both answers on each criterion, merges the scores into a verdict.

    Samples with an odd number see the two answers swapped, and their verdict is mapped back: only a verdict that does not
    depend on the order is the same in all samples of a prompt.
    Source: Branch-Solve-Merge, Saha et al. 2023 (arXiv 2310.15123).
    """

    stages: ClassVar = ("branch", "solve", "merge")
    templates: ClassVar = {
        "branch": (("question",), ()),
        "solve": (("question", "criterion"), ()),
        "line": (("scores",), ("criterion", "number")),
        "merge": (("evaluations",), ("question",)),
        "reply": (("verdict",), ()),
    }

    type: Literal["branch_solve_merge"]
    pair: str = r"(?is)\[answer a\](?P<a>.*?)\[answer b\](?P<b>.*?)(?:\[end\]|\Z)"
    """Regular expression with the groups `a` and `b`, which match the two answers in a question."""
    branch: str = (
        "{question}\n\nTwo answers are to be compared. List at most five criteria that matter for this question, one a line, "
        "each line beginning with `- `. Write the list alone."
    )
    """Template of the call that lists criteria."""
    criterion: str = r"(?m)^[ \t]*(?:-|\*|\d+[.)])[ \t]*(.+)$"
    """Regular expression whose first group is a criterion in the list."""
    max_criteria: Annotated[int, Field(ge=1, le=64)] = 5
    """Maximum number of criteria used, from the start of the list."""
    solve: str = (
        "{question}\n\nScore both answers from 1 to 5 by this criterion alone: {criterion}\nWrite a short reason, then the two "
        "scores as `A: <score>, B: <score>`."
    )
    """Template of the call that scores one criterion; these calls run concurrently."""
    line: str = "Criterion: {criterion}\n{scores}\n\n"
    """Format of a criterion's scores in the merging call."""
    merge: str = (
        "{question}\n\nThe two answers were compared by several criteria:\n\n{evaluations}Which answer is better on the whole? "
        "Write [[A]], [[B]], or [[C]] for a tie."
    )
    """Template of the call that gives the verdict."""
    answer: str | None = r"\[\[([ABC])\]\]"
    """Regular expression, searched in the merging response, whose first group is the verdict."""
    swapped: dict[str, str] = Field(default={"A": "B", "B": "A", "C": "C"})
    """Meaning of each verdict if the answers were swapped; any other verdict is unparsable."""
    reply: str = "[[{verdict}]]"
    """Response that the student learns."""

    @model_validator(mode="after")
    def _patterns(self) -> BranchSolveMergeProgram:
        check_pattern("rollout.program.criterion", self.criterion, groups=1)
        groups = check_pattern("rollout.program.pair", self.pair).groupindex
        if not {"a", "b"} <= set(groups):
            raise ValueError(f"rollout.program.pair={self.pair!r}: needs the groups (?P<a>...) and (?P<b>...)")
        if any(self.swapped.get(other) != verdict for verdict, other in self.swapped.items()):
            raise ValueError(f"rollout.program.swapped={self.swapped}: swapping twice must give every verdict back")
        return self

    def check_question(self, question: str) -> None:
        try:
            self.swap(question)
        except ValueError as error:
            raise ValueError(
                f"rollout.program.pair={self.pair!r} finds {error}; set it to a pattern that finds both"
            ) from error

    def swap(self, question: str) -> str:
        """Swap the two answers in the question, the groups `a` and `b` of `pair`.

        Raises: ValueError if the pattern does not match.
        """
        match = re.search(self.pair, question)
        if match is None or match.start("a") < 0 or match.start("b") < 0:
            raise ValueError(f"no two answers in {question[:200]!r}")
        first, second = sorted(("a", "b"), key=match.start)
        return (
            question[: match.start(first)]
            + match[second]
            + question[match.end(first) : match.start(second)]
            + match[first]
            + question[match.end(second) :]
        )


class ChainOfThoughtProgram(ProgramBase):
    """A single call that thinks step by step; the text after the reasoning is the answer.

    Source: zero-shot chain of thought, Kojima et al. 2022 (arXiv 2205.11916).
    """

    stages: ClassVar = ("think",)
    templates: ClassVar = {"think": (("question",), ())}

    type: Literal["chain_of_thought"]
    think: str = "{question}\n\nThink step by step, then give the answer on a last line that begins with `Final answer:`."
    """Template of the call."""
    answer: str | None = FINAL_ANSWER
    """Regular expression, searched in the response, whose first group is the answer."""


class RationaleProgram(ProgramBase):
    """Distilling step by step: each response gives a row that teaches the answer and a row that teaches the rationale.

    A prompt's samples come in pairs: the even one is the label row (the unchanged prompt, then the answer), the odd one the
    rationale row (`rationale_prefix` in place of `data.prefix`, then the rationale).
    Source: Distilling Step-by-Step, Hsieh et al. 2023 (arXiv 2305.02301).
    """

    stages: ClassVar = ("explain",)
    templates: ClassVar = {"explain": (("question",), ())}
    paired_rows: ClassVar = True

    type: Literal["rationale"]
    explain: str = (
        "{question}\n\nExplain step by step how to find the answer, then give it on a last line that begins with "
        "`Final answer:`."
    )
    """Template of the call."""
    answer: str | None = r"(?is)\A\s*(?P<rationale>.+?)\s*final answer\s*:\s*(?P<answer>.*)"
    """Regular expression with the groups `rationale` and `answer`, searched in the response."""
    rationale_prefix: str = "[rationale] "
    """Text before the question in a rationale row; label rows use `data.prefix`."""
    rationale_weight: NonNegativeFloat = 1.0
    """Weight of a rationale row's tokens relative to a label row's."""

    @model_validator(mode="after")
    def _both(self) -> RationaleProgram:
        groups = check_pattern("rollout.program.answer", self.answer or "").groupindex
        if not {"rationale", "answer"} <= set(groups):
            raise ValueError(f"rollout.program.answer={self.answer!r}: needs the groups (?P<rationale>...) and (?P<answer>...)")
        if self.universal is not None:
            raise ValueError("rollout.program.universal: the rows of a pair come from one response; remove it")
        if self.perturb:
            raise ValueError("rollout.program.perturb: the rows of a pair come from one response; remove it")
        return self

    @property
    def row_prefix(self) -> str:
        return self.rationale_prefix

    @property
    def second_row_weight(self) -> float:
        return self.rationale_weight


ProgramSettings = Annotated[
    DirectProgram
    | RephraseRespondProgram
    | System2AttentionProgram
    | BranchSolveMergeProgram
    | ChainOfThoughtProgram
    | RationaleProgram,
    Field(discriminator="type"),
]


def check_template(setting: str, template: str, must: tuple[str, ...], may: tuple[str, ...] = ()) -> None:
    """Raises: ValueError if the template lacks a placeholder of `must`, or has one that is in neither."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"{setting}={template!r}: {error}; write a literal brace twice") from error
    known = ", ".join(f"{{{name}}}" for name in (*must, *may))
    unknown = sorted(names - {*must, *may})
    if unknown:
        raise ValueError(
            f"{setting}={template!r}: nothing is known as {{{unknown[0]}}}; use {known}, and write a literal brace twice"
        )
    lacking = [name for name in must if name not in names]
    if lacking:
        raise ValueError(f"{setting}={template!r}: lacks {{{lacking[0]}}}")


def check_pattern(setting: str, pattern: str, groups: int = 0) -> re.Pattern[str]:
    """Compile the pattern. Raises: ValueError if it does not compile or has fewer groups."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{setting}={pattern!r}: not a regular expression: {error}") from error
    if compiled.groups < groups:
        raise ValueError(f"{setting}={pattern!r}: needs a group (...) for what is to be read")
    return compiled
