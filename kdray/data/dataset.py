"""Prompts: loaded from tasks, files, the hub or the caller, tokenized, and split into training and held-out sets.

`PromptStream` shuffles them, by a position that a resumed run can continue from; the loop decides when it uses which positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kdray.config import Config, HubPrompts, TaskPrompts
from kdray.config.data import DEFAULT_HELDOUT, PromptFile
from kdray.data.encoding import Encoded, Encoder
from kdray.data.formats import Columns, Row, Table, read_rows, with_system
from kdray.data.graders import Grading, grading_of
from kdray.data.messages import Messages
from kdray.data.references import encode_answer
from kdray.data.sources import Records, file_records, hub_records, kind
from kdray.data.tasks import generate_examples
from kdray.errors import DataError
from kdray.types import Prompt, SampleRequest

__all__ = [
    "Dataset",
    "PromptStream",
    "asked_text",
    "encode_answer",
    "load_dataset",
    "question_encoder",
    "reencode",
    "templated",
]


TOO_LONG, BEYOND, SAME_CONVERSATION = "too_long", "beyond_heldout_size", "same_conversation"
"""Reasons why prompts of a source are left out."""

ROWS_DROPPED = "rows_dropped"
"""Event of a run whose data has prompts that it leaves out."""


@dataclass(frozen=True)
class LeftOut:
    """Prompts of a source that a run does not use, for one reason."""

    reason: str
    count: int
    words: str
    """Their number, the setting that decides it, and the place of the first one."""


@dataclass(frozen=True)
class Dataset:
    """The prompts of a run."""

    train: list[Prompt]
    """Prompts to sample rollouts for."""
    heldout: list[Prompt]
    """Prompts for evaluation; no training prompt shares a `prompt_id` with them."""
    left_out: tuple[LeftOut, ...]
    """Prompts of the source that the run does not use, by reason; each reason has at least one."""
    grade: Grading | None
    """`grade(prompt, response)` returns True for a correct response; None if the prompts have no grader."""
    lines: tuple[str, ...] = ()
    """Descriptions for the user: format and columns, conversions, duplicates."""
    places: dict[int, str] = field(default_factory=dict)
    """Place of each prompt in its source, by prompt id."""

    @property
    def answers(self) -> dict[int, str]:
        """Reference answers by prompt id, of the prompts that have one."""
        return {prompt.prompt_id: prompt.answer for prompt in [*self.train, *self.heldout] if prompt.answer is not None}

    @property
    def dropped(self) -> int:
        """Number of prompts dropped as longer than `data.max_prompt_tokens`, training and held-out together."""
        return sum(each.count for each in self.left_out if each.reason == TOO_LONG)

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what there is to say about the data, as kinds of events and their fields."""
        for line in self.lines:
            yield "data", {"found": line}
        if self.left_out:
            counts = {each.reason: each.count for each in self.left_out}
            found = "; ".join(each.words for each in self.left_out)
            yield ROWS_DROPPED, {"total": sum(counts.values()), "counts": counts, "found": found}


