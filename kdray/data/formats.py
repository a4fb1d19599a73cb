"""Rows of any source as prompts and reference answers: the format is chosen from the first row, and described for the user.

Known are chat messages (`messages`), ShareGPT (`conversations`), instructions with an input (Alpaca, Dolly), prompt and
completion (texts or messages), and question or query with an answer; docs/data.md has an example of each. Every row becomes a
`Row`, whose prompt is a text or a list of chat messages that ends before the answer.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdray.data.messages import Message, Messages, answers_in, as_messages, text_of, without_nulls
from kdray.data.sources import UNREAD, Records, check_text, kind, names
from kdray.errors import DataError

PROMPT_COLUMNS = ("prompt", "question", "instruction", "messages", "conversations", "query", "problem", "input")
"""Columns tried for the prompt, in this order, if `prompt_column` is not set."""

ANSWER_COLUMNS = ("answer", "completion", "response", "output", "solution")
"""Columns tried for the reference answer, in this order, if `answer_column` is not set."""

CONVERSATION_COLUMNS = ("messages", "conversations")
"""Columns of whole conversations, which are preferred to a prompt without an answer column."""

INPUT_COLUMNS = ("input", "context")
"""Columns joined to the `instruction` that they belong to."""

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns of a row's system message."""

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns passed to the chat template."""

Turns = Literal["last", "all", "each"]
"""Turns of an assistant that are learned; see `data.turns`."""

_KNOWN = (*PROMPT_COLUMNS, *ANSWER_COLUMNS, *INPUT_COLUMNS, *SYSTEM_COLUMNS, *TEMPLATE_COLUMNS)


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names of a source, as set by the user; None if not set."""

    prompt: str | None = None
    answer: str | None = None
    domain: str | None = None

    @property
    def wanted(self) -> set[str]:
        """Columns that a row may be made from; others need not be read."""
        return {*_KNOWN, *(name for name in (self.prompt, self.answer, self.domain) if name is not None)}


@dataclass(frozen=True, slots=True)
class Row:
    """A validated row of any source."""

    place: str
    prompt: str | Messages
    answer: str | None
    domain: str | None = None
    reply: Message | None = None
    """The assistant's message whose text is the answer; None if the answer is no message, or a text alone."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template for this row: `tools`, and those of the column `chat_template_kwargs`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns of a source, as chosen from its first row."""

    prompt: str
    answer: str | None
    inputs: tuple[str, ...]
    system: str | None
    template: tuple[str, ...]
    unused: tuple[str, ...]

    @classmethod
    def of(cls, record: dict[str, Any], columns: Columns, where: str) -> Layout:
        """Choose the columns. Raises: DataError if there is no prompt, or a column that was set."""
        answer = columns.answer
        if answer is not None:
            _check_column("answer_column", answer, record, where)
        prompt = columns.prompt
        if prompt is None:
            prompt = _prompt_column(record, where, answered=answer is not None)
        else:
            _check_column("prompt_column", prompt, record, where)
        if answer is None:
            answer = next((name for name in ANSWER_COLUMNS if name in record and name != prompt), None)
        inputs = tuple(name for name in INPUT_COLUMNS if name in record) if prompt == "instruction" else ()
        inputs = tuple(name for name in inputs if name != answer)
        system = next((name for name in SYSTEM_COLUMNS if name in record and name not in (prompt, answer)), None)
        template = tuple(name for name in TEMPLATE_COLUMNS if name in record and name not in (prompt, answer))
        used = {prompt, answer, *inputs, system, *template, columns.domain}
        return cls(prompt, answer, inputs, system, template, tuple(str(name) for name in record if name not in used))

    def describe(self, form: str, answers: str | None, rows: int) -> str:
        """One line for the user. Args: form: of the prompts; answers: those in the prompt column itself, None without any."""
        parts = [f"prompts from {' and '.join(map(repr, (self.prompt, *self.inputs)))}"]
        if answers is not None:
            parts.append(f"answers are {answers}")
        if self.answer is not None:
            parts.append(f"{'answers from' if answers is None else 'graded against'} {self.answer!r}")
        if answers is None and self.answer is None:
            parts.append("no answers")
        if self.system is not None:
            parts.append(f"system messages from {self.system!r}")
        parts += [f"{name!r} goes to the chat template" for name in self.template]
        if self.unused:
            parts.append(f"not used: {', '.join(self.unused)}")
        return f"{rows} rows, {form}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Table:
    """Rows of a source, and what there is to say about them."""

    rows: list[Row]
    lines: list[str]
    """Descriptions for the user: format and columns, conversions, rows that are left out."""


