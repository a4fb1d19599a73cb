"""Context of a run: its config, what the checks found, where its models lie; the parts of a run are built from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdray.config import CaptureTeacherSettings, Config, HFTeacherSettings, ModelSource
from kdray.config.route import Route
from kdray.data.dataset import Dataset
from kdray.models.resolve import resolve_model
from kdray.types import Prompt


@dataclass(frozen=True)
class Models:
    """Folders or hub ids of the weights."""

    student: str
    teachers: dict[str, str]


@dataclass(frozen=True)
class Checked:
    """A config that passed the checks, with what they loaded; `kdray.checks.preflight.check` makes it."""

    config: Config
    route: Route
    tokenizer: Any
    """The student's tokenizer."""
    dataset: Dataset
    vocab_size: int
    """Ids that every teacher and the student share."""
    stop_ids: tuple[int, ...]
    """End-of-sequence ids of the student."""
    windows: list[Prompt] = field(default_factory=list)
    """Windows of pretraining text, where the config mixes some in."""
    lines: list[str] = field(default_factory=list)
    """Findings that a user should know, a line each."""

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt that may be asked for."""
        return [*self.dataset.train, *self.dataset.heldout]

    def with_models(self, models: Models | None = None) -> RunContext:
        """The run's context. Args: models: None to resolve the config's, which blocks while tiny ones are built."""
        return RunContext(**vars(self), models=resolve_models(self.config) if models is None else models)


@dataclass(frozen=True, kw_only=True)
class RunContext(Checked):
    """The same once its models are at hand."""

    models: Models


def resolve_models(config: Config) -> Models:
    """Build the tiny models, where the config asks for some."""
    cache = config.run.output / ".models"
    return Models(
        student=_absolute(resolve_model(config.student.model, cache)),
        teachers={name: _absolute(resolve_model(config.source(name)[0], cache)) for name in config.served_teachers}
        | {name: _absolute(resolve_model(model, cache)) for name, model in _other_models(config).items()},
    )


def _other_models(config: Config) -> dict[str, ModelSource]:
    """Models of teachers that no replica holds, as far as this run needs their weights."""
    found: dict[str, ModelSource] = {}
    for name, teacher in config.other_teachers.items():
        if isinstance(teacher, HFTeacherSettings):
            found[name] = teacher.model
        if isinstance(teacher, CaptureTeacherSettings) and teacher.model and config.rollout.teacher_signal == "hidden":
            found[name] = teacher.model
    return found


def _absolute(model: str) -> str:
    """Folders as absolute paths: replicas and ranks work in other folders."""
    return str(Path(model).absolute()) if Path(model).exists() else model
