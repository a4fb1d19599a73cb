"""Settings that a resumed run may change, and the changes between two configs.

Which these are is annotated at the fields themselves (`kdray.config.base.OnResume`), and for size and placement in
`kdray.config.roles`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from kdray.config.base import FormerDefault, OnResume, Settings
from kdray.config.roles import ENGINE_PLACE, TRAINING_PLACE
from kdray.config.run_config import Config

_PLACES = (
    *(f"training.{name}" for name in sorted(TRAINING_PLACE)),
    *(f"{engine}.{name}" for engine in ("teachers.*", "rollout.pool") for name in sorted(ENGINE_PLACE)),
)
_NOTHING = object()

SomeSettings = TypeVar("SomeSettings", bound=Settings)


@dataclass(frozen=True)
class Change:
    """Setting that differs between a run's config and the one that it is resumed with."""

    setting: str
    """Full name, such as training.learning_rate."""
    old: Any
    """None if it was absent."""
    new: Any
    """None if it is absent."""
    allowed: bool
    """True if a resumed run may change it."""


def changeable(config: Config) -> list[str]:
    """Return the settings that a resumed run may change, by full name, those of size and placement left out."""
    return sorted(_annotated(config, ""))


def as_begun(stored: SomeSettings, wanted: SomeSettings) -> SomeSettings:
    """Return `wanted` with the defaults that the stored config began with, where they have changed since.

    Only settings that `wanted` leaves at today's default take the stored value, and only if that is the former default.
    """
    changed: dict[str, Any] = {}
    for name, field in type(wanted).model_fields.items():
        before, now = getattr(stored, name, _NOTHING), getattr(wanted, name)
        if isinstance(now, Settings) and isinstance(before, Settings):
            if (section := as_begun(before, now)) is not now:
                changed[name] = section
        elif now == field.default:
            former = [each.value for each in field.metadata if isinstance(each, FormerDefault)]
            if before in former:
                changed[name] = before
    return wanted.model_copy(update=changed) if changed else wanted


def changes(stored: Config, wanted: Config) -> list[Change]:
    """Return the settings whose values differ, in the order of their names; a default that changed since is none."""
    wanted = as_begun(stored, wanted)
    free = {*changeable(stored), *changeable(wanted), *_PLACES}
    before, after = (_leaves(config.model_dump(mode="json")) for config in (stored, wanted))
    # A section without keys stands for its own absence where the other config has some in it.
    for one, other in ((before, after), (after, before)):
        for name in [name for name, value in one.items() if value == {} and any(_within(key, f"{name}.*") for key in other)]:
            del one[name]
        # A value that is not set likewise, where the other config has a section.
        for name in [name for name, value in one.items() if value is None and any(_within(key, f"{name}.*") for key in other)]:
            del one[name]
    return [
        Change(name, before.get(name), after.get(name), any(_within(name, each) for each in free))
        for name in sorted(before.keys() | after.keys())
        if before.get(name, _NOTHING) != after.get(name, _NOTHING)
    ]


def _annotated(settings: Settings, prefix: str) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        full, value = prefix + name, getattr(settings, name)
        marks = [each for each in field.metadata if isinstance(each, OnResume)]
        if marks:
            yield from (f"{full}.{key}" for mark in marks for key in mark.below) if marks[0].below else (full,)
        elif isinstance(value, Settings):
            yield from _annotated(value, f"{full}.")
        elif isinstance(value, Mapping):
            for key, each in value.items():
                if isinstance(each, Settings):
                    yield from _annotated(each, f"{full}.{key}.")


def _within(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten sections into dotted key -> value."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
