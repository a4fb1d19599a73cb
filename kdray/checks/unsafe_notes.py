"""Warnings about settings that go beyond kdray's allow lists (`unsafe_engine_args`, `untried_models` and others), by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kdray.config import Config, EngineSettings


def unsafe_notes(config: Config) -> Iterator[str]:
    """Yield a line for every setting that holds such arguments."""
    engines: dict[str, EngineSettings] = {f"teachers.{name}": each for name, each in config.served_teachers.items()}
    for section, engine in {"rollout.pool": config.rollout.pool, **engines}.items():
        yield from _note(f"{section}.unsafe_engine_args", engine.unsafe_engine_args)
    yield from _note("training.backend.unsafe_options", config.training.backend.unsafe)
    for name, teacher in config.teachers.items():
        if teacher.key_in_clear:
            yield f"teachers.{name}.unsafe_http: its key may be read on the way"
    for kind in config.run.untried_models:
        yield (
            f"run.untried_models: {kind}: nobody has compared what vLLM computes for it with transformers; the student is "
            "compared with the replicas as ever, a teacher is not"
        )


def _note(setting: str, given: Mapping[str, Any]) -> Iterator[str]:
    if given:
        names = ", ".join(sorted(given))
        yield f"{setting}: {names}: not checked by kdray; may run code, and may make records or training wrong"
