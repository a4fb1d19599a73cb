"""Plugins used by a config, and the objects that implement settings of any kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any, get_args

from kdray.config.base import Settings
from kdray.config.registry import REGISTRIES, NameOf, Plugin, SettingsRegistry
from kdray.errors import ConfigError


def implemented(settings: Any) -> Any:
    """Build the object that implements the settings: their `implementation`, `module:name`, called with the settings.

    Raises: ConfigError if it cannot be loaded, or rejects its settings.
    """
    try:
        return resolve_name(settings.implementation)(settings)
    # Third-party code may raise anything while it is imported or constructed.
    except Exception as error:
        (noun,) = (registry.noun for registry in _registries_of(settings))
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{noun} {settings.type!r}: {settings.implementation} cannot be made of its settings: {reason}"
        ) from error


def plugins_of(settings: Settings) -> list[Plugin]:
    """The plugins that a config, or a part of one, uses, without duplicates."""
    installed = {(plugin.group, plugin.name): plugin for registry in REGISTRIES.values() for plugin in registry.plugins()}
    used = dict.fromkeys(kind for kind in _kinds(settings) if kind in installed)
    return [installed[kind] for kind in sorted(used)]


def versions_of(settings: Settings) -> dict[str, str]:
    """Version of every distribution whose plugins a config uses."""
    return {plugin.distribution: plugin.version for plugin in plugins_of(settings)}


def _kinds(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (group, name) of every kind in a value of a config."""
    yield from ((registry.group, value.type) for registry in _registries_of(value))
    if isinstance(value, Settings):
        for name, field in type(value).model_fields.items():
            held = getattr(value, name)
            for marker in _markers(field.annotation) + [each for each in field.metadata if isinstance(each, NameOf)]:
                yield from ((marker.registry.group, text) for text in _texts(held))
            yield from _kinds(held)
    elif isinstance(value, Mapping):
        for held in value.values():
            yield from _kinds(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _kinds(held)


def _registries_of(value: Any) -> Iterator[SettingsRegistry]:
    """Yield the registry of a value's kind, if it is a kind."""
    for registry in REGISTRIES.values():
        if isinstance(registry, SettingsRegistry) and registry.base is not Settings and isinstance(value, registry.base):
            yield registry


def _markers(annotation: Any) -> list[NameOf]:
    """Markers by which texts inside a field are names of kinds."""
    found = [each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, NameOf)]
    return found + [marker for part in get_args(annotation) for marker in _markers(part)]


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]
