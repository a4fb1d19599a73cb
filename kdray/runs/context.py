"""Context of a run: its config, what the checks found, where its models lie; the parts of a run are built from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kdray.config import Config
from kdray.config.route import Route
from kdray.models.resolve import resolve_model
from kdray.teachers.kind import TeacherContext, kind_of
from kdray.types import Prompt


@dataclass(frozen=True)
class Models:
    """Folders or hub ids of the weights."""

    student: str
    teachers: dict[str, str]


@dataclass(frozen=True)
class Checked(TeacherContext):
    """A config that passed the checks, with what they loaded; `kdray.checks.preflight.check` makes it."""

    route: Route
    windows: list[Prompt] = field(default_factory=list)
    """Windows of pretraining text, where the config mixes some in."""
    lines: list[str] = field(default_factory=list)
    """Findings that a user should know, a line each."""

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
    teachers = {name: kind_of(config, name).model for name in config.teachers}
    return Models(
        student=_absolute(resolve_model(config.student.model, cache)),
        teachers={name: _absolute(resolve_model(found[0], cache)) for name, found in teachers.items() if found is not None},
    )


def _absolute(model: str) -> str:
    """Folders as absolute paths: replicas and ranks work in other folders."""
    return str(Path(model).absolute()) if Path(model).exists() else model
