"""Prompts: loaded from tasks, files, the hub or the caller, tokenized, and split into training and held-out sets.

`PromptStream` shuffles them, by a position that a resumed run can continue from; the loop decides when it uses which positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdray.config import Config, HubPrompts, JsonlPrompts, ParquetPrompts, TaskPrompts
from kdray.data.graders import Grading, grading_of
from kdray.data.sources import check_text, hub_records, jsonl_records, kind, names, parquet_records
from kdray.data.tasks import generate_examples
from kdray.errors import DataError
from kdray.types import Prompt, SampleRequest

PROMPT_COLUMNS = ("prompt", "question", "instruction", "messages")
"""Columns tried for the prompt, in this order, if `prompt_column` is not set."""

ANSWER_COLUMNS = ("answer", "completion", "response", "output")
"""Columns tried for the reference answer, in this order, if `answer_column` is not set."""

_BATCH = 1024

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Dataset:
    """The prompts of a run."""

    train: list[Prompt]
    """Prompts to sample rollouts for."""
    heldout: list[Prompt]
    """Prompts for evaluation; no training prompt shares a `prompt_id` with them."""
    dropped: int
    """Number of prompts dropped as longer than `data.max_prompt_tokens`, training and held-out together."""
    grade: Grading | None
    """`grade(prompt, response)` returns True for a correct response; None if the prompts have no grader."""


class PromptStream:
    """Infinite stream of training prompts: every epoch is a permutation of all of them, fixed by seed and epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Raises: DataError if there are no prompts."""
        if not prompts:
            raise DataError("no training prompts to draw from")
        self._prompts = prompts
        self._seed = seed
        # Two epochs: requests around an epoch boundary alternate between them.
        self._order = lru_cache(maxsize=2)(self._permutation)

    def at(self, position: int) -> Prompt:
        """Return the prompt at a position >= 0, a function of position and seed alone, so resume needs only a position."""
        if position < 0:
            raise ValueError(f"position={position}: positions count from 0")
        epoch, index = divmod(position, len(self._prompts))
        return self._prompts[self._order(epoch)[index]]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))


def load_dataset(config: Config, tokenizer: Any, prompts: Iterable[Any] | None = None) -> Dataset:
    """Load, check, tokenize and split the prompts that `data.prompts` names.

    `prompt_id` counts the rows of the training source from 0, dropped ones included; if held-out prompts have a
    source of their own, its rows continue the count. Of a held-out file or split, the first `data.heldout_size`
    prompts are used.

    Args: tokenizer: the student's. prompts: for `data.prompts.type: iterable`, texts or rows (dicts), finite.
    Raises: DataError with file, line, setting and remedy.
    """
    source = config.data.prompts
    if (prompts is not None) != source.from_caller:
        raise DataError(
            "data.prompts.type=iterable takes its prompts from the caller: pass prompts=..., or choose another type"
            if prompts is None
            else f"prompts=... was passed, but data.prompts.type={source.type}; set data.prompts.type=iterable"
        )
    size = config.data.heldout_size
    grade = grading_of(config)
    if prompts is None:
        rows, heldout_rows = _READERS[source.type](source, size, config.run.seed)
    else:
        rows, heldout_rows = _rows(_iterable_records(prompts), _Columns(), "prompts"), None
    encode = _Encoder(config, tokenizer)
    train, long_train = encode(_prefixed(rows, config.data.prefix), first_id=0)
    if heldout_rows is None:
        if len(train) <= size:
            dropped = f" ({long_train} more are too long)" if long_train else ""
            raise DataError(
                f"data.heldout_size={size} of {len(train)} prompts{dropped} leaves none to train on; lower "
                "data.heldout_size, or give more prompts"
            )
        return Dataset(train[:-size], train[-size:], long_train, grade)
    heldout, long_heldout = encode(_prefixed(heldout_rows, config.data.prefix), first_id=len(rows))
    for name, kept, long in (("training", train, long_train), ("held-out", heldout, long_heldout)):
        if not kept:
            raise DataError(
                f"data.max_prompt_tokens={config.data.max_prompt_tokens}: all {long} {name} prompts are longer and "
                "were dropped; raise it"
            )
    return Dataset(train, heldout, long_train + long_heldout, grade)


def reencode(config: Config, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[int, np.ndarray]:
    """Tokenize the prompts for a teacher with another tokenizer and chat template: ids of any length, by prompt id.

    Raises: DataError if its tokenizer has no chat template and needs one.
    """
    return _encoded(config, tokenizer, prompts, [prompt.question for prompt in prompts])


def templated(config: Config, tokenizer: Any, prompts: Sequence[Prompt], template: str) -> dict[int, np.ndarray]:
    """Tokenize the prompts for a teacher with `prompt_template`, ids by prompt id; of chat messages, it wraps the last one.

    Raises: DataError if the template uses the answer and a prompt has none.
    """
    if "{answer}" in template and (lacking := [prompt for prompt in prompts if prompt.answer is None]):
        raise DataError(f"prompt_template asks for {{answer}}, and prompt {lacking[0].prompt_id} has none; leave it out")
    questions: list[str | Messages] = []
    for prompt in prompts:
        question = prompt.question
        text = question if isinstance(question, str) else question[-1]["content"]
        filled = template.format(prompt=text, answer=prompt.answer)
        questions.append(filled if isinstance(question, str) else [*question[:-1], {**question[-1], "content": filled}])
    return _encoded(config, tokenizer, prompts, questions)


def _encoded(
    config: Config, tokenizer: Any, prompts: Sequence[Prompt], questions: Sequence[str | Messages]
) -> dict[int, np.ndarray]:
    """Tokenize questions that replace those of the prompts: ids of any length, by prompt id."""
    rows = [
        _Row(f"prompt {prompt.prompt_id}, as the teacher reads it", question, None)
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    encoded, _ = _unlimited(config, tokenizer)(rows, first_id=0)
    return {prompt.prompt_id: again.token_ids for prompt, again in zip(prompts, encoded, strict=True)}


def question_encoder(config: Config, tokenizer: Any) -> Callable[[str], Prompt]:
    """Return a function that encodes a question of any length as a prompt, under the config's chat template.

    Its `prompt_id` is 0. Raises: DataError if the tokenizer has no chat template and needs one.
    """
    encode = _unlimited(config, tokenizer)

    def encoded(question: str) -> Prompt:
        (prompt,), _ = encode([_Row("a question", question, None)], first_id=0)
        return prompt

    return encoded


def asked_text(
    config: Config, tokenizer: Any, prompts: Sequence[Prompt], chat: bool
) -> Callable[[SampleRequest], str | Messages]:
    """Return a function from a request to the text for a text-only teacher: the prompt's question, or that of a program's call.

    Args: chat: True if the teacher applies its own chat template; otherwise it gets the text after the student's template.
    """
    questions = {prompt.prompt_id: prompt.question if chat else prompt.text for prompt in prompts}
    encode = question_encoder(config, tokenizer)

    def text(request: SampleRequest) -> str | Messages:
        if request.question is None:
            return questions[request.prompt_id]
        return request.question if chat else encode(request.question).text

    return text


def response_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return an encoder of response text, which appends end-of-sequence. Special tokens in the text are treated as text."""

    def encoded(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [*ids, int(tokenizer.eos_token_id)]

    return encoded


def encode_answer(tokenizer: Any, prompt: Prompt) -> np.ndarray:
    """Encode the reference answer with end-of-sequence last: the target of supervised fine-tuning, int32 [answer tokens].

    Raises: DataError if the prompt has no answer or the tokenizer no end-of-sequence token.
    """
    if prompt.answer is None:
        raise DataError(
            f"prompt {prompt.prompt_id} has no reference answer to train on; set data.prompts.answer_column, or "
            "training.sft.steps=0"
        )
    if tokenizer.eos_token_id is None:
        raise DataError("the student tokenizer has no end-of-sequence token; set its eos_token")
    token_ids = tokenizer(prompt.answer, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray([*token_ids, tokenizer.eos_token_id], dtype=np.int32)


# ------------------------------------------------------------------------------------------- sources -> records


def _task_rows(source: TaskPrompts, heldout_size: int, seed: int) -> tuple[list[_Row], list[_Row]]:
    """Generate (training, held-out) rows; held-out ones come first, so that they do not depend on `size`."""
    # Seeds distinct from other uses of the run's seed and from those of the examples that a tiny teacher trains on.
    streams = [int(word) for word in np.random.SeedSequence([seed, 0x6B6472]).generate_state(2, np.uint64)]
    heldout = generate_examples([*source.tasks, *source.transfer_tasks], source.difficulty, heldout_size, streams[0])
    taken = frozenset(example.prompt for example in heldout)
    train = generate_examples(source.tasks, source.difficulty, source.size, streams[1], exclude=taken, weights=source.weights)
    made = [
        [_Row(f"task prompt {index}", example.prompt, example.answer, example.task) for index, example in enumerate(examples)]
        for examples in (train, heldout)
    ]
    return made[0], made[1]


def _file_rows(
    records: Callable[[Path, str], Iterator[tuple[str, dict[str, Any]]]], source: JsonlPrompts | ParquetPrompts, size: int
) -> tuple[list[_Row], list[_Row] | None]:
    """Rows of a file and of its held-out file. Args: records: reader of such files."""
    columns = _Columns(source.prompt_column, source.answer_column, source.domain_column)
    rows = _rows(records(source.path, "data.prompts.path"), columns, str(source.path))
    if source.heldout_path is None:
        return rows, None
    heldout = records(source.heldout_path, "data.prompts.heldout_path")
    return rows, _rows(heldout, columns, str(source.heldout_path))[:size]


def _hub_rows(source: HubPrompts, size: int, seed: int) -> tuple[list[_Row], list[_Row] | None]:
    """Rows of a split and of the held-out split."""
    columns = _Columns(source.prompt_column, source.answer_column, source.domain_column)

    def split(name: str, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
        return hub_records(source.name, source.subset, name, source.revision, f"data.prompts.{setting}")

    rows = _rows(split(source.split, "split"), columns, source.name)
    wanted = source.heldout_split
    if wanted is None:
        return rows, None
    return rows, _rows(split(wanted, "heldout_split"), columns, f"{source.name} (split {wanted})")[:size]


_READERS: dict[str, Callable[[Any, int, int], tuple[list[_Row], list[_Row] | None]]] = {
    "task": _task_rows,
    "jsonl": lambda source, size, seed: _file_rows(jsonl_records, source, size),
    "parquet": lambda source, size, seed: _file_rows(parquet_records, source, size),
    "hub": _hub_rows,
}
"""Training rows, and held-out rows where a source has its own, by `data.prompts.type`; given source, held-out size and seed."""


def _iterable_records(prompts: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, item in enumerate(prompts):
        if not isinstance(item, str | dict):
            raise DataError(f"prompts[{index}]: expected a text or a dict, found {kind(item)}")
        yield f"prompts[{index}]", {"prompt": item} if isinstance(item, str) else item


# -------------------------------------------------------------------------------------------------- records -> rows


@dataclass(frozen=True, slots=True)
class _Row:
    """A validated row of any source."""

    place: str
    prompt: str | Messages
    answer: str | None
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class _Columns:
    """Column names of a source, as set by the user; None if not set."""

    prompt: str | None = None
    answer: str | None = None
    domain: str | None = None


def _rows(records: Iterator[tuple[str, dict[str, Any]]], columns: _Columns, place: str) -> list[_Row]:
    """Validate records. Columns that are not set are chosen from the first record. Raises: DataError."""
    rows: list[_Row] = []
    prompt_column, answer_column = columns.prompt, columns.answer
    prompt_key, answer_key = prompt_column, answer_column
    for where, record in records:
        if not rows:
            prompt_key = _choose("prompt_column", prompt_column, PROMPT_COLUMNS, record, where)
            if answer_column is not None:
                _choose("answer_column", answer_column, (), record, where)
            else:
                answer_key = next((name for name in ANSWER_COLUMNS if name in record and name != prompt_key), None)
        if prompt_key not in record:
            raise DataError(f"{where}: no {prompt_key!r}, where the first row has its prompt; it has {names(record)}")
        prompt = _check_prompt(record[prompt_key], f"{where}, {prompt_key!r}")
        answer = record.get(answer_key) if answer_key is not None else None
        if answer is None and answer_column is not None:
            raise DataError(f"{where}: no answer in {answer_column!r} (data.prompts.answer_column)")
        if answer is not None and not isinstance(answer, str):
            raise DataError(f"{where}: the answer in {answer_key!r} must be text, found {kind(answer)}")
        check_text(answer or "", f"{where}, {answer_key!r}")
        domain = None
        if columns.domain is not None:
            domain = record.get(_choose("domain_column", columns.domain, (), record, where))
            if domain is not None and not isinstance(domain, str):
                raise DataError(f"{where}: the domain in {columns.domain!r} must be text, found {kind(domain)}")
            check_text(domain or "", f"{where}, {columns.domain!r}")
        rows.append(_Row(where, prompt, answer, domain))
    if not rows:
        raise DataError(f"{place}: empty, no prompts in it")
    return rows


def _choose(setting: str, column: str | None, defaults: Sequence[str], record: dict[str, Any], where: str) -> str:
    if column is not None:
        if column not in record:
            raise DataError(f"data.prompts.{setting}={column}: {where} has no such column; it has {names(record)}")
        return column
    for name in defaults:
        if name in record:
            return name
    raise DataError(
        f"{where}: none of the columns {', '.join(defaults)}; it has {names(record)}; set data.prompts.{setting} to one of them"
    )


def _check_prompt(value: Any, where: str) -> str | Messages:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: the prompt is blank; remove the row")
        check_text(value, where)
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: a prompt is a text or a list of chat messages, found {kind(value)}")
    if not value:
        raise DataError(f"{where}: the list of chat messages is empty; remove the row")
    for index, message in enumerate(value):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(f"{where}, message {index + 1}: expected an object with texts `role` and `content`")
        check_text(message["role"] + message["content"], f"{where}, message {index + 1}")
    if value[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the last message is the assistant's; a prompt ends before the answer: move that message to an "
            "answer column"
        )
    if not any(message["content"].strip() for message in value):
        raise DataError(f"{where}: every message is blank; remove the row")
    return value


# -------------------------------------------------------------------------------------------------- rows -> prompts


def _prefixed(rows: list[_Row], prefix: str) -> list[_Row]:
    """Prepend `data.prefix` to the question of every row: the text, or the last chat message."""

    def put(prompt: str | Messages) -> str | Messages:
        if isinstance(prompt, str):
            return prefix + prompt
        return [*prompt[:-1], {**prompt[-1], "content": prefix + prompt[-1]["content"]}]

    return [replace(row, prompt=put(row.prompt)) for row in rows] if prefix else rows


def _unlimited(config: Config, tokenizer: Any) -> _Encoder:
    """Return the config's encoder without a length limit."""
    unlimited = config.data.model_copy(update={"max_prompt_tokens": 2**31})
    return _Encoder(config.model_copy(update={"data": unlimited}), tokenizer)


class _Encoder:
    """Encoder of rows into prompts under the config's chat template and length limit."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._limit = config.data.max_prompt_tokens
        self._too_long: Literal["refuse", "drop"] = config.data.too_long
        self._tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        wanted = config.data.chat_template
        if wanted == "always" and not has_template:
            raise DataError("data.chat_template=always, but the student tokenizer has none; use auto or never")
        self._has_template = has_template
        self._wrap_text = wanted == "always" or (wanted == "auto" and has_template)

    def __call__(self, rows: Sequence[_Row], first_id: int) -> tuple[list[Prompt], int]:
        """Return (prompts in row order, number dropped as too long). Text is never truncated."""
        kept: list[Prompt] = []
        longer: list[Prompt] = []
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            for index, (row, text, token_ids) in enumerate(zip(part, *self._tokenize(part), strict=True), start=start):
                if not token_ids:
                    raise DataError(f"{row.place}: the prompt has no tokens; remove the row")
                ids = np.asarray(token_ids, dtype=np.int32)
                prompt = Prompt(first_id + index, ids, text, row.answer, row.domain, row.prompt)
                (longer if len(token_ids) > self._limit else kept).append(prompt)
        if longer and self._too_long == "refuse":
            longest = max(len(prompt.token_ids) for prompt in longer)
            first = longer[0]
            raise DataError(
                f"data.max_prompt_tokens={self._limit}: {len(longer)} of {len(rows)} prompts are longer: longest "
                f"{longest} tokens, first prompt {first.prompt_id} ({rows[first.prompt_id - first_id].place}); "
                f"set data.max_prompt_tokens={longest}, or data.too_long=drop to leave them out"
            )
        return kept, len(longer)

    def _tokenize(self, rows: Sequence[_Row]) -> tuple[list[str], list[list[int]]]:
        """Return the texts after the chat template, and their ids."""
        texts = [self._text(row) for row in rows]
        templated = [self._wrap_text or not isinstance(row.prompt, str) for row in rows]
        token_ids: list[list[int]] = [[] for _ in rows]
        for wrapped in (False, True):
            chosen = [index for index, flag in enumerate(templated) if flag == wrapped]
            if not chosen:
                continue
            # A chat template adds its own special tokens; raw text gets the tokenizer's default ones.
            encoded = self._tokenizer(
                [texts[index] for index in chosen], add_special_tokens=not wrapped, truncation=False, verbose=False
            )["input_ids"]
            for index, ids in zip(chosen, encoded, strict=True):
                token_ids[index] = ids if wrapped else self._without_eos(texts[index], ids)
        return texts, token_ids

    def _text(self, row: _Row) -> str:
        if isinstance(row.prompt, str) and not self._wrap_text:
            return row.prompt
        if not self._has_template:
            raise DataError(
                f"{row.place}: chat messages need a chat template, and the student tokenizer has none; use a student "
                "whose tokenizer has one, or give the prompts as text"
            )
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        import jinja2

        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        # Templates raise on messages that they do not support (a system message, two user turns).
        except jinja2.TemplateError as error:
            raise DataError(f"{row.place}: the student's chat template refuses these messages: {error}") from error

    def _without_eos(self, text: str, token_ids: list[int]) -> list[int]:
        """Remove an end-of-sequence token that the tokenizer appended; a response cannot follow an ended prompt."""
        eos = self._tokenizer.eos_token
        if token_ids and eos is not None and token_ids[-1] == self._tokenizer.eos_token_id and not text.endswith(eos):
            return token_ids[:-1]
        return token_ids
