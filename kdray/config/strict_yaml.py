"""Strict YAML loading: plain values only, and an error for anything that the author probably did not mean.

Rejected in addition to what PyYAML's safe loader rejects: duplicate keys (the first would be lost), tags, aliases that expand
to more than a config can hold, unbounded nesting, and characters that no file, name or terminal can represent.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 64
_MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0
        self._sizes: dict[int, int] = {}
        """Number of values below an existing node, with aliases expanded, by the node's identity."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _refused(f"the tag {event.tag}: a config holds plain values; remove it", event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(f"nested more than {MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._sizes and isinstance(event, yaml.AliasEvent):
            raise _refused("an alias of what it stands in", event)
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[id(node)] = self._size(node)
        if self._sizes[id(node)] > _MAX_VALUES:
            raise _refused(f"more than {_MAX_VALUES} values, every alias counted as what it stands for", event)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        try:
            number = int(super().construct_yaml_int(node))
        except ValueError as error:
            raise _refused(f"no whole number: {node.value[:20]}", node) from error
        if not -(2**63) <= number < 2**64:
            raise _refused("a number of more than 64 bits", node)
        return number

    def _size(self, node: Any) -> int:
        if isinstance(node, yaml.ScalarNode):
            for character in node.value:
                if character == "\0" or "\ud800" <= character <= "\udfff":
                    what = "a zero byte" if character == "\0" else f"{character!r}, half of a character"
                    raise _refused(f"a text with {what}; remove it", node)
            return 1
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(self._sizes[id(item)] for item in node.value)
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            # There may be several merge keys (<<), and explicit keys take precedence over them, as YAML specifies.
            if (key.tag, key.value) in keys and key.tag != "tag:yaml.org,2002:merge":
                raise _refused(f"{key.value} stands there twice; keep one of them", key)
            keys.add((key.tag, key.value))
        return 1 + sum(self._sizes[id(key)] + self._sizes[id(value)] for key, value in node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refused(what: str, place: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=place.start_mark)


def load(text: str) -> Any:
    """Parse a YAML text. Raises: yaml.YAMLError with the fault and its position."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    # YAML accepts a 13th month or an endless number of minutes as a scalar, but neither has a value.
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()
