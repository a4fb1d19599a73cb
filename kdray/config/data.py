"""Prompts, held-out prompts, plain text: where they come from and what may be too long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdray.config.base import NonNegativeFloat, Positive, Settings, check_weights, with_default_type
from kdray.config.graders import GraderSource
from kdray.config.tasks import TaskName


class PromptSettings(Settings):
    """A source of prompts."""

    @property
    def graded_tasks(self) -> list[str]:
        """Generated tasks that the prompts come from, each of which grades its own."""
        return []


class TaskPrompts(PromptSettings):
    """Generated questions with an exact grader; no file, no network."""

    type: Literal["task"] = "task"
    tasks: list[TaskName] = Field(default=["last_letters"], min_length=1)
    """Tasks to draw from, in equal shares unless `weights` says otherwise."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Share of each task in training prompts, in proportion; None is equal ones. Held-out prompts have equal shares."""
    transfer_tasks: list[TaskName] = Field(default=[])
    """Tasks that are held out alone, never trained on: they share the held-out prompts with `tasks`, and the report tells them
    apart by domain."""
    size: Positive = 4096
    """Number of training prompts, all different where the task has that many."""
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
    """A file with one JSON object a line."""

    type: Literal["jsonl"]
    path: Path
    """The file; a relative path counts from the folder the command was started in."""
    prompt_column: str | None = None
    """Key that holds the prompt: a text, or a list of chat messages. Default: `prompt`, `question`, `instruction` or
    `messages`, whichever the first line has."""
    answer_column: str | None = None
    """Key that holds the reference answer. Default: `answer`, `completion`, `response` or `output`, where present."""
    domain_column: str | None = None
    """Key that says what a prompt is about, for `rollout.teachers` and for metrics by domain."""
    heldout_path: Path | None = None
    """A file of held-out prompts; without it the last `data.heldout_size` prompts are held out."""


class ParquetPrompts(PromptSettings):
    """A Parquet file, or a folder of them."""

    type: Literal["parquet"]
    path: Path
    """The file or folder."""
    prompt_column: str | None = None
    """Column that holds the prompt; defaults as for JSONL."""
    answer_column: str | None = None
    """Column that holds the reference answer; defaults as for JSONL."""
    domain_column: str | None = None
    """Column that says what a prompt is about; as for JSONL."""
    heldout_path: Path | None = None
    """A file or folder of held-out prompts; without it the last `data.heldout_size` prompts are held out."""


class HubPrompts(PromptSettings):
    """A dataset on the Hugging Face hub (or in its local cache), loaded by the `datasets` library."""

    type: Literal["hub"]
    name: str
    """Dataset id, such as `openai/gsm8k`."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split to train on."""
    heldout_split: str | None = None
    """Split of the held-out prompts; without it the last `data.heldout_size` prompts are held out."""
    revision: str | None = None
    """Commit or tag, so that a run can be repeated."""
    prompt_column: str | None = None
    """Column that holds the prompt; defaults as for JSONL."""
    answer_column: str | None = None
    """Column that holds the reference answer; defaults as for JSONL."""
    domain_column: str | None = None
    """Column that says what a prompt is about; as for JSONL."""


class IterablePrompts(PromptSettings):
    """Prompts handed over by the caller of `cluster.launch.run(config, prompts=...)`; not usable from a file alone."""

    type: Literal["iterable"]


PromptSource = Annotated[
    TaskPrompts | JsonlPrompts | ParquetPrompts | HubPrompts | IterablePrompts, Field(discriminator="type")
]


class TaskText(Settings):
    """Solved examples of the generated tasks, one a document; no file, no network."""

    type: Literal["task"] = "task"
    tasks: list[TaskName] = Field(default=["arithmetic"], min_length=1)
    """Tasks to draw from, in equal shares."""
    size: Positive = 2048
    """Number of documents, all different."""
    difficulty: Positive = 2
    """As in `data.prompts.difficulty`."""


class JsonlText(Settings):
    """A file with one JSON object a line, each holding one document."""

    type: Literal["jsonl"]
    path: Path
    """The file; a relative path counts from the folder the command was started in."""
    column: str = "text"
    """Key that holds the document."""


class ParquetText(Settings):
    """A Parquet file, or a folder of them, one document a row."""

    type: Literal["parquet"]
    path: Path
    """The file or folder."""
    column: str = "text"
    """Column that holds the document."""


class HubText(Settings):
    """A dataset on the Hugging Face hub (or in its local cache), one document a row."""

    type: Literal["hub"]
    name: str
    """Dataset id."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit or tag, so that a run can be repeated."""
    column: str = "text"
    """Column that holds the document."""


TextSource = Annotated[TaskText | JsonlText | ParquetText | HubText, Field(discriminator="type")]


class DataSettings(Settings):
    prompts: PromptSource = TaskPrompts()
    """Where prompts come from; the keys depend on `type`: task, jsonl, parquet, hub, iterable."""
    grader: GraderSource = None
    """How a response is held against the reference answer: exact, last_number, regex, multiple_choice, or one of an installed
    distribution; the keys depend on `type`, and a name alone will do where there are none. `exact_match` is then measured, and
    `rollout.filters.correct` and `agreement` go by it. None: generated tasks grade themselves, other prompts are not graded."""
    prefix: str = ""
    """Text before every prompt, training and held-out, such as `[label] ` where a student is to tell tasks apart. Of chat
    messages the last one begins with it."""
    heldout_size: Positive = 256
    """Prompts kept out of training, on which before and after are measured."""
    max_prompt_tokens: Positive = 256
    """Longest prompt, in tokens."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a longer prompt: `refuse` stops at start with the count, `drop` leaves it out and reports the count.
    A prompt is never cut."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether a text prompt is wrapped as a user message by the student tokenizer's chat template: `auto` where it has one.
    Chat messages always need one."""

    @model_validator(mode="before")
    @classmethod
    def _default_type(cls, tree: Any) -> Any:
        return with_default_type(tree, "prompts", "task")
