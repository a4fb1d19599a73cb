"""Kinds of settings by the name in `type`: those of this package, and those that installed distributions add.

A config names kinds and never code: a distribution registers a kind through an entry point of the registry's group, and a name
that nobody registered is refused. An entry point is loaded when a config asks for its name, so that what is installed and
unused costs nothing.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar, cast, get_args

from pydantic import BeforeValidator, GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from kdray.config.base import Settings

_LONGEST = 100
"""Characters of a name that are compared with the known ones."""

T = TypeVar("T")
S = TypeVar("S", bound=Settings)
Base = TypeVar("Base", bound=Settings)
Kind = TypeVar("Kind")

REGISTRIES: dict[str, Registry[Any]] = {}
"""Every registry by its entry-point group."""


@dataclass(frozen=True)
class NameOf:
    """Metadata of a field that holds the name of a kind, by which it is checked: `Annotated[str, NameOf(TASKS)]`."""

    registry: Registry[Any]
    beside: tuple[str, ...] = ()
    """Further names that the field takes."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, name: str) -> str:
        try:
            self.registry.check(name, self.beside)
        except ValueError as error:
            raise ValueError(f"={name!r:.200}: {error}") from error
        return name


@dataclass(frozen=True)
class Plugin:
    """A kind that an installed distribution adds."""

    group: str
    name: str
    distribution: str
    version: str


class Registry(Generic[T]):
    """Kinds of one sort, by name."""

    def __init__(self, group: str, noun: str, references: Mapping[str, str] | None = None, verbs: Sequence[str] = ()) -> None:
        """Args: group: of the entry points, such as `kdray.losses`; noun: a kind in messages, such as `loss`.

        references: kinds of this package as an entry point would name them, `module:name`, imported when they are asked for;
        verbs: methods that a kind of another distribution has to have.
        """
        self.group = group
        self.noun = noun
        self._verbs = verbs
        self._references = dict(references or {})
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
        return sorted({*self._builtin, *self._references, *self._installed()})

    def known(self) -> list[T]:
        """The kinds of this package, and those of others that were asked for."""
        return [*self._builtin.values(), *self._loaded.values()]

    def get(self, name: str) -> T:
        """The kind called `name`.

        Raises: ValueError with the nearest name where no installed distribution has it, where two have it, or where it cannot
        be loaded.
        """
        installed = self._installed().get(name, [])
        ours = name in self._builtin or name in self._references
        if len(installed) + ours > 1:
            owners = ", ".join([*(["kdray"] if ours else []), *(_distribution(each) for each in installed)])
            raise ValueError(f"{self.noun} {name!r} is registered by {owners}; uninstall all but one")
        if name in self._references and name not in self._builtin:
            self._builtin[name] = resolve_name(self._references[name])
        if ours:
            return self._builtin[name]
        if not installed:
            raise ValueError(self._unknown(name, self.names()))
        if name not in self._loaded:
            self._loaded[name] = self._load(installed[0])
        return self._loaded[name]

    def check(self, name: str, beside: Sequence[str] = ()) -> None:
        """Make sure that `get` finds the name, or that it is one of `beside`; a kind of this package is not imported for it.

        Raises: ValueError as `get` does.
        """
        known = [*self.names(), *beside]
        if name not in known:
            raise ValueError(self._unknown(name, known))
        if name in self._installed():
            self.get(name)

    def _unknown(self, name: str, known: Sequence[str]) -> str:
        near = difflib.get_close_matches(name[:_LONGEST], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`? " if near else ""
        return f"no installed {self.noun} has this name; {hint}there are {', '.join(known)}"

    def plugins(self) -> list[Plugin]:
        """The kinds that installed distributions add, whether loaded or not."""
        return [
            Plugin(self.group, name, *(("", "") if each.dist is None else (each.dist.name, each.dist.version)))
            for name, found in sorted(self._installed().items())
            for each in found
        ]

    def _installed(self) -> Mapping[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in _entry_points(tuple(sys.path), self.group):
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
        lacking = [verb for verb in self._verbs if not callable(getattr(kind, verb, None))]
        if lacking:
            raise ValueError(
                f"{self.noun} {point.name!r} of {_distribution(point)}: {point.value} has no method {', '.join(lacking)}"
            )
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

    def member(self, short: bool = False) -> BeforeValidator:
        """Validator of a field: a mapping becomes an instance of the kind that its `type` names.

        Args: short: a text is a kind's name, and stands for a mapping that holds nothing else.
        """
        return BeforeValidator(self._parse_short if short else self._parse)

    def _parse_short(self, value: Any, info: ValidationInfo) -> Any:
        return self.parse({"type": value} if isinstance(value, str) else value, info.context)

    def _parse(self, value: Any, info: ValidationInfo) -> Any:
        return self.parse(value, info.context)

    def parse(self, value: Any, context: Any = None) -> Any:
        """An instance of the kind that `value` names; what is no mapping is left to the field's own check.

        Args: context: of the validation that the value is part of.
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
        return kind.model_validate({**value, "type": name}, context=context)

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


@lru_cache(maxsize=64)
def _entry_points(path: tuple[str, ...], group: str) -> EntryPoints:
    """A group of what is installed on a `sys.path`. Reading it takes as long as parsing a config, which asks a dozen times."""
    return entry_points(group=group)


def _distribution(point: EntryPoint) -> str:
    return "an unnamed distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"
