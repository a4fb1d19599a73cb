"""A teacher in FP8, as published ones are: compressed-tensors, a scale a row, activations rounded as they come."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
SETTINGS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "decoder": {
            "targets": ["Linear"],
            "weights": _FLOAT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": _FLOAT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def write_float8(plain: Path, to: Path) -> None:
    """Write a copy of a Hugging Face folder with the matrices of the decoder's layers in FP8.

    Args: plain: with one file of weights; to: does not exist yet.
    """
    files = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        files[name] = tensor
        if ".layers." in name and tensor.dim() == 2:
            scale = tensor.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
            files |= {name: (tensor.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    shutil.copytree(plain, to)
    save_file(files, to / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}), encoding="utf-8")
