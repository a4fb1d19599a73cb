"""Loading of configs: a YAML recipe plus overrides from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdray.config import strict_yaml
from kdray.config.backends import backend_keys, with_backend
from kdray.config.base import BESIDE
from kdray.config.explain import explain
from kdray.config.roles import role_keys
from kdray.config.run_config import Config
from kdray.config.shipped import recipe_named
from kdray.errors import ConfigError

_MAX_PROBLEMS = 20


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = (), beside: Path | None = None) -> Config:
    """Read a YAML recipe and apply `a.b=value` overrides (values are YAML).

    A relative path of something that is read counts from the working directory; if nothing is there, from `beside`.
    Args: beside: a folder; None for the recipe's own.
    Raises: ConfigError with file, setting, value and remedy.
    """
    path = Path(path)
    try:
        if not path.is_file():
            if (path / "config.yaml").is_file():
                raise ConfigError(f"{path}: a run folder, not a config file; give {path / 'config.yaml'}")
            raise ConfigError(f"{path}: {'a folder, not a config file' if path.is_dir() else _absent(path)}")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path!s:.100}: cannot be read: {error.strerror}") from error
    return read_config(content, str(path), overrides, beside or path.parent)


def _absent(path: Path) -> str:
    name = recipe_named(str(path))
    return "no such config file" + ("" if name is None else f"; `kdray init {name}` writes the recipe of that name")


def read_config(content: bytes, source: str, overrides: list[str] | tuple[str, ...] = (), beside: Path | None = None) -> Config:
    """Read the content of a recipe. Args: source: its place, for messages; beside: as for `parse_config`.

    Raises: as `load_config`.
    """
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
    return parse_config(tree, f"{source} with the overrides" if overrides else source, beside)


def parse_config(tree: dict[str, Any], source: str = "config", beside: Path | None = None) -> Config:
    """Validate a tree of plain values. Args: beside: as for `load_config`, or None for no such folder.

    Raises: ConfigError listing every problem, one per line.
    """
    try:
        return Config.model_validate(tree, context={BESIDE: beside})
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
