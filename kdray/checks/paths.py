"""Files and models that a config names; the files are looked for before anything is loaded or started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kdray.config import Config
from kdray.errors import DataError


def check_files(config: Config) -> None:
    """Check that every file and folder is there that the run reads. Raises: DataError with setting, value and remedy."""
    for keys, path in read_paths(config):
        # Secrets are files of other machines, too, and are checked where they are read.
        if keys[0] == "cluster":
            continue
        setting = ".".join(keys)
        try:
            found = path.exists()
        except OSError as error:
            raise DataError(f"{setting}={path!s:.100}: {error.strerror}; name another file") from error
        if not found:
            raise DataError(
                f"{setting}={path}: no such file or folder (relative paths count from {Path.cwd()}); set {setting}=PATH"
            )


def read_paths(config: Config) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yield every path that the config reads from, with the keys that lead to it."""
    for keys, value in _leaves(config, ()):
        if isinstance(value, Path) and keys != ("run", "output"):
            yield keys, value


def named_models(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every model that is a folder or a hub id, with the keys that lead to it."""
    for keys, value in _leaves(config, ()):
        # A remote teacher's model is a name at its endpoint.
        ours = keys[0] != "teachers" or not config.teachers[keys[1]].remote
        if isinstance(value, str) and ours and (keys[-1] == "model" or keys[-2:] == ("model", "source")):
            yield keys, value


def _leaves(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), (*keys, name))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, (*keys, str(name)))
    else:
        yield keys, value
