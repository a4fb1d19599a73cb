"""Pydantic's validation errors, translated to setting, value and remedy."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel

from kdray.config.registry import kinds_of

_MAX_SHOWN = 200
_NO_SECTION = ("model_type", "model_attributes_type")


def explain(item: Any, root: type[BaseModel]) -> str:
    """Render a pydantic error as setting, value and remedy. Args: root: the model that was validated."""
    location = _written_keys(root, item["loc"], keep_last=item["type"] == "extra_forbidden")
    setting = ".".join(location)
    kind = item["type"]
    if kind == "extra_forbidden":
        known = _keys_at(root, tuple(location[:-1]))
        if location[-1] in known:
            return f"{setting}: a key of another `type` than the one chosen; remove it, or choose that one"
        return f"{setting}: unknown key; {_hint(root, location, known)}"
    if kind == "missing":
        return f"{setting}: required, but not set"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        if message.startswith((".", "=")):
            # The message begins with a key below the setting, or with its value.
            return f"{setting}{message}"
        return message if not setting or message.startswith(setting) else f"{setting}: {message}"
    message = item["msg"][0].lower() + item["msg"][1:]
    value = item.get("input")
    if kind in _NO_SECTION and isinstance(value, str) and "type" in _keys_at(root, tuple(location)):
        return f"{setting}={_shown(value)}: a section, not a value; write {setting}.type={value:.{_MAX_SHOWN}}"
    if kind == "list_type" and isinstance(value, str):
        message += f"; write {setting}='[{value:.{_MAX_SHOWN}}]'"
    if kind.startswith("union_tag") or isinstance(item.get("input"), dict):
        return f"{setting}: {message}"
    return f"{setting}={_shown(item.get('input'))}: {message}"


def _hint(root: type[BaseModel], location: list[str], known: list[str]) -> str:
    """What an unknown key may have been meant as. Args: known: the keys of its section."""
    key = location[-1]
    # `lr` is no misspelling of anything, and its letters begin the words of one key.
    short = [name for name in known if "_" in name and "".join(word[:1] for word in name.split("_")) == key]
    near = short or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean `{near[0]}`?"
    if len(location) == 1:
        inside = [f"{section}.{key}" for section in known if key in _keys_at(root, (section,))]
        if inside:
            return f"did you mean {' or '.join(f'`{name}`' for name in inside)}?"
    return f"valid keys: {', '.join(known)}"


def _shown(value: Any) -> str:
    """Render a value for a message, truncated."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _written_keys(root: type[BaseModel], location: tuple[int | str, ...], keep_last: bool) -> list[str]:
    """Reduce a pydantic location, which also names union members, to the keys that the user wrote.

    Args: keep_last: the last part is an unknown key, and is kept.
    """
    models: list[type[BaseModel]] = [root]
    keys = []
    for depth, part in enumerate(location):
        known = [model for model in models if part in model.model_fields or issubclass(model, _AnyName)]
        if known:
            models = _models_below(known, str(part))
        elif not isinstance(part, int) and not (keep_last and depth == len(location) - 1):
            continue
        keys.append(str(part))
    return keys


def _keys_at(root: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    """Names of the settings in the section at `location`; over all members if the section is a union."""
    models: list[type[BaseModel]] = [root]
    for part in location:
        models = _models_below(models, part)
    return sorted({name for model in models for name in model.model_fields})


def _models_below(models: list[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    following: list[type[BaseModel]] = []
    for model in models:
        if issubclass(model, _AnyName):
            following += model.values
        elif key in model.model_fields:
            following += _models_in(model.model_fields[key].annotation)
    return following


class _AnyName(BaseModel):
    """Placeholder for a mapping in `_keys_at`: every key leads to the models of its values."""

    values: ClassVar[list[type[BaseModel]]]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [*kinds_of(annotation)] or [annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return [type("_Map", (_AnyName,), {"values": _models_in(arguments[1]), "__annotations__": {}})]
    return [model for argument in arguments for model in _models_in(argument)]
