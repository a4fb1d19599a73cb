"""Where a model comes from: the hub, a folder, a recipe to build a small one, or a cut of a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from kdray.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Settings, check_weights
from kdray.config.data import TextSource
from kdray.config.tasks import LessonName


class TinyTraining(Settings):
    """Supervised training that turns a tiny model into a teacher, in seconds on a CPU."""

    tasks: list[LessonName] = Field(default=["last_letters"], min_length=1)
    """Tasks to learn, and stages of System-2 programs."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Share of each task in a batch, in proportion; None is equal ones. What has a small share is learned badly."""
    difficulty: Positive = 2
    """As in `data.prompts.difficulty`."""
    steps: Positive = 600
    """Optimizer steps."""
    batch_size: Positive = 128
    """Examples a step."""
    learning_rate: PositiveFloat = 3e-3
    """Peak AdamW learning rate, with a short warm-up and cosine decay."""

    @model_validator(mode="after")
    def _shares(self) -> TinyTraining:
        check_weights("train.weights", self.weights, self.tasks)
        return self


class TinyModel(Settings):
    """A small Llama over characters, built on the spot (and kept in `<output>/.models`): for recipes that run anywhere."""

    type: Literal["tiny"]
    layers: Positive = 2
    """Transformer layers."""
    width: Positive = 64
    """Hidden size; a multiple of 32, the size of an attention head (the smallest that vLLM has on CPUs)."""
    tie_embeddings: bool = False
    """Whether input and output embeddings share one matrix."""
    max_positions: Positive = 512
    """Longest sequence, in tokens."""
    vocab_rows: Positive | None = None
    """Rows of the embedding when more than the tokenizer has, as real model families pad theirs."""
    seed: NonNegative = 0
    """Seed of the initial weights and of the training examples."""
    train: TinyTraining | None = None
    """Training that the model gets before the run; None leaves it random."""

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


UnprunedSource = Annotated[
    Annotated[str, Tag("path")] | Annotated[TinyModel, Tag("tiny")],
    Discriminator(
        _model_tag,
        custom_error_type="model_source",
        custom_error_message="expected a folder, a hub id, or a section with `type: tiny`",
    ),
]


class Calibration(Settings):
    """Texts that the source reads before it is cut, to rank neurons and heads by what they add on these."""

    source: TextSource
    """Where documents come from; the keys depend on `type`: jsonl, parquet, hub, task."""
    documents: Positive = 128
    """How many of them to read, the first ones."""
    tokens: Positive = 512
    """Tokens of each to read, from its start."""


class PrunedModel(Settings):
    """Layers, neurons and heads of a larger model as the start of a smaller one (kept in `<output>/.models`).

    What is not set stays as it is in the source; the hidden size and the vocabulary always do.
    """

    type: Literal["pruned"]
    source: UnprunedSource
    """Hugging Face id, local folder, or tiny model to cut: a Llama, Mistral, Qwen2 or Qwen3 with plain weights."""
    revision: str | None = None
    """Commit or tag of the source on the hub."""
    layers: Annotated[int, Field(ge=2)] | Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Layers to keep: how many, evenly spaced with the first and the last among them, or which, counted from 0, ascending."""
    intermediate_size: Positive | None = None
    """Neurons of each feed-forward block to keep, the most important ones."""
    num_key_value_heads: Positive | None = None
    """Key-value heads of each attention block to keep, each with all its query heads, the most important ones."""
    calibration: Calibration | None = None
    """Texts on which importance is measured; None ranks by the norms of weights, which need no data and find less."""


ModelSource = Annotated[
    Annotated[str, Tag("path")] | Annotated[TinyModel, Tag("tiny")] | Annotated[PrunedModel, Tag("pruned")],
    Discriminator(
        _model_tag,
        custom_error_type="model_source",
        custom_error_message="expected a folder, a hub id, or a section with `type: tiny` or `type: pruned`",
    ),
]


class StudentSettings(Settings):
    model: ModelSource
    """Hugging Face id, local folder, a tiny model to build (`type: tiny`), or a part of a larger one (`type: pruned`)."""
    revision: str | None = None
    """Commit or tag on the hub."""
