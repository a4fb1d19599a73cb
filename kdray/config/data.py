"""Sources of prompts, held-out prompts and plain text, and what to do with prompts that are too long."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdray.config.base import (
    FormerDefault,
    HomePath,
    LocalPath,
    NonNegativeFloat,
    OnResume,
    Positive,
    Settings,
    check_weights,
    with_default_type,
)
from kdray.config.graders import GraderSource
from kdray.config.tasks import TaskName

DEFAULT_HELDOUT = 256
"""Held-out prompts where `data.heldout_size` is not set, and there are enough."""


class PromptSettings(Settings):
    """A source of prompts."""

    type: str
    """Name of the source; a subclass narrows it to a `Literal` of its own."""
    from_caller: ClassVar[bool] = False
    """The prompts are passed by the caller of `run`, and are in no file."""
    local: ClassVar[bool] = True
    """The prompts are generated or stored on this machine: they can be read again offline."""

    @property
    def graded_tasks(self) -> list[str]:
        """Generated tasks that the prompts come from; each grades its own prompts."""
        return []


class TaskPrompts(PromptSettings):
    """Generated questions with an exact grader; no file, no network."""

    type: Literal["task"] = "task"
    tasks: list[TaskName] = Field(default=["last_letters"], min_length=1)
    """Tasks to draw from, in equal shares unless `weights` says otherwise."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Relative share of each task in training prompts; None makes them equal. Held-out prompts always have equal shares."""
    transfer_tasks: list[TaskName] = Field(default=[])
    """Tasks that are only held out, never trained on. They share the held-out prompts with `tasks`; the report separates them
    by domain."""
    size: Positive = 4096
    """Number of training prompts, all different if the task has that many."""
    labelled: Positive | None = None
    """Number of training prompts that have their reference answer: few labels, many questions. Supervised phases train on these
    alone; they are the prompts that a source of that `size` would have. None: all of them."""
    difficulty: Positive = 2
    """Size of a question. Words to concatenate (`last_letters` and the other tasks of letters); people around the coin
    (`coin_flip`); digits of each of the two numbers (`arithmetic`, `multiplication`); digits to add up, each a step of the
    answer (`running_sum`, `spelled_sum`); a pile of at most 4 x difficulty + 3 (`subtraction_game`)."""

    @model_validator(mode="after")
    def _shares(self) -> TaskPrompts:
        check_weights("data.prompts.weights", self.weights, self.tasks)
        both = sorted(set(self.tasks) & set(self.transfer_tasks))
        if both:
            raise ValueError(f"data.prompts.transfer_tasks: {', '.join(both)} would be trained on; name it once")
        if self.labelled is not None and self.labelled > self.size:
            raise ValueError(
                f"data.prompts.labelled={self.labelled} is more than data.prompts.size={self.size}; lower it, or raise size"
            )
        return self

    @property
    def graded_tasks(self) -> list[str]:
        return list(dict.fromkeys([*self.tasks, *self.transfer_tasks]))


class PromptFile(PromptSettings):
    """A file of rows in the format that its name says: `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` or `.parquet`; text formats
    may be compressed (`.gz`, `.bz2`, `.zst`)."""

    default_ending: ClassVar[str] = ""
    """Ending that a file with another name is taken to have; "" refuses it."""

    path: LocalPath
    """The file; `~` is the home folder, and relative paths are resolved from the directory in which the command was started."""
    prompt_column: str | None = None
    """Column of the prompt: a text, or a list of chat messages. Default: chosen by the first row (docs/data.md); `kdray data`
    shows it."""
    answer_column: str | None = None
    """Column of the reference answer: a text, a number, or chat messages. Default: `answer`, `completion`, `response`, `output`
    or `solution`, if present; of chat messages, the assistant's last turn."""
    domain_column: str | None = None
    """Column of the prompt's domain, used by `rollout.teachers` and for metrics by domain."""
    heldout_path: LocalPath | None = None
    """A file of held-out prompts; without it, the last `data.heldout_size` prompts are held out."""


class FilePrompts(PromptFile):
    """A file whose name says its format."""

    type: Literal["file"]


class JsonlPrompts(PromptFile):
    """A file with one JSON object per line, unless its name says otherwise."""

    default_ending = ".jsonl"

    type: Literal["jsonl"]


class ParquetPrompts(PromptFile):
    """A Parquet file, or a folder of them, unless the name says otherwise."""

    default_ending = ".parquet"

    type: Literal["parquet"]


