"""Allow lists of settings that are passed through to another library: a name that is not listed is refused, whatever it does.

A config comes from others and is run on a cluster. Libraries have settings that import a class by its name, read a file of
code or write to any path, and new ones with every version; a list of those known to be harmless stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

Allowed = Mapping[str, Any]
"""Name -> type of its value, as an annotation; or a further mapping of names, for a value that is a mapping itself."""


def check_allowed(setting: str, given: Mapping[str, Any], allowed: Allowed, why_not: Callable[[str], str]) -> None:
    """Check that every name is allowed, and its value of the type listed.

    Args: setting: name for the message, such as `engine_args`; why_not: reason and remedy for a dotted name not listed.
    Raises: ValueError naming the setting.
    """
    _check(setting, "", given, allowed, why_not)


def _check(setting: str, above: str, given: Mapping[str, Any], allowed: Allowed, why_not: Callable[[str], str]) -> None:
    for name, value in given.items():
        path = f"{above}{name}"
        if name not in allowed:
            raise ValueError(f"{setting}.{path:.80}: not free to set; {why_not(path)}")
        expected = allowed[name]
        if isinstance(expected, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(f"{setting}.{path}={value!r:.50}: expected settings, of {', '.join(expected)}")
            _check(setting, f"{path}.", value, expected, why_not)
            continue
        try:
            TypeAdapter(expected).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"{setting}.{path}={value!r:.50}: {error.errors()[0]['msg']}") from error
