"""Weight-only quantisation of a student to 8 or 4 bits in the compressed-tensors format of vLLM and transformers, and back.

The weights of the decoder's linear layers (q, k, v, o, gate, up, down) are quantised symmetrically with round-to-nearest: int8
with one scale per row, int4 with one scale per `group_size` neighbours in a row. Embeddings, output head, norms and biases keep
their dtype, activations are not quantised, and no calibration data is needed. The library does rounding, packing and file
format; this file decides which weights share a scale.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kdray.errors import DataError
from kdray.models.saving import save_model

METHODS: dict[str, int] = {"int8": 8, "int4": 4}
"""Bits by method."""

GROUP_SIZE = 128
"""Weights that share a scale in int4 by default; the W4A16 scheme of compressed-tensors."""


def check_quantization(student: Path, method: str, group_size: int | None) -> None:
    """Check that a Hugging Face folder can be quantised this way. Raises: DataError with option, value and remedy."""
    if method not in METHODS:
        raise DataError(f"--quantize {method}: unknown; use {' or '.join(METHODS)}")
    if group_size is not None and METHODS[method] == 8:
        raise DataError(f"--group-size {group_size}: int8 has one scale a row; remove the option, or use --quantize int4")
    if is_quantized(student):
        raise DataError(f"{student}: its weights are quantised already; name the folder before quantisation")


def quantize(student: Path, to: Path, method: str, group_size: int | None = None) -> None:
    """Write a copy of `student` with quantised weights to `to`, a new or empty folder, as a Hugging Face folder.

    Args: group_size: for int4, the number of weights in a row that share a scale; None means GROUP_SIZE.
    Raises: DataError as `check_quantization`, and if a row does not divide into groups; nothing is written then.
    """
    import torch
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStrategy,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_quantization(student, method, group_size)
    model = AutoModelForCausalLM.from_pretrained(student, dtype="auto", trust_remote_code=False, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
    size = None if method == "int8" else group_size or GROUP_SIZE
    for name, module in model.named_modules():
        if size is not None and isinstance(module, torch.nn.Linear) and name != "lm_head" and module.in_features % size:
            raise DataError(
                f"--group-size {size}: the {module.in_features} weights a row of {name} do not divide by it; use a "
                f"divisor, such as {_largest_divisor(module.in_features, size)}"
            )
    strategy = QuantizationStrategy.CHANNEL if size is None else QuantizationStrategy.GROUP
    arguments = QuantizationArgs(num_bits=METHODS[method], type="int", symmetric=True, strategy=strategy, group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    apply_quantization_config(model, QuantizationConfig(config_groups={"decoder": scheme}, ignore=["lm_head"]))
    quantised = [module for module in model.modules() if is_module_quantized(module)]
    if not quantised:
        raise DataError(
            f"{student}: a {model.config.model_type} has no linear layers beside its head, so that nothing would be quantised; "
            "export it as it is"
        )
    for module in quantised:
        with torch.no_grad():
            groups = module.weight.unflatten(1, (-1, size or module.in_features))  # [rows, groups, group size]
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
            module.weight_scale.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_model(model, to)
    compressor.update_config(to)
    tokenizer.save_pretrained(to)


def is_quantized(folder: Path) -> bool:
    """Return True if the weights in a Hugging Face folder are quantised, according to its config."""
    return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


@contextmanager
def plain_weights(folder: Path, near: Path) -> Iterator[Path]:
    """Yield `folder` itself or, if its weights are quantised, a temporary folder in `near` with the dequantised values.

    The temporary folder is deleted at the end of the block. A measurement on it shows the exact effect of weight-only
    quantisation, without the arithmetic of a quantised kernel.
    Raises: DataError if the folder holds no model, or one quantised in another way.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise DataError(f"{folder}: no Hugging Face model (config.json and *.safetensors) is there; name its folder")
    if not is_quantized(folder):
        yield folder
        return
    near.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".plain-", dir=near.absolute()) as name:
        dequantize(folder, Path(name) / "model")
        yield Path(name) / "model"


def dequantize(folder: Path, to: Path) -> None:
    """Write the values of the quantised weights in `folder` to the new folder `to`, in the dtype of its config.

    Raises: DataError if anything but weights is quantised, or the format is not compressed-tensors.
    """
    import torch
    from compressed_tensors import logger
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, convert_checkpoint

    # It logs one line per copied file.
    logger.disable("compressed_tensors.entrypoints")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config["quantization_config"]
    if found.get("quant_method") != "compressed-tensors":
        raise DataError(f"{folder}: quantised by {found.get('quant_method')}; only compressed-tensors is read here")
    if any(_quantizes_activations(group) for group in found.get("config_groups", {}).values()) or found.get("kv_cache_scheme"):
        raise DataError(f"{folder}: it quantises activations or KV cache, too, which plain weights cannot show")
    to.mkdir(parents=True)
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    convert_checkpoint(folder, to, CompressedTensorsDequantizer(folder, dtype=dtype))


def size_bytes(folder: Path) -> int:
    """Size of the weights in a Hugging Face folder, bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _quantizes_activations(group: dict[str, Any]) -> bool:
    return bool(group.get("input_activations") or group.get("output_activations"))


def _largest_divisor(columns: int, size: int) -> int:
    return next(divisor for divisor in range(min(size, columns), 0, -1) if columns % divisor == 0)
