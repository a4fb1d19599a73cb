"""The dtype that a checkpoint has, and the one that an engine computes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from kdray.config import TinyModel, VLLMTeacherSettings
from kdray.errors import ConfigError
from kdray.models.precision import checkpoint_dtype, engine_dtype

TINY = TinyModel(type="tiny", layers=1, width=32)


def folder(path: Path, named: str | None, **weights: torch.dtype) -> str:
    """A model folder whose config names a dtype, or none; with tensors of increasing size."""
    LlamaConfig(num_hidden_layers=1).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype", None)
    (path / "config.json").write_text(json.dumps(config | ({} if named is None else {"dtype": named})))
    tensors = {name: torch.zeros(4**size, dtype=dtype) for size, (name, dtype) in enumerate(weights.items())}
    save_file(tensors, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_config_names_it(tmp_path: Path, dtype: str) -> None:
    assert checkpoint_dtype(folder(tmp_path, dtype, a=torch.float32), None) == dtype


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        ({"norm": torch.float32, "weight": torch.bfloat16}, "bfloat16"),
        ({"norm": torch.bfloat16, "weight": torch.float32}, "float32"),
        ({"scale": torch.float16, "packed": torch.int32}, "float16"),
    ],
)
def test_most_of_the_weights_say_it_where_the_config_does_not(
    tmp_path: Path, weights: dict[str, torch.dtype], dtype: str
) -> None:
    assert checkpoint_dtype(folder(tmp_path, None, **weights), None) == dtype


def test_float32_is_assumed_where_nothing_says_it(tmp_path: Path) -> None:
    assert checkpoint_dtype(folder(tmp_path, None, packed=torch.int32), None) == "float32"


def test_a_dtype_in_which_no_engine_computes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its weights are float64, in which no engine computes; set `dtype`"):
        checkpoint_dtype(folder(tmp_path, "float64", a=torch.float64), None)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, "float32"),
        ({"num_gpus": 1}, "bfloat16"),
        ({"num_gpus": 1, "dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_auto_is_the_checkpoints_own_on_gpus_and_float32_on_cpus(tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    engine = VLLMTeacherSettings.model_validate({"type": "vllm", "model": "m", "num_gpus": 0, **settings})
    assert engine_dtype(engine, folder(tmp_path, "bfloat16", a=torch.bfloat16), None) == dtype
    if settings == {"num_gpus": 1}:
        assert engine_dtype(engine, TINY, None) == "float32"
