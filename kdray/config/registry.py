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
from typing import Any, Generic, TypeVar, cast, get_args

from pydantic import BeforeValidator

from kdray.config.base import Settings

T = TypeVar("T")
S = TypeVar("S", bound=Settings)
Base = TypeVar("Base", bound=Settings)
Kind = TypeVar("Kind")

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

    def add(self, name: str) -> Callable[[Kind], Kind]:
        """Decorator: register a kind of this package under `name`."""

        def register(kind: Kind) -> Kind:
            assert name not in self._builtin, f"{self.group}: {name} is registered twice"
            self._builtin[name] = cast(T, kind)
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
            raise ValueError(f"no installed {self.noun} has this name; {hint}there are {', '.join(self.names())}")
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


class SettingsRegistry(Registry[type[S]]):
    """Kinds that are classes of settings: a value's `type` chooses one, which its other keys are then held against."""

    def __init__(self, group: str, noun: str, default: str | None = None) -> None:
        """Args: default: the kind of a value that names none; None where it must name one."""
        super().__init__(group, noun)
        self.default = default
        self.base: type[Settings] = Settings
        """The class that every kind derives from; see `root`."""

    def root(self, base: type[Base]) -> type[Base]:
        """Decorator: declare the class that every kind derives from."""
        self.base = base
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
            raise ValueError(f".type: not given; it says which {self.noun} it is: one of {', '.join(self.names())}")
        try:
            kind = self.get(name)
        except ValueError as error:
            raise ValueError(f".type={name!r:.200}: {error}") from error
        return kind.model_validate({**value, "type": name})

    def _load(self, point: EntryPoint) -> type[S]:
        kind = super()._load(point)
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise ValueError(
                f"{self.noun} {point.name!r} of {_distribution(point)}: {point.value} is no subclass of "
                f"{self.base.__module__}.{self.base.__qualname__}"
            )
        if get_args(kind.model_fields["type"].annotation) != (point.name,):
            raise ValueError(
                f"{self.noun} {point.name!r} of {_distribution(point)}: declare its name in the class, "
                f"type: Literal[{point.name!r}]"
            )
        return kind


def name_of(kind: type[Settings]) -> str:
    """The `type` of a kind, as its class declares it."""
    return str(get_args(kind.model_fields["type"].annotation)[0])


def kinds_of(base: type[Any]) -> list[type[Settings]]:
    """The known kinds of which `base` is the common class; none where it is no such class."""
    found = (each for each in REGISTRIES.values() if isinstance(each, SettingsRegistry) and each.base is base)
    return [kind for registry in found for kind in registry.known()]


def all_plugins() -> Iterator[Plugin]:
    """Every kind that an installed distribution adds, of all registries."""
    for _, registry in sorted(REGISTRIES.items()):
        yield from registry.plugins()


def _distribution(point: EntryPoint) -> str:
    return "an unnamed distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"
