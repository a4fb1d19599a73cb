"""Ray label selectors: conditions on the nodes where a part of the run may be placed."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""Label that Ray sets on every node with a known accelerator."""

_VALUE = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_CONDITION = re.compile(rf"!?(in\({_VALUE}(, ?{_VALUE})*\)|{_VALUE})")
_KEY = re.compile(rf"({_VALUE}/)?{_VALUE}")


def _checked(labels: dict[str, str]) -> dict[str, str]:
    for key, condition in labels.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"labels: {key!r} is no label of a Ray node, such as market-type or example.com/rack")
        if not _CONDITION.fullmatch(condition):
            raise ValueError(f"labels.{key}={condition!r}: write `value`, `!value`, `in(a, b)` or `!in(a, b)`")
    # Ray accepts a space in a list, but then matches no node by the values after it (2.60).
    return {key: condition.replace(", ", ",") for key, condition in labels.items()}


LabelSelector = Annotated[dict[str, str], AfterValidator(_checked)]
"""Node label -> required value: `value`, `!value`, `in(a, b)` or `!in(a, b)`."""
