"""Dry look at a recipe's data: the rows as the model will see them, token by token, and what there is to know about the others.

Reads the data and the student's tokenizer; loads no model and starts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from kdray.checks.paths import check_files
from kdray.config import Config
from kdray.data.chat import ChatTemplate
from kdray.data.dataset import TOO_LONG, Dataset, load_dataset
from kdray.data.encoding import Encoder
from kdray.data.references import reference_of
from kdray.errors import DataError
from kdray.models.inspect import check_source, student_tokenizer
from kdray.types import Prompt, Reference

if TYPE_CHECKING:
    from rich.console import Console

_MEASURED = 2_000
"""References that are rendered to measure their lengths."""
_MOST = 0.95
"""Share of the answers that a proposed `rollout.max_new_tokens` holds."""

_QUANTILES = {"shortest": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
_SHOWN = 600
"""Tokens of a row that are shown; more are left out in the middle."""


@dataclass(frozen=True)
class SampleRow:
    """A row as tokens."""

    place: str
    tokens: list[str]
    is_target: list[bool]
    """True for the tokens that supervised phases and `rollout.data_share` train on."""


@dataclass(frozen=True)
class Look:
    """Facts about the data of a recipe."""

    lines: list[str]
    lengths: dict[str, dict[str, int]]
    """Quantiles of the number of tokens, by what is measured."""
    samples: list[SampleRow]

    def short(self) -> list[str]:
        """Lengths and an example, a line each."""
        lines = [
            f"tokens of {name}: " + ", ".join(f"{each} {value}" for each, value in quantiles.items())
            for name, quantiles in self.lengths.items()
        ]
        return [*lines, *(f"example ({row.place}): {_plain(row)}" for row in self.samples[:1])]


def look(config: Config, rows: int = 5) -> Look:
    """Read the data of a recipe, and show `rows` of its training rows. Raises: ConfigError or DataError."""
    check_files(config)
    check_source("student.model", config.student.model, config.student.revision)
    tokenizer = student_tokenizer(config)
    # What would be refused for its length is counted here, and said.
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"too_long": "drop"})})
    return look_at(config, tokenizer, load_dataset(lenient, tokenizer, references=False), rows)


def look_at(config: Config, tokenizer: Any, dataset: Dataset, rows: int = 1) -> Look:
    """The same for data that are loaded already."""
    references, reasons = _references(config, tokenizer, dataset)
    prompts = [*dataset.train, *dataset.heldout]
    counted = sum(prompt.answer is not None for prompt in prompts)
    replies = sum(prompt.has_reference for prompt in prompts)
    lines = list(dataset.lines)
    lines.append(f"prompts: {len(dataset.train)} to train on, {len(dataset.heldout)} held out")
    if dataset.dropped:
        limit = f"data.max_prompt_tokens={config.data.max_prompt_tokens}"
        fate = "left out" if config.data.too_long == "drop" else "a run refuses them; raise it, or set data.too_long=drop"
        lines.append(f"too long: {dataset.dropped} prompts have more than {limit} tokens: {fate}")
    lines += [f"left out: {each.words}" for each in dataset.left_out if each.reason != TOO_LONG]
    lines.append(f"answers: of {len(prompts)} prompts, {replies} have one to train on, {counted} a text to grade against")
    lines.append(grading_line(dataset))
    lines.append(_template_line(config, tokenizer, prompts))
    if reasons:
        lines.append(f"supervised phases and rollout.data_share would be refused: {len(reasons)} rows, the first: {reasons[0]}")
    measured = {"prompts": [len(prompt.token_ids) for prompt in prompts]}
    if references:
        if replies > _MEASURED:
            lines.append(f"answers are measured on the first {_MEASURED}")
        measured["answers"] = [len(reference.answer_ids) for reference in references.values()]
        measured["rows with answer"] = [len(reference) for reference in references.values()]
        too_long = sum(tokens > config.rollout.max_new_tokens for tokens in measured["answers"])
        if too_long:
            lines.append(
                f"{too_long} of {len(references)} answers are longer than "
                f"rollout.max_new_tokens={config.rollout.max_new_tokens}, where responses stop; "
                f"{int(np.quantile(measured['answers'], _MOST, method='higher'))} tokens would hold {_MOST:.0%} of them"
            )
    lengths = {
        name: {each: int(np.quantile(values, share, method="higher")) for each, share in _QUANTILES.items()}
        for name, values in measured.items()
    }
    samples = [
        _sample(tokenizer, prompt, references.get(prompt.prompt_id), dataset.places.get(prompt.prompt_id, ""))
        for prompt in dataset.train[:rows]
    ]
    return Look(lines, lengths, samples)


def grading_line(dataset: Dataset) -> str:
    """What tells right responses from wrong ones, in words."""
    if dataset.grade is not None:
        return f"grading: {dataset.grade.name}"
    return (
        "grading: nothing tells right responses from wrong ones, so that no exact match is reported; set data.grader, such as "
        "exact or last_number, if prompts have answers"
    )


def show(found: Look, console: Console) -> None:
    """Print a look: facts, lengths, and rows whose targets are coloured, and in brackets for those who see no colour."""
    from rich.table import Table
    from rich.text import Text

    for line in found.lines:
        console.print(Text(line))
    table = Table("tokens", *_QUANTILES, padding=(0, 1, 0, 0), pad_edge=False)
    for name, quantiles in found.lengths.items():
        table.add_row(name, *map(str, quantiles.values()))
    console.print(table)
    if found.samples:
        console.print(Text("Tokens are set apart by ·, and those that count in supervised phases stand in ⟦⟧."))
    for row in found.samples:
        console.print(Text(f"\n{row.place}: {len(row.tokens)} tokens, {sum(row.is_target)} count", style="bold"))
        console.print(_coloured(row))


def _template_line(config: Config, tokenizer: Any, prompts: Sequence[Prompt]) -> str:
    template = ChatTemplate(tokenizer)
    file = config.data.chat_template_file
    origin = "the student tokenizer's" if file is None else f"data.chat_template_file={file}"
    if not template.present:
        return "chat template: none; prompts are tokenized as they are, and answers end with end-of-sequence"
    if all(isinstance(prompt.question, str) and prompt.question == prompt.text for prompt in prompts):
        return f"chat template: {origin}, not used (data.chat_template={config.data.chat_template})"
    how = "its generation marks" if template.marked else "rendering the messages before and after each turn"
    return f"chat template: {origin}; which tokens are the assistant's is found by {how}"


def _references(config: Config, tokenizer: Any, dataset: Dataset) -> tuple[dict[int, Reference], list[str]]:
    """Return the references by prompt id, and the reasons why others cannot be rendered."""
    encode = Encoder(config, tokenizer)
    found: dict[int, Reference] = {}
    reasons = []
    answered = (prompt for prompt in [*dataset.train, *dataset.heldout] if prompt.has_reference)
    for prompt in islice(answered, _MEASURED):
        try:
            whole = encode.with_reference(prompt, dataset.places.get(prompt.prompt_id, f"prompt {prompt.prompt_id}"))
            found[prompt.prompt_id] = reference_of(tokenizer, whole)
        except DataError as error:
            reasons.append(str(error))
    return found, reasons


def _sample(tokenizer: Any, prompt: Prompt, reference: Reference | None, place: str) -> SampleRow:
    ids, is_target = prompt.token_ids.tolist(), [False] * len(prompt.token_ids)
    if reference is not None:
        ids = [*reference.prompt_ids.tolist(), *reference.token_ids.tolist()]
        is_target = [False] * len(reference.prompt_ids) + reference.is_target.tolist()
    return SampleRow(place, _texts(tokenizer, ids), is_target)


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Text that each token adds; a character of several tokens is that of the last one."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False).rstrip("\ufffd")
        texts.append(text[len(before) :])
        before = text
    return texts


def _parts(row: SampleRow) -> list[tuple[str, bool]]:
    """(text, whether it is a target) of the tokens, made visible, with brackets around targets."""
    parts = []
    last = len(row.tokens) - 1
    for index, (text, target) in enumerate(zip(row.tokens, row.is_target, strict=True)):
        visible = text.replace("\n", "⏎").replace("\t", "⇥")
        opens = target and (index == 0 or not row.is_target[index - 1])
        closes = target and (index == last or not row.is_target[index + 1])
        parts.append((f"{'⟦' if opens else ''}{visible}{'⟧' if closes else ''}", target))
    if len(parts) > _SHOWN:
        left_out = f" … {len(parts) - _SHOWN} tokens … "
        parts = [*parts[: _SHOWN // 2], (left_out, False), *parts[-_SHOWN // 2 :]]
    return parts


def _coloured(row: SampleRow) -> Any:
    from rich.text import Text

    found = Text()
    for index, (text, target) in enumerate(_parts(row)):
        if index:
            found.append("·", style="dim")
        found.append(text, style="bold green" if target else "")
    return found


def _plain(row: SampleRow) -> str:
    text = "".join(text for text, _ in _parts(row))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