SHARE_HELD_OUT = 5
"""Part of a small source that is held out by default, as a divisor."""


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

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the prompt ids at positions >= 0, both int64, as `at` does for one."""
        epochs, indices = np.divmod(positions, len(self._prompts))
        found = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            found[chosen] = self._prompt_ids[self._order(epoch)[indices[chosen]]]
        return found

    @cached_property
    def _prompt_ids(self) -> np.ndarray:
        return np.array([prompt.prompt_id for prompt in self._prompts], dtype=np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))


def load_dataset(
    config: Config, tokenizer: Any, prompts: Iterable[Any] | None = None, references: bool | None = None
) -> Dataset:
    """Load, check, tokenize and split the prompts that `data.prompts` names.

    `prompt_id` counts the prompts of the training source from 0, dropped ones included; if held-out prompts have a
    source of their own, its prompts continue the count. Of a held-out file or split, the first `data.heldout_size`
    prompts are used.

    Args: tokenizer: the student's. prompts: for `data.prompts.type: iterable`, texts or rows (dicts), finite. references:
          render the reference answers through the chat template; None if a phase of the run trains on them.
    Raises: DataError with file, line, setting and remedy.
    """
    source = config.data.prompts
    if (prompts is not None) != source.from_caller:
        raise DataError(
            "data.prompts.type=iterable takes its prompts from the caller: pass prompts=..., or choose another type"
            if prompts is None
            else f"prompts=... was passed, but data.prompts.type={source.type}; set data.prompts.type=iterable"
        )
    grade = grading_of(config)
    if prompts is None:
        table, heldout_table = _READERS[source.type](source, config)
    else:
        table, heldout_table = read_rows(_iterable_records(prompts), Columns(), "prompts", config.data.turns), None
    encode = Encoder(config, tokenizer, config.trains_on_references if references is None else references)
    encode.template.check_arguments()
    rows = _prepared(table.rows, config)
    encoded = encode(rows, first_id=0)
    lines = list(table.lines)
    places = {index: row.place for index, row in enumerate(rows)}
    if heldout_table is None:
        train, heldout, line, apart_from = _split(config, encoded, places)
        longer, others = encoded.dropped, [_same_conversation(apart_from, places)]
        lines += [line] if line is not None else []
    else:
        heldout_rows = _prepared(heldout_table.rows, config)
        apart = encode(heldout_rows, first_id=len(rows))
        places |= {len(rows) + index: row.place for index, row in enumerate(heldout_rows)}
        train, heldout = encoded.kept, apart.kept
        longer, others = [*encoded.dropped, *apart.dropped], [heldout_table.left_out]
        for name, part in (("training", encoded), ("held-out", apart)):
            if not part.kept:
                raise DataError(
                    f"data.max_prompt_tokens={config.data.max_prompt_tokens}: all {len(part.dropped)} {name} prompts are "
                    "longer and were dropped; raise it"
                )
    left_out = tuple(each for each in (_too_long(config, longer, places), *others) if each is not None)
    return Dataset(train, heldout, left_out, grade, (*lines, *_repeated(train, heldout)), places)


def _too_long(config: Config, longer: Sequence[Prompt], places: dict[int, str]) -> LeftOut | None:
    if not longer:
        return None
    limit = f"data.max_prompt_tokens={config.data.max_prompt_tokens}"
    first = places[longer[0].prompt_id]
    return LeftOut(TOO_LONG, len(longer), f"{len(longer)} prompts have more than {limit} tokens, the first: {first}")


def _same_conversation(turns: Sequence[Prompt], places: dict[int, str]) -> LeftOut | None:
    if not turns:
        return None
    words = f"{len(turns)} turns are of the conversation whose later ones are held out (data.turns=each)"
    return LeftOut(SAME_CONVERSATION, len(turns), f"{words}: {places[turns[0].prompt_id]}")


def _split(
    config: Config, encoded: Encoded, places: dict[int, str]
) -> tuple[list[Prompt], list[Prompt], str | None, list[Prompt]]:
    """Hold out the last prompts: (training, held-out, a line for the user, those that belong to neither).

    Raises: DataError if that leaves none to train on.
    """
    prompts = encoded.kept
    size, line = config.data.heldout_size, None
    if size is None:
        size = min(DEFAULT_HELDOUT, max(1, len(prompts) // SHARE_HELD_OUT))
        if size < DEFAULT_HELDOUT:
            line = f"held out: {size} of {len(prompts)} prompts, a fifth, since data.heldout_size is not set"
    if len(prompts) <= size:
        dropped = f" ({len(encoded.dropped)} more are too long)" if encoded.dropped else ""
        raise DataError(
            f"data.heldout_size={size} of {len(prompts)} prompts{dropped} leaves none to train on; lower "
            "data.heldout_size, or give more prompts"
        )
    heldout = prompts[-size:]
    # Turns of a conversation are prompts of one place: those before a held-out turn would tell what is asked.
    split = places[heldout[0].prompt_id]
    before = prompts[:-size]
    train = [prompt for prompt in before if config.data.turns != "each" or places[prompt.prompt_id] != split]
    if not train:
        raise DataError(
            f"data.heldout_size={size} of {len(prompts)} prompts leaves no whole conversation to train on; lower "
            "data.heldout_size, or give more conversations"
        )
    # The turns of a conversation are neighbours.
    return train, heldout, line, before[len(train) :]


def _repeated(train: Sequence[Prompt], heldout: Sequence[Prompt]) -> list[str]:
    """Lines that count prompts that occur more than once. They are kept: weighting by repetition may be meant."""
    seen = {prompt.token_ids.tobytes() for prompt in train}
    again, leaked = len(train) - len(seen), sum(prompt.token_ids.tobytes() in seen for prompt in heldout)
    lines = []
    if again:
        lines.append(f"duplicates: {again} of {len(train)} training prompts repeat another ({len(seen)} are different)")
    if leaked:
        lines.append(f"duplicates: {leaked} of {len(heldout)} held-out prompts are also trained on")
    return lines


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
        Row(f"prompt {prompt.prompt_id}, as the teacher reads it", question, None, template_kwargs=prompt.template_kwargs)
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    encoded = Encoder(config, tokenizer, any_length=True)(rows, first_id=0).kept
    return {prompt.prompt_id: again.token_ids for prompt, again in zip(prompts, encoded, strict=True)}


def question_encoder(config: Config, tokenizer: Any) -> Callable[[str], Prompt]:
    """Return a function that encodes a question of any length as a prompt, under the config's chat template.

    Its `prompt_id` is 0. Raises: DataError if the tokenizer has no chat template and needs one.
    """
    encode = Encoder(config, tokenizer, any_length=True)
    system = config.data.system_prompt

    def encoded(question: str) -> Prompt:
        row = Row("a question", question if system is None else with_system(question, system), None)
        return encode([row], first_id=0).kept[0]

    return encoded


def asked_text(
    config: Config, tokenizer: Any, prompts: Sequence[Prompt], chat: bool
) -> Callable[[SampleRequest], str | Messages]:
    """Return a function from a request to the text for a text-only teacher: the prompt's question, or that of a program's call.

    Args: chat: True if the teacher applies its own chat template; otherwise it gets the text after the student's template.
    """
    questions = {prompt.prompt_id: _sent(prompt.question) if chat else prompt.text for prompt in prompts}
    encode = question_encoder(config, tokenizer)

    def text(request: SampleRequest) -> str | Messages:
        if request.question is None:
            return questions[request.prompt_id]
        return request.question if chat else encode(request.question).text

    return text


def _sent(question: str | Messages) -> str | Messages:
    """A question as it is sent to an endpoint: without weights, which are for training alone."""
    if isinstance(question, str):
        return question
    return [{key: value for key, value in message.items() if key != "weight"} for message in question]


def response_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return an encoder of response text, which appends end-of-sequence. Special tokens in the text are treated as text."""

    def encoded(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [*ids, int(tokenizer.eos_token_id)]

    return encoded


# ------------------------------------------------------------------------------------------- sources -> records


@dataclass(frozen=True)
class Heldout:
    """Held-out rows of a source that has its own."""

    rows: list[Row]
    left_out: LeftOut | None = None


def _task_rows(source: TaskPrompts, config: Config) -> tuple[Table, Heldout]:
    """Generate (training, held-out) rows; held-out ones come first, so that they do not depend on `size`."""
    # Seeds distinct from other uses of the run's seed and from those of the examples that a tiny teacher trains on.
    streams = [int(word) for word in np.random.SeedSequence([config.run.seed, 0x6B6472]).generate_state(2, np.uint64)]
    size = _heldout_size(config)
    heldout = generate_examples([*source.tasks, *source.transfer_tasks], source.difficulty, size, streams[0])
    taken = frozenset(example.prompt for example in heldout)
    labelled = source.size if source.labelled is None else source.labelled
    train = generate_examples(source.tasks, source.difficulty, labelled, streams[1], exclude=taken, weights=source.weights)
    if labelled < source.size:
        # Generated apart, so that the labelled ones are the same whatever the number of the others.
        taken |= {example.prompt for example in train}
        rest = source.size - labelled
        train += generate_examples(source.tasks, source.difficulty, rest, streams[1] ^ 1, exclude=taken, weights=source.weights)
    made = [
        [Row(f"task prompt {index}", example.prompt, example.answer, example.task) for index, example in enumerate(examples)]
        for examples in (train, heldout)
    ]
    made[0][labelled:] = [replace(row, answer=None) for row in made[0][labelled:]]
    return Table(made[0], []), Heldout(made[1])


def _heldout_size(config: Config) -> int:
    """Number of held-out prompts of a source that has its own."""
    return DEFAULT_HELDOUT if config.data.heldout_size is None else config.data.heldout_size


def _file_rows(source: PromptFile, config: Config) -> tuple[Table, Heldout | None]:
    """Rows of a file and of its held-out file."""
    columns = Columns(source.prompt_column, source.answer_column, source.domain_column)

    def read(path: Path, setting: str) -> Table:
        records = file_records(path, setting, source.default_ending, columns.wanted)
        return read_rows(records, columns, str(path), config.data.turns)

    table = read(source.path, "data.prompts.path")
    if source.heldout_path is None:
        return table, None
    return table, _first(read(source.heldout_path, "data.prompts.heldout_path"), config, str(source.heldout_path))


def _hub_rows(source: HubPrompts, config: Config) -> tuple[Table, Heldout | None]:
    """Rows of a split and of the held-out split."""
    columns = Columns(source.prompt_column, source.answer_column, source.domain_column)

    def read(split: str, setting: str, place: str) -> Table:
        name, subset, revision = source.name, source.subset, source.revision
        records: Records = hub_records(name, subset, split, revision, f"data.prompts.{setting}", columns.wanted)
        return read_rows(records, columns, place, config.data.turns)

    table = read(source.split, "split", source.name)
    wanted = source.heldout_split
    if wanted is None:
        return table, None
    return table, _first(read(wanted, "heldout_split", f"{source.name} (split {wanted})"), config, f"the split {wanted}")


def _first(table: Table, config: Config, source: str) -> Heldout:
    """The held-out rows of a source of their own."""
    size = _heldout_size(config)
    if (more := len(table.rows) - size) <= 0:
        return Heldout(table.rows)
    words = f"{more} prompts of {source} are beyond its first {size} (data.heldout_size)"
    return Heldout(table.rows[:size], LeftOut(BEYOND, more, words))


_READERS: dict[str, Callable[[Any, Config], tuple[Table, Heldout | None]]] = {
    "task": _task_rows,
    "file": _file_rows,
    "jsonl": _file_rows,
    "parquet": _file_rows,
    "hub": _hub_rows,
}
"""Training rows, and held-out rows where a source has its own, by `data.prompts.type`."""


def _iterable_records(prompts: Iterable[Any]) -> Records:
    for index, item in enumerate(prompts):
        if not isinstance(item, str | dict):
            raise DataError(f"prompts[{index}]: expected a text or a dict, found {kind(item)}")
        yield f"prompts[{index}]", {"prompt": item} if isinstance(item, str) else item


def _prepared(rows: list[Row], config: Config) -> list[Row]:
    """Prepend `data.prefix` to the question of every row, and `data.system_prompt` to rows without a system message."""
    prefix, system = config.data.prefix, config.data.system_prompt

    def put(prompt: str | Messages) -> str | Messages:
        if isinstance(prompt, str):
            prompt = prefix + prompt
        elif prefix:
            prompt = [*prompt[:-1], {**prompt[-1], "content": prefix + prompt[-1]["content"]}]
        return prompt if system is None else with_system(prompt, system)

    return [replace(row, prompt=put(row.prompt)) for row in rows] if prefix or system is not None else rows
