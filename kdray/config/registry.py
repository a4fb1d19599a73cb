"""Kinds of settings by the name in `type`: those of this package, and those that installed distributions add.

A config names kinds and never code: a distribution registers a kind through an entry point of the registry's group, and a name
that nobody registered is refused. An entry point is loaded when a config asks for its name, so that what is installed and
unused costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import BeforeValidator

from kdray.config.base import Settings

T = TypeVar("T")

REGISTRIES: dict[str, Registry[Any]] = {}
"""Every registry by its entry-point group."""


@dataclass(frozen=True)
class Plugin:
    """A kind that an installed distribution adds."""

    group: str
    name: str
    distribution: str
    version: str


class Registry(Generic[T]):
    """Kinds of one sort, by name."""

    def __init__(self, group: str, noun: str) -> None:
        """Args: group: of the entry points, such as `kdray.losses`; noun: a kind in messages, such as `loss`."""
        self.group = group
        self.noun = noun
        self._builtin: dict[str, T] = {}
        self._loaded: dict[str, T] = {}
        REGISTRIES[group] = self

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator: register a kind of this package under `name`."""

        def register(kind: T) -> T:
            assert name not in self._builtin, f"{self.group}: {name} is registered twice"
            self._builtin[name] = kind
            return kind

        return register

    def names(self) -> list[str]:
        """Names of all kinds, built in and installed."""
        return sorted({*self._builtin, *self._installed()})

    def known(self) -> list[T]:
        """The kinds of this package, and those of others that were asked for."""
        return [*self._builtin.values(), *self._loaded.values()]

    def get(self, name: str) -> T:
        """The kind called `name`.

        Raises: ValueError with the nearest name where no installed distribution has it, where two have it, or where it cannot
        be loaded.
        """
        installed = self._installed().get(name, [])
        if len(installed) + (name in self._builtin) > 1:
            owners = ", ".join([*(["kdray"] if name in self._builtin else []), *(_distribution(each) for each in installed)])
            raise ValueError(f"{self.noun} {name!r} is registered by {owners}; uninstall all but one")
        if name in self._builtin:
            return self._builtin[name]
        if not installed:
            near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise ValueError(f"no {self.noun} is called {name!r:.200}; {hint}installed are {', '.join(self.names())}")
        if name not in self._loaded:
            self._loaded[name] = self._load(installed[0])
        return self._loaded[name]

    def plugins(self) -> list[Plugin]:
        """The kinds that installed distributions add, whether loaded or not."""
        return [
            Plugin(self.group, name, _distribution(each), "" if each.dist is None else each.dist.version)
            for name, found in sorted(self._installed().items())
            for each in found
        ]

    def _installed(self) -> Mapping[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            found.setdefault(point.name, []).append(point)
        return found

    def _load(self, point: EntryPoint) -> T:
        try:
            kind: T = point.load()
        # Whatever a module of others raises while it is imported.
        except Exception as error:
            raise ValueError(
                f"{self.noun} {point.name!r} of {_distribution(point)} cannot be loaded from {point.value}: "
                f"{type(error).__name__}: {error}; mend or uninstall it"
            ) from error
        return kind


class SettingsRegistry(Registry[type[Settings]]):
    """Kinds that are classes of settings: a value's `type` chooses one, which its other keys are then held against."""

    def __init__(self, group: str, noun: str, default: str | None = None) -> None:
        """Args: default: the kind of a value that names none; None where it must name one."""
        super().__init__(group, noun)
        self.default = default
        self.base: type[Settings] = Settings
        """What every kind derives from; see `root`."""

    def root(self, base: type[Settings]) -> type[Settings]:
        """Declare the class that every kind derives from, by which errors find the kinds again."""
        self.base = base
        base.kinds = self  # type: ignore[attr-defined]
        return base

    def member(self) -> BeforeValidator:
        """Validator of a field: a mapping becomes an instance of the kind that its `type` names."""
        return BeforeValidator(self.parse)

    def parse(self, value: Any) -> Any:
        """An instance of the kind that `value` names; what is no mapping is left to the field's own check.

        Raises: ValueError for an unknown kind; ValidationError where its settings are wrong.
        """
        if not isinstance(value, Mapping):
            return value
        name = value.get("type", self.default)
        if not isinstance(name, str):
            raise ValueError(f"`type` says which {self.noun} it is: one of {', '.join(self.names())}")
        return self.get(name).model_validate({**value, "type": name})

    def _load(self, point: EntryPoint) -> type[Settings]:
        kind = super()._load(point)
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise ValueError(
                f"{self.noun} {point.name!r} of {_distribution(point)}: {point.value} is no subclass of "
                f"{self.base.__module__}.{self.base.__qualname__}"
            )
        if kind.model_fields["type"].annotation.__args__ != (point.name,):  # type: ignore[union-attr]
            raise ValueError(
                f"{self.noun} {point.name!r} of {_distribution(point)}: declare its name in the class, "
                f"type: Literal[{point.name!r}]"
            )
        return kind


def all_plugins() -> Iterator[Plugin]:
    """Every kind that an installed distribution adds, of all registries."""
    for _, registry in sorted(REGISTRIES.items()):
        yield from registry.plugins()


def _distribution(point: EntryPoint) -> str:
    return "an unnamed distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"
