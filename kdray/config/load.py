"""Loading of configs: a YAML recipe plus overrides from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdray.config import strict_yaml
from kdray.config.backends import backend_keys, with_backend
from kdray.config.base import BESIDE, SAVED
from kdray.config.explain import explain
from kdray.config.roles import role_keys
from kdray.config.run_config import Config
from kdray.config.shipped import recipe_named
from kdray.errors import ConfigError

_MAX_PROBLEMS = 20


def load_saved_config(path: Path, beside: Path | None = None) -> Config:
    """Read the config of a run that has begun, as `load_config` does without overrides, but by the sections' own rules alone.

    Rules across sections that are younger than the run neither hide its results nor keep it from being resumed by a config that
    meets them.
    """
    return _read(_content(path), str(path), (), {BESIDE: beside or path.parent, SAVED: True})


def read_saved_config(content: bytes, source: str) -> Config:
    """The same from the content of its file. Args: source: its place, for messages."""
    return _read(content, source, (), {SAVED: True})


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = (), beside: Path | None = None) -> Config:
    """Read a YAML recipe and apply `a.b=value` overrides (values are YAML).

    A relative path of something that is read counts from the working directory; if nothing is there, from `beside`.
    Args: beside: a folder; None for the recipe's own.
    Raises: ConfigError with file, setting, value and remedy.
    """
    path = Path(path)
    return _read(_content(path), str(path), overrides, {BESIDE: beside or path.parent})


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():
            if (path / "config.yaml").is_file():
                raise ConfigError(f"{path}: a run folder, not a config file; give {path / 'config.yaml'}")
            raise ConfigError(f"{path}: {'a folder, not a config file' if path.is_dir() else _absent(path)}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path!s:.100}: cannot be read: {error.strerror}") from error


def _absent(path: Path) -> str:
    name = recipe_named(str(path))
    return "no such config file" + ("" if name is None else f"; `kdray init {name}` writes the recipe of that name")


def _read(content: bytes, source: str, overrides: list[str] | tuple[str, ...], context: dict[str, Any]) -> Config:
    """Config of a recipe's content. Args: source: its place; context: of the validation. Raises: as `load_config`."""
    try:
        tree = strict_yaml.load(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected sections such as `run:` and `student:`, found {type(tree).__name__}")
    try:
        # Before the overrides, which may use the new names of the same settings.
        tree = {**tree, "training": with_backend(tree["training"])} if "training" in tree else tree
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return _validated(tree, f"{source} with the overrides" if overrides else source, context)


def parse_config(tree: dict[str, Any], source: str = "config", beside: Path | None = None) -> Config:
    """Validate a tree of plain values. Args: beside: as for `load_config`, or None for no such folder.

    Raises: ConfigError listing every problem, one per line.
    """
    return _validated(tree, source, {BESIDE: beside})


def _validated(tree: dict[str, Any], source: str, context: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree, context=context)
    except ValidationError as error:
        found = error.errors()
        lines = [explain(item, Config) for item in found[:_MAX_PROBLEMS]]
        if len(found) > _MAX_PROBLEMS:
            lines.append(f"{len(found) - _MAX_PROBLEMS} more")
        raise ConfigError(f"{source}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = tree
    parts = backend_keys(key.split("."))
    if parts[:2] == ["cluster", "roles"] and len(parts) > 2:
        parts[2:] = role_keys(parts[2:])
    *parents, leaf = parts
    if len(parents) > strict_yaml.MAX_DEPTH:
        raise ConfigError(f"override {override[:100]!r}: nested more than {strict_yaml.MAX_DEPTH} deep")
    for depth, part in enumerate(parents):
        if part in node and not isinstance(node[part], dict) and node[part] is not None:
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[leaf] = value
