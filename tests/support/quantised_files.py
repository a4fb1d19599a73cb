"""Quantised checkpoints as their tools write them, from a plain folder, beside a plain folder of the same rounded weights.

GPTQ and AWQ in 4 bits with groups, and int8 with int8 activations: what transformers alone does not load, so that a trial
compares with the rounded weights instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Columns that AWQ packs into the eight nibbles of a word, lowest nibble first."""
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors of a matrix in the files, by the end of their name; and its rounded weights [rows, columns]."""


def _nibbles(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack each eight numbers of the last dimension into an int32."""
    eights = values.to(torch.int64).unflatten(-1, (-1, 8))
    word = torch.zeros_like(eights[..., 0])
    for place, column in enumerate(order):
        word |= eights[..., column] << (4 * place)
    return word.where(word < 2**31, word - 2**32).to(torch.int32)


def _gptq(weight: torch.Tensor) -> Packed:
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7).half().float()  # [rows, groups]
    codes = (groups / scale[..., None]).round().clamp(-8, 7) + 8
    rounded = ((codes - 8) * scale[..., None]).flatten(1)
    columns = weight.shape[1]
    return {
        "qweight": _nibbles(codes.flatten(1)).T.contiguous(),
        # The first version of the format stores a zero point less one.
        "qzeros": _nibbles(torch.full((columns // GROUP, len(weight)), 7)),
        "scales": scale.T.half().contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }, rounded


def _awq(weight: torch.Tensor) -> Packed:
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    rounded = ((codes - zero[..., None]) * scale[..., None]).flatten(1)
    return {
        "qweight": _nibbles(codes.flatten(1).T, _AWQ_ORDER),
        "qzeros": _nibbles(zero.T, _AWQ_ORDER),
        "scales": scale.T.half().contiguous(),
    }, rounded


def _int8(weight: torch.Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
METHODS: dict[str, tuple[Callable[[torch.Tensor], Packed], dict[str, Any]]] = {
    "GPTQ": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "AWQ": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "int8 with int8 activations": (
        _int8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "decoder": {
                    "targets": ["Linear"],
                    "weights": _INT8 | {"strategy": "channel"},
                    "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
                }
            },
        },
    ),
}


def write_quantised(plain: Path, method: str, quantised: Path, rounded: Path, excluded: Sequence[str] = ()) -> None:
    """Write a folder with the matrices of the decoder's layers quantised, and one with the same weights as plain numbers.

    Args: excluded: names of layers that stay plain, for a method with such a list (`ignore`).
    """
    pack, settings = METHODS[method]
    if excluded:
        settings = settings | {"ignore": [*settings["ignore"], *excluded]}
    tensors = load_file(plain / "model.safetensors")
    files: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".layers." not in name or tensor.dim() != 2 or name.removesuffix(".weight") in excluded:
            files[name] = tensor
            continue
        parts, tensors[name] = pack(tensor.float())
        files |= {name.removesuffix("weight") + part: values for part, values in parts.items()}
    for folder, content in ((quantised, files), (rounded, tensors)):
        shutil.copytree(plain, folder)
        save_file({name: each.contiguous() for name, each in content.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), encoding="utf-8")
