"""Reference of all settings, docs/settings.md, from the sections' classes and the docstrings of their fields.

`make settings` writes it; tests/unit/whole/test_docs.py checks that it is current.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kdray.config import Config
from kdray.config.registry import kinds_of

PAGE = Path(__file__).parent / "settings.md"

_HEAD = """# Settings

Every setting of a recipe, made by `make settings` from the docstrings of `kdray/config/`: edit those. A recipe holds only what
differs from the defaults; `kdray validate RECIPE` prints every setting as it resolves. Behind the recipe's path, a setting is
named with its section, as in `training.steps=50`. Sections that have a `type` take the keys of that kind; installed
distributions may add kinds, whose keys are not here ([extending.md](extending.md)). What a resumed run may change is in
[architecture.md](architecture.md#what-a-resume-needs).
"""
_NAMES = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Any: "any value", NoneType: "`null`"}
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def page() -> str:
    """The page as it has to be now."""
    return "\n".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    # Each class is described once, where it comes first.
    paths: dict[type[BaseModel], str] = {}
    waiting = _inside("", Config)
    while waiting:
        path, model = waiting.pop(0)
        if model not in paths:
            paths[model] = path
            # What a section holds comes right behind it.
            waiting = _inside(f"{path}.", model) + waiting
    # Rows of a path, by the kind that showed them first: those that its other kinds share are not repeated.
    shown: dict[str, dict[str, str]] = {}
    for model, path in paths.items():
        elsewhere = {inner: paths[each] for inner, each in _inside(f"{path}.", model) if paths[each] != inner}
        yield _section(path, model, shown.setdefault(path, {}), elsewhere)


def _inside(prefix: str, model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Sections inside a section, with their paths."""
    return [
        (f"{prefix}{name}{_key(field.annotation)}", each)
        for name, field in model.model_fields.items()
        for each in _models(field.annotation)
    ]


def _section(path: str, model: type[BaseModel], shown: dict[str, str], elsewhere: Mapping[str, str]) -> str:
    """Args: shown: rows of the path's other kinds; elsewhere: sections inside this one -> the path where they are described."""
    kind = _kind(model)
    lines = [f"## {path}: type {kind}" if kind else f"## {path}", ""]
    if text := _said(model):
        lines += [text, ""]
    rows, shared = [], defaultdict[str, list[str]](list)
    for name, field in model.model_fields.items():
        row = f"| `{name}` | {_type(field)} | {_default(field)} | {_line(field.description or '')} |"
        if row in shown:
            shared[shown[row]].append(f"`{name}`")
        elif name != "type":
            rows.append(row)
            shown[row] = kind
    if rows:
        lines += ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    lines += [f"As for type {other}: {', '.join(names)}." for other, names in shared.items()]
    lines += [f"`{inner}` has the keys of `{described}`." for inner, described in elsewhere.items()]
    if shared or elsewhere:
        lines.append("")
    elif not rows:
        lines += ["No keys but `type`.", ""]
    return "\n".join(lines)


def _said(model: type[BaseModel]) -> str:
    """The docstring of the class itself."""
    return _line(inspect.cleandoc(model.__dict__.get("__doc__") or ""))


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _kind(model: type[BaseModel]) -> str:
    """The section's `type`; empty where it has none."""
    field = model.model_fields.get("type")
    names = get_args(field.annotation) if field is not None else ()
    return str(names[0]) if names else ""


def _key(annotation: Any) -> str:
    """What stands behind a setting's name to reach a value inside it."""
    origins = {get_origin(each) for each in _alternatives(annotation)}
    return ".NAME" if origins & {dict, Mapping} else "[N]" if list in origins else ""


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, also of a nested one, without their annotations."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [each for member in get_args(annotation) for each in _alternatives(member)]
    return [annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Sections that a value may hold, those of installed distributions apart."""
    found: list[type[BaseModel]] = []
    for each in _alternatives(annotation):
        if isinstance(each, type) and issubclass(each, BaseModel):
            kinds: list[type[BaseModel]] = [*kinds_of(each)]
            found += [kind for kind in kinds or [each] if kind.__module__.startswith("kdray.")]
        else:
            found += [model for inner in get_args(each) for model in _models(inner)]
    return found


def _type(field: FieldInfo) -> str:
    return _line(_shape(field.annotation) + _bounds(field.metadata))


def _shape(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return _shape(inner) + _bounds(metadata)
    if get_origin(annotation) in (Union, UnionType):
        # Of sections, their `type` says which one it is.
        return " or ".join(dict.fromkeys(map(_shape, get_args(annotation))))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_yaml(each)}`" for each in get_args(annotation))
    if get_origin(annotation) in (list, tuple, set, frozenset):
        return f"list of {_shape(get_args(annotation)[0])}"
    if get_origin(annotation) in (dict, Mapping):
        return f"{_shape(get_args(annotation)[1])} by name"
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return "section"
        if issubclass(annotation, PurePath):
            return "path"
    return _NAMES.get(annotation, str(annotation))


def _bounds(metadata: Any) -> str:
    """Limits among a type's annotations, such as ` > 0`."""
    flat = [inner for each in metadata for inner in (each.metadata if isinstance(each, FieldInfo) else [each])]
    found = [f"{sign} {getattr(each, name):g}" for each in flat for name, sign in _BOUNDS.items() if hasattr(each, name)]
    return f" {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return ""
    return _line(f"`{_yaml(_plain(value))}`")


def _plain(value: Any) -> Any:
    """A default as a recipe would say it: of a section what differs from its own defaults, and its `type`."""
    if isinstance(value, BaseModel):
        kind = {"type": value.type} if hasattr(value, "type") else {}
        return kind | value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, PurePath) else value


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
