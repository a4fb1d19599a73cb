"""Sources of prompts, held-out prompts and plain text, and what to do with prompts that are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdray.config.base import NonNegativeFloat, Positive, Settings, check_weights, with_default_type
from kdray.config.graders import GraderSource
from kdray.config.tasks import TaskName


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
    difficulty: Positive = 2
    """Words to concatenate, people around the coin, or digits of each number."""

    @model_validator(mode="after")
    def _shares(self) -> TaskPrompts:
        check_weights("data.prompts.weights", self.weights, self.tasks)
        both = sorted(set(self.tasks) & set(self.transfer_tasks))
        if both:
            raise ValueError(f"data.prompts.transfer_tasks: {', '.join(both)} would be trained on; name it once")
        return self

    @property
    def graded_tasks(self) -> list[str]:
        return list(dict.fromkeys([*self.tasks, *self.transfer_tasks]))


class JsonlPrompts(PromptSettings):
    """A file with one JSON object per line."""

    type: Literal["jsonl"]
    path: Path
    """The file; relative paths are resolved from the directory in which the command was started."""
    prompt_column: str | None = None
    """Key of the prompt: a text, or a list of chat messages. Default: `prompt`, `question`, `instruction` or `messages`,
    whichever the first line has."""
    answer_column: str | None = None
    """Key of the reference answer. Default: `answer`, `completion`, `response` or `output`, if present."""
    domain_column: str | None = None
    """Key of the prompt's domain, used by `rollout.teachers` and for metrics by domain."""
    heldout_path: Path | None = None
    """A file of held-out prompts; without it, the last `data.heldout_size` prompts are held out."""


class ParquetPrompts(PromptSettings):
    """A Parquet file, or a folder of them."""

    type: Literal["parquet"]
    path: Path
    """The file or folder."""
    prompt_column: str | None = None
    """Column of the prompt; defaults as for JSONL."""
    answer_column: str | None = None
    """Column of the reference answer; defaults as for JSONL."""
    domain_column: str | None = None
    """Column of the prompt's domain; as for JSONL."""
    heldout_path: Path | None = None
    """A file or folder of held-out prompts; without it, the last `data.heldout_size` prompts are held out."""


class HubPrompts(PromptSettings):
    """A dataset on the Hugging Face hub (or in its local cache), loaded by the `datasets` library."""

    local = False

    type: Literal["hub"]
    name: str
    """Dataset id, such as `openai/gsm8k`."""
    subset: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split to train on."""
    heldout_split: str | None = None
    """Split of the held-out prompts; without it, the last `data.heldout_size` prompts are held out."""
    revision: str | None = None
    """Commit or tag, for reproducibility."""
    prompt_column: str | None = None
    """Column of the prompt; defaults as for JSONL."""
    answer_column: str | None = None
    """Column of the reference answer; defaults as for JSONL."""
    domain_column: str | None = None
    """Column of the prompt's domain; as for JSONL."""


class IterablePrompts(PromptSettings):
    """Prompts passed by the caller of `cluster.launch.run(config, prompts=...)`; not usable from a file alone."""

    from_caller = True
    local = False

    type: Literal["iterable"]


PromptSource = Annotated[
    TaskPrompts | JsonlPrompts | ParquetPrompts | HubPrompts | IterablePrompts, Field(discriminator="type")
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
    path: Path
    """The file; relative paths are resolved from the directory in which the command was started."""
    column: str = "text"
    """Key of the document."""


class ParquetText(Settings):
    """A Parquet file, or a folder of them, one document per row."""

    type: Literal["parquet"]
    path: Path
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
    revision: str | None = None
    """Commit or tag, for reproducibility."""
    column: str = "text"
    """Column of the document."""


TextSource = Annotated[TaskText | JsonlText | ParquetText | HubText, Field(discriminator="type")]


class DataSettings(Settings):
    prompts: PromptSource = TaskPrompts()
    """Source of prompts; the keys depend on `type`: task, jsonl, parquet, hub, iterable."""
    grader: GraderSource = None
    """Comparison of a response with the reference answer: exact, last_number, regex, multiple_choice, or a grader of another
    distribution; the keys depend on `type`, and a bare name suffices for a grader without any. `exact_match` is then measured,
    and `rollout.filters.correct` and `agreement` use the grader. None: generated tasks grade themselves, other prompts are not
    graded."""
    prefix: str = ""
    """Text put before every prompt, training and held-out, such as `[label] ` to let a student tell tasks apart. In chat
    messages it is put before the last one."""
    heldout_size: Positive = 256
    """Number of prompts kept out of training, on which the student is measured before and after."""
    max_prompt_tokens: Positive = 256
    """Maximum prompt length, tokens."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """Handling of longer prompts: `refuse` stops at start with their number, `drop` leaves them out and reports their number. A
    prompt is never truncated."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Wrap text prompts as a user message with the student tokenizer's chat template: `auto` does so if the tokenizer has one.
    Chat messages always require one."""

    @model_validator(mode="before")
    @classmethod
    def _default_type(cls, tree: Any) -> Any:
        return with_default_type(tree, "prompts", "task")
