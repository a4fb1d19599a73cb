"""Model sources: the hub, a folder, a recipe for a small model, or a pruned larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, model_validator

from kdray.config.base import (
    NonNegative,
    NonNegativeFloat,
    OnResume,
    Positive,
    PositiveFloat,
    Settings,
    beside,
    check_weights,
    expanded,
)
from kdray.config.data import TextSource
from kdray.config.tasks import LessonName


class TinyTraining(Settings):
    """Supervised training that turns a tiny model into a teacher, in seconds on a CPU."""

    tasks: list[LessonName] = Field(default=["last_letters"], min_length=1)
    """Tasks to learn, and stages of System-2 programs."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Relative share of each task in a batch; None makes them equal. A task with a small share is learned badly."""
    difficulty: Positive = 2
    """As in `data.prompts.difficulty`: words, people, digits, or a fourth of the pile, by task. A stage counts as its task."""
    steps: Positive = 600
    """Optimizer steps."""
    batch_size: Positive = 128
    """Examples per step."""
    learning_rate: PositiveFloat = 3e-3
    """Peak AdamW learning rate, with a short warm-up and cosine decay."""

    @model_validator(mode="after")
    def _shares(self) -> TinyTraining:
        check_weights("train.weights", self.weights, self.tasks)
        return self


class TinyModel(Settings):
    """A small character-level Llama, built on first use (and kept in `<output>/.models`): for recipes that run anywhere."""

    type: Literal["tiny"]
    layers: Positive = 2
    """Transformer layers."""
    width: Positive = 64
    """Hidden size; a multiple of 32, the head size (the smallest that vLLM supports on CPUs)."""
    tie_embeddings: bool = False
    """Share one matrix between input and output embeddings."""
    max_positions: Positive = 512
    """Maximum sequence length, tokens."""
    vocab_rows: Positive | None = None
    """Rows of the embedding if more than the tokenizer needs, as real model families pad theirs."""
    seed: NonNegative = 0
    """Seed of the initial weights and of the training examples."""
    train: TinyTraining | None = None
    """Training of the model before the run; None leaves it randomly initialised."""

    @model_validator(mode="after")
    def _whole_heads(self) -> TinyModel:
        if self.width % 32:
            raise ValueError(f"width={self.width}: attention heads have 32 channels; choose a multiple of 32")
        return self


def _model_tag(value: Any) -> str | None:
    if isinstance(value, str | Path):
        return "path"
    tag = value.get("type", "tiny") if isinstance(value, dict) else getattr(value, "type", None)
    return tag if isinstance(tag, str) else None


def _folder(model: str, info: ValidationInfo) -> str:
    """A folder where the config's other paths are, too; hub ids and what is no path stay as they are."""
    found = beside(expanded(Path(model)), info)
    return model if found == Path(model) else str(found)


_ModelPath = Annotated[str, AfterValidator(_folder), Tag("path")]

UnprunedSource = Annotated[
    _ModelPath | Annotated[TinyModel, Tag("tiny")],
    Discriminator(
        _model_tag,
        custom_error_type="model_source",
        custom_error_message="expected a folder, a hub id, or a section with `type: tiny`",
    ),
]


class Calibration(Settings):
    """Texts on which neurons and heads of the source are ranked by importance before pruning."""

    source: TextSource
    """Source of documents; the keys depend on `type`: jsonl, parquet, hub, task."""
    documents: Positive = 128
    """Number of documents to read, from the first."""
    tokens: Positive = 512
    """Tokens to read of each document, from its start."""


class PrunedModel(Settings):
    """A larger model with some of its layers, neurons and heads removed (kept in `<output>/.models`).

    Unset dimensions stay as in the source, as hidden size and vocabulary always do.
    """

    type: Literal["pruned"]
    source: UnprunedSource
    """Hugging Face id, local folder or tiny model to prune: a Llama, Mistral, Qwen2 or Qwen3 with unquantised weights."""
    revision: Annotated[str | None, OnResume()] = None
    """Commit or tag of the source on the hub. A resume may set it to the commit that its checkpoint recorded."""
    layers: Annotated[int, Field(ge=2)] | Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Layers to keep: their number, evenly spaced and including the first and last, or their indices, counted from 0,
    ascending."""
    intermediate_size: Positive | None = None
    """Neurons to keep in each feed-forward block; the most important ones."""
    num_key_value_heads: Positive | None = None
    """Key-value heads to keep in each attention block, each with all its query heads; the most important ones."""
    calibration: Calibration | None = None
    """Texts on which importance is measured; None ranks by weight norms, which need no data and are less accurate."""


ModelSource = Annotated[
    _ModelPath | Annotated[TinyModel, Tag("tiny")] | Annotated[PrunedModel, Tag("pruned")],
    Discriminator(
        _model_tag,
        custom_error_type="model_source",
        custom_error_message="expected a folder, a hub id, or a section with `type: tiny` or `type: pruned`",
    ),
]


class StudentSettings(Settings):
    model: ModelSource
    """Hugging Face id, local folder, a tiny model to build (`type: tiny`), or a pruned larger model (`type: pruned`)."""
    revision: Annotated[str | None, OnResume()] = None
    """Commit or tag on the hub. A resume may set it to the commit that its checkpoint recorded."""
