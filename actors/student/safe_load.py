"""Weights-only unpickling of checkpoints, also inside libraries that would load arbitrary pickles."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdray.errors import TrainingError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_alone(*records: type) -> Iterator[None]:
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