def read_rows(records: Records, columns: Columns, place: str, turns: Turns = "last") -> Table:
    """Validate records and convert them to rows.

    Args: turns: `each` makes every turn of an assistant the answer of a row of its own; otherwise the last turn is.
    Raises: DataError with place, column and remedy.
    """
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    layout: Layout | None = None
    every_turn = turns == "each"
    for where, record in records:
        if layout is None:
            layout = Layout.of(record, columns, where)
        if layout.prompt not in record:
            raise DataError(f"{where}: no {layout.prompt!r}, where the first row has its prompt; it has {names(record)}")
        counts["rows"] += 1
        rows += _made(record, layout, columns, where, counts, every_turn)
    if layout is None or not rows:
        raise DataError(f"{place}: empty, no prompts in it")
    form = " and ".join(name for name in ("texts", "chat messages", "ShareGPT conversations") if counts[name])
    if layout.inputs:
        form = "instructions with input"
    answers = f"the assistant's {'turns' if every_turn else 'last turns'}" if counts["replies"] else None
    lines = [layout.describe(form, answers, counts["rows"])]
    if every_turn and counts["replies"]:
        lines.append(f"{len(rows)} prompts from {counts['rows']} rows: every turn of an assistant has a prompt of its own")
    if counts["numbers"]:
        lines.append(f"{counts['numbers']} answers are numbers, taken as their text")
    if counts["earlier"] and turns == "last":
        lines.append(
            f"{counts['earlier']} rows have earlier turns of an assistant, which are context: data.turns=all trains supervised "
            "phases on them too, data.turns=each gives each a prompt of its own"
        )
    return Table(rows, lines)


def _prompt_column(record: dict[str, Any], where: str, answered: bool) -> str:
    found = [name for name in PROMPT_COLUMNS if name in record]
    if not found:
        raise DataError(
            f"{where}: none of the columns {', '.join(PROMPT_COLUMNS)}; it has {names(record)}; set "
            "data.prompts.prompt_column to one of them"
        )
    # A set of conversations often repeats their first message in a column of its own.
    if not answered and not any(name in record for name in ANSWER_COLUMNS):
        found = [*(name for name in CONVERSATION_COLUMNS if name in record), *found]
    return found[0]


def _check_column(setting: str, column: str, record: dict[str, Any], where: str) -> None:
    if column not in record:
        raise DataError(f"data.prompts.{setting}={column}: {where} has no such column; it has {names(record)}")


