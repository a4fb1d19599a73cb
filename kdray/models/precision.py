"""Dtype of a checkpoint's weights, and of an engine that loads it."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from kdray.config import EngineSettings, ModelSource
from kdray.errors import ConfigError
from kdray.models.inspect import architecture, describe, loaded_from
from kdray.models.weight_format import WeightFormat

_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors' names of the dtypes that an engine computes in."""


def engine_dtype(engine: EngineSettings, source: ModelSource, revision: str | None) -> str:
    """Dtype in which an engine holds and computes the model `source`: float32, bfloat16 or float16.

    Raises: ConfigError as `checkpoint_dtype`.
    """
    if engine.dtype != "auto":
        return engine.dtype
    return checkpoint_dtype(source, revision) if engine.num_gpus else cpu_dtype(source, revision)


def cpu_dtype(source: ModelSource, revision: str | None) -> str:
    """Dtype of an engine on CPUs by default: float32, except for quantised weights, whose kernels there are of bfloat16."""
    return "float32" if WeightFormat.of(architecture(source, revision)) is None else "bfloat16"


def checkpoint_dtype(source: ModelSource, revision: str | None) -> str:
    """Dtype that a model's config names or, if it names none, that of most of the weights in its folder; else float32.

    Raises: ConfigError if it is none that an engine computes in.
    """
    config = architecture(source, revision)
    named = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    folder = loaded_from(source)
    if named is None and folder is not None:
        named = _stored_dtype(Path(folder).expanduser())
    # Configs without a dtype are older than the practice of publishing halved weights.
    if named is None:
        return "float32"
    name = str(named).removeprefix("torch.")
    if name not in _FLOATS.values():
        raise ConfigError(
            f"model {describe(source)}: its weights are {name}, in which no engine computes; set `dtype` of the engine that "
            f"loads it to {', '.join(_FLOATS.values())}"
        )
    return name


def _stored_dtype(folder: Path) -> str | None:
    """The floating-point dtype of most numbers in a folder's safetensors files; None if there are none."""
    numbers: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"] in _FLOATS:
                numbers[_FLOATS[tensor["dtype"]]] += prod(tensor["shape"])
    return max(numbers, key=lambda dtype: numbers[dtype]) if numbers else None
