"""Building blocks of every section: strict models, and bounded number types."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


@dataclass(frozen=True)
class OnResume:
    """Annotation of a field that a resumed run may change, as in `Annotated[int, OnResume()]`; see `kdray.config.resuming`."""

    below: tuple[str, ...] = ()
    """Dotted keys below the field that may change; empty for the field as a whole."""


@dataclass(frozen=True)
class FormerDefault:
    """Annotation of a field whose default has changed, as in `Annotated[int | None, FormerDefault(256)]`.

    A run that began with the former default goes on with it (`kdray.config.resuming.as_begun`).
    """

    value: Any


def expanded(path: Path) -> Path:
    """The path with the home folder in place of `~`. Raises: ValueError if there is none."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}; give the path without `~`") from error


def is_loopback(host: str) -> bool:
    """True for an address that no packet leaves the machine for, going by its text alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


SAVED = "saved"
"""Key of a validation's context: true for the config of a run that has begun, whose sections met the rules of its day."""

BESIDE = "beside"
"""Key of a validation's context: folder where a relative path is looked for that leads nowhere from the working directory."""


def beside(path: Path, info: ValidationInfo) -> Path:
    """The path itself, or its place in the folder of `BESIDE` if only there is something."""
    folder = (info.context or {}).get(BESIDE)
    if folder is None or path.is_absolute():
        return path
    # A path that cannot even be asked for is refused by whoever reads it.
    with contextlib.suppress(OSError):
        if not path.exists() and (folder / path).exists():
            return Path(folder / path)
    return path


def at_home(name: str) -> str:
    """A name that may be a folder's, with the home folder in place of `~`. Raises: ValueError if there is none."""
    return str(expanded(Path(name))) if name.startswith("~") else name


HomePath = Annotated[str, AfterValidator(at_home)]
"""Name of something on a hub, or of a folder, in which `~` stands for the home folder."""

LocalPath = Annotated[Path, AfterValidator(expanded), AfterValidator(beside)]
"""Path of something that is read: `~` stands for the home folder; see also `beside`."""


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        # A rejected value may be a secret in the wrong place; messages quote values themselves where that is safe.
        hide_input_in_errors=True,
    )


def with_default_type(tree: Any, key: str, default: str) -> Any:
    """Return `tree` with the default `type` added to the union at `key` if only its other keys are given."""
    if isinstance(tree, dict) and isinstance(tree.get(key), dict):
        return {**tree, key: {"type": default} | tree[key]}
    return tree


def check_weights(setting: str, weights: Mapping[str, float] | None, names: Sequence[str]) -> None:
    """Raises: ValueError if weights name anything outside `names`, or are all zero."""
    if weights is None:
        return
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise ValueError(f"{setting} names {', '.join(unknown)}, but there are {', '.join(names)}")
    if not any(weights.values()):
        raise ValueError(f"{setting}: all are 0; give one of them a share")


def regular_expression(setting: str, value: str) -> re.Pattern[str]:
    """Compile the pattern. Raises: ValueError naming the setting and the fault."""
    try:
        return re.compile(value)
    # A repetition count can be too large, and groups can be nested too deeply.
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{setting}={value!r:.200}: not a regular expression: {error}") from error
