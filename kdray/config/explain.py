"""Pydantic's validation errors in the user's words: setting, value and remedy."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel

from kdray.config.teachers import TeacherSource

_MAX_SHOWN = 200


def explain(item: Any, root: type[BaseModel]) -> str:
    """One pydantic error as setting, value and remedy. Args: root: the model that was validated."""
    location = _written_keys(root, item["loc"], keep_last=item["type"] == "extra_forbidden")
    setting = ".".join(location)
    kind = item["type"]
    if kind == "extra_forbidden":
        known = _keys_at(root, tuple(location[:-1]))
        if location[-1] in known:
            return f"{setting}: a key of another `type` than the one chosen; remove it, or choose that one"
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(known)}"
        return f"{setting}: unknown key; {hint}"
    if kind == "missing":
        return f"{setting}: required, but not set"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return message if not setting or message.startswith(setting) else f"{setting}: {message}"
    message = item["msg"][0].lower() + item["msg"][1:]
    if kind.startswith("union_tag") or isinstance(item.get("input"), dict):
        return f"{setting}: {message}"
    return f"{setting}={_shown(item.get('input'))}: {message}"


def _shown(value: Any) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _written_keys(root: type[BaseModel], location: tuple[int | str, ...], keep_last: bool) -> list[str]:
    """The keys that the user wrote, out of a location of pydantic's, which names the members of unions too.

    Args: keep_last: whether the last part is a key that no model knows.
    """
    models: list[type[BaseModel]] = [root]
    keys = []
    for depth, part in enumerate(location):
        known = [model for model in models if part in model.model_fields or model is TeachersMap]
        if known:
            models = _models_below(known, str(part))
        elif not isinstance(part, int) and not (keep_last and depth == len(location) - 1):
            continue
        keys.append(str(part))
    return keys


def _keys_at(root: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    """Names of the settings that the section at `location` knows; over all members where the section is a union."""
    models: list[type[BaseModel]] = [root]
    for part in location:
        models = _models_below(models, part)
    return sorted({name for model in models for name in model.model_fields if model is not TeachersMap})


def _models_below(models: list[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    following: list[type[BaseModel]] = []
    for model in models:
        if model is TeachersMap:
            following += _models_in(TeacherSource)
        elif key in model.model_fields:
            following += _models_in(model.model_fields[key].annotation)
    return following


class TeachersMap(BaseModel):
    """Stands for the map of teachers in `_keys_at`: any name leads to the kinds of teacher."""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        # The class that a registry's kinds derive from stands for all of them.
        registry = vars(annotation).get("kinds")
        return [annotation] if registry is None else registry.known()
    arguments = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) is dict:
        return [TeachersMap]
    return [model for argument in arguments for model in _models_in(argument)]
