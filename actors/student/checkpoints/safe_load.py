"""Weights-only unpickling of checkpoints, also inside libraries that would load arbitrary pickles; and what such files hold."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch

from kdray.errors import TrainingError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only(*records: type) -> Iterator[None]:
    """Restrict every `torch.load` inside to tensors, plain values and instances of `records`, without calling anything else.

    Raises: TrainingError if a file contains anything else; none of it has been executed by then.
    """
    # A library may request full unpickling by argument; torch's own environment variable overrides that.
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(records)):
            yield
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"a checkpoint holds more than tensors and plain values: {str(error).splitlines()[0]}; "
            "nothing of it was run; restore it from a copy that this run wrote"
        ) from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def plain_values(tree: Any) -> Any:
    """Return nested dicts, lists and tuples with every enum member replaced by its value; other objects are shared, unchanged.

    For what is about to be pickled: Python 3.11 up to 3.11.3 pickles an enum member as a call of `getattr`, which no
    weights-only loading admits.
    """
    if isinstance(tree, Enum):
        return tree.value
    if isinstance(tree, dict):
        changed = {key: new for key, value in tree.items() if (new := plain_values(value)) is not value}
        if not changed:
            return tree
        # A copy of the same type: state dicts carry attributes.
        copied = copy.copy(tree)
        copied.update(changed)
        return copied
    if type(tree) in (list, tuple):
        values = [plain_values(value) for value in tree]
        return tree if all(new is old for new, old in zip(values, tree, strict=True)) else type(tree)(values)
    return tree