def _made(
    record: dict[str, Any],
    layout: Layout,
    columns: Columns,
    where: str,
    counts: Counter[str],
    every_turn: bool,
) -> Iterator[Row]:
    """The rows of a record."""
    value = _parsed(record[layout.prompt], layout.prompt in CONVERSATION_COLUMNS)
    at = f"{where}, {layout.prompt!r}"
    prompt = _prompt(value, at, counts)
    if isinstance(prompt, str):
        prompt = "\n\n".join([prompt, *(text for name in layout.inputs if (text := _optional_text(record, name, where)))])
    answer, continued = _answer(record, layout, where, counts)
    if answer is None and not continued and columns.answer is not None:
        raise DataError(f"{where}: no answer in {columns.answer!r} (data.prompts.answer_column)")
    if continued:
        prompt = [*([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), *continued]
    system = _optional_text(record, layout.system, where) if layout.system is not None else None
    if system:
        prompt = with_system(prompt, system)
    more = _template_kwargs(record, layout, where)
    domain = _domain(record, columns, where)
    if isinstance(prompt, str):
        yield Row(where, prompt, answer, domain, None, more)
        return
    counts["messages"] += 1
    answered = answers_in(prompt)
    if prompt[-1]["role"] == "assistant" and not answered:
        raise DataError(f"{at}: nothing comes before the assistant's turn; add the message that it answers, or remove the row")
    # After the last message of another role the question is open: nothing in the list answers it.
    is_open = prompt[-1]["role"] != "assistant"
    chosen = answered if every_turn else [] if is_open else answered[-1:]
    counts["replies"] += bool(chosen)
    counts["earlier"] += len(answered) > len(chosen) and (not is_open or answer is not None)
    for turn in chosen:
        reply = prompt[turn]
        # A column beside the conversation is about its end.
        known = answer if answer is not None and turn == len(prompt) - 1 else text_of(reply) or None
        yield Row(where, prompt[:turn], known, domain, reply, more)
    if is_open:
        yield Row(where, prompt, answer, domain, None, more)


def with_system(prompt: str | Messages, system: str) -> Messages:
    """Put a system message before a prompt, unless it has one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def _prompt(value: Any, where: str, counts: Counter[str]) -> str | Messages:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: the prompt is blank; remove the row")
        check_text(value, where)
        counts["texts"] += 1
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: a prompt is a text or a list of chat messages, found {kind(value)}")
    if not value:
        raise DataError(f"{where}: the list of chat messages is empty; remove the row")
    messages, form = as_messages(value, where)
    counts[form] += 1
    if not any(text_of(message).strip() for message in messages):
        raise DataError(f"{where}: every message is blank; remove the row")
    return messages


def _answer(record: dict[str, Any], layout: Layout, where: str, counts: Counter[str]) -> tuple[str | None, Messages]:
    """Return the answer as a text, or as further messages of the conversation."""
    value = record.get(layout.answer) if layout.answer is not None else None
    at = f"{where}, {layout.answer!r}"
    if value is None or value is UNREAD or (isinstance(value, float) and math.isnan(value)):
        return None, []
    if isinstance(value, bool | int | float):
        counts["numbers"] += 1
        return json.dumps(value), []
    if isinstance(value, str):
        check_text(value, at)
        return value, []
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return None, as_messages(value, at)[0]
    raise DataError(
        f"{where}: the answer in {layout.answer!r} must be text, a number or chat messages, found {kind(value)}; set "
        "data.prompts.answer_column to another column"
    )


def _optional_text(record: dict[str, Any], column: str, where: str) -> str | None:
    """Text of a column that may be null or blank. Raises: DataError if it is no text."""
    value = record.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} must be text, found {kind(value)}")
    check_text(value, f"{where}, {column!r}")
    return value if value.strip() else None


def _domain(record: dict[str, Any], columns: Columns, where: str) -> str | None:
    if columns.domain is None:
        return None
    _check_column("domain_column", columns.domain, record, where)
    domain = record[columns.domain]
    if domain is not None and not isinstance(domain, str):
        raise DataError(f"{where}: the domain in {columns.domain!r} must be text, found {kind(domain)}")
    check_text(domain or "", f"{where}, {columns.domain!r}")
    return domain


def _template_kwargs(record: dict[str, Any], layout: Layout, where: str) -> dict[str, Any]:
    """Arguments of the chat template that the row gives."""
    found: dict[str, Any] = {}
    for name in layout.template:
        value = without_nulls(_parsed(record.get(name), True))
        if value is None or value == "":
            continue
        _TEMPLATE_CHECKS[name](value, f"{where}, {name!r}")
        found |= {"tools": value} if name == "tools" else value
    return found


def _check_tools(value: Any, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: tools are a list of JSON schemas, found {kind(value)}")


def _check_kwargs(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{where}: arguments of the chat template are an object, found {kind(value)}")


_TEMPLATE_CHECKS: dict[str, Callable[[Any, str], None]] = {"tools": _check_tools, "chat_template_kwargs": _check_kwargs}


def _parsed(value: Any, structured: bool) -> Any:
    """Parse JSON where a text stands for a structure, as in CSV; other values are returned as they are."""
    if not structured or not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        # A text that only looks like JSON; the check of its column refuses it.
        return value
