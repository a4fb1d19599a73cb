"""DeepSpeed's checkpoints are pickles, which it opens whatever they hold: here they hold what is listed, or are refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdray.errors import TrainingError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_alone() -> Iterator[None]:
    """Every `torch.load` inside gives tensors, plain values and DeepSpeed's own records of them, and calls nothing else.

    Raises: TrainingError where a file names anything beyond; nothing of it has run then.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # DeepSpeed asks for everything by argument; torch's own variable is what overrules that.
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
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