class HubPrompts(PromptSettings):
    """A dataset on the Hugging Face hub (or in its local cache), loaded by the `datasets` library."""

    local = False

    type: Literal["hub"]
    name: HomePath
    """Dataset id, such as `openai/gsm8k`, or a folder of the dataset's files; `~` is the home folder."""
    subset: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split to train on."""
    heldout_split: str | None = None
    """Split of the held-out prompts; without it, the last `data.heldout_size` prompts are held out."""
    revision: Annotated[str | None, OnResume()] = None
    """Commit or tag, for reproducibility. A resume may set it, to the same data as its checkpoint recorded."""
    prompt_column: str | None = None
    """Column of the prompt; default as for files."""
    answer_column: str | None = None
    """Column of the reference answer; default as for files."""
    domain_column: str | None = None
    """Column of the prompt's domain; as for files."""


class IterablePrompts(PromptSettings):
    """Prompts passed by the caller of `kdray.run(config, prompts=...)`; not usable from a file alone."""

    from_caller = True
    local = False

    type: Literal["iterable"]


PromptSource = Annotated[
    TaskPrompts | FilePrompts | JsonlPrompts | ParquetPrompts | HubPrompts | IterablePrompts, Field(discriminator="type")
]


class TaskText(Settings):
    """Solved examples of the generated tasks, one per document; no file, no network."""

    type: Literal["task"] = "task"
    tasks: list[TaskName] = Field(default=["arithmetic"], min_length=1)
    """Tasks to draw from, in equal shares."""
    size: Positive = 2048
    """Number of documents, all different."""
    difficulty: Positive = 2
    """As in `data.prompts.difficulty`."""


class JsonlText(Settings):
    """A file with one JSON object per line, each holding one document."""

    type: Literal["jsonl"]
    path: LocalPath
    """The file; relative paths are resolved from the directory in which the command was started."""
    column: str = "text"
    """Key of the document."""


class ParquetText(Settings):
    """A Parquet file, or a folder of them, one document per row."""

    type: Literal["parquet"]
    path: LocalPath
    """The file or folder."""
    column: str = "text"
    """Column of the document."""


class HubText(Settings):
    """A dataset on the Hugging Face hub (or in its local cache), one document per row."""

    type: Literal["hub"]
    name: str
    """Dataset id."""
    subset: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split to read."""
    revision: Annotated[str | None, OnResume()] = None
    """Commit or tag, for reproducibility. A resume may set it, to the same data as its checkpoint recorded."""
    column: str = "text"
    """Column of the document."""


TextSource = Annotated[TaskText | JsonlText | ParquetText | HubText, Field(discriminator="type")]


class DataSettings(Settings):
    prompts: PromptSource = TaskPrompts()
    """Source of prompts; the keys depend on `type`: task, file, jsonl, parquet, hub, iterable."""
    grader: GraderSource = None
    """Comparison of a response with the reference answer: exact, last_number, regex, multiple_choice, math, or a grader of
    another distribution; the keys depend on `type`, and a bare name suffices for a grader without any. `exact_match` is then
    measured, and `rollout.filters.correct` and `agreement` use the grader. None: generated tasks grade themselves, and other
    prompts are not graded."""
    prefix: str = ""
    """Text put before every prompt, training and held-out, such as `[label] ` to let a student tell tasks apart. In chat
    messages it is put before the last one."""
    heldout_size: Annotated[Positive | None, FormerDefault(DEFAULT_HELDOUT)] = None
    """Number of prompts kept out of training, on which the student is measured before and after. None: 256, or a fifth of the
    prompts of a source that has no held-out prompts of its own, whichever is less."""
    max_prompt_tokens: Positive = 256
    """Maximum prompt length, tokens."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """Handling of longer prompts: `refuse` stops at start with their number, `drop` leaves them out and reports their number. A
    prompt is never truncated."""
    turns: Literal["last", "all", "each"] = "last"
    """Turns of an assistant in a conversation that are learned. `last`: the conversation up to its last turn is a prompt, and
    that turn the reference answer. `all`: the same, but supervised phases and `rollout.data_share` train on the earlier turns
    too. `each`: every turn is the answer of a prompt of its own."""
    system_prompt: str | None = None
    """System message put before every prompt that has none; text prompts then become chat messages."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Arguments of the student's chat template, such as `enable_thinking: false`. A row's own, in a column
    `chat_template_kwargs`, override them; a column `tools` is passed as tools."""
    chat_template_file: LocalPath | None = None
    """File with a chat template (Jinja), in place of the one of the student's tokenizer."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Wrap text prompts as a user message with the student tokenizer's chat template: `auto` does so if the tokenizer has one.
    Chat messages always require one."""

    @model_validator(mode="before")
    @classmethod
    def _default_type(cls, tree: Any) -> Any:
        return with_default_type(tree, "prompts", "task")

    @model_validator(mode="after")
    def _one_way_to_prompt(self) -> DataSettings:
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise ValueError("system_prompt: is blank; write one, or remove the setting")
        if self.system_prompt is not None and self.chat_template == "never":
            raise ValueError("system_prompt needs a chat template, and chat_template=never; set chat_template=auto")
        return self
