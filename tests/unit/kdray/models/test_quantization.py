"""Quantised weights are those that NumPy rounds to, in every loader; what cannot be quantised is refused unwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdray.config import TinyModel
from kdray.errors import DataError
from kdray.models.quantization import plain_weights, quantize, size_bytes
from kdray.models.resolve import build_tiny_model, task_tokenizer

DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(3, 3 + 24).reshape(2, 12)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = TinyModel(type="tiny", layers=2, width=64, seed=3)
    return build_tiny_model(source, tmp_path_factory.mktemp("quantization") / "student")


def _rounded(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Symmetric rounding to the nearest of 2**bits values, one scale for `group` neighbours in a row."""
    rows = weight.reshape(len(weight), -1, group)
    scale = (np.abs(rows).max(-1, keepdims=True) / np.float32((2**bits - 1) / 2)).astype(np.float32)
    values = np.clip(np.rint(rows / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (values.astype(np.float32) * scale).reshape(weight.shape)


def _expected(student: Path, bits: int, group: int | None) -> dict[str, torch.Tensor]:
    weights = load_file(student / "model.safetensors")
    for name, weight in weights.items():
        if any(f".{module}.weight" in name for module in DECODER):
            weights[name] = torch.from_numpy(_rounded(weight.numpy(), bits, group or weight.shape[1]))
    return weights


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize(("method", "bits", "group"), [("int8", 8, None), ("int4", 4, 32), ("int4", 4, 64)])
def test_the_quantised_student_is_the_student_with_rounded_weights(
    student: Path, tmp_path: Path, method: str, bits: int, group: int | None
) -> None:
    folder = tmp_path / method
    quantize(student, folder, method, group)
    expected = _expected(student, bits, group)
    model = AutoModelForCausalLM.from_pretrained(student)
    before = _logits(model)
    model.load_state_dict(expected)
    rounded = _logits(model)
    assert (rounded - before).abs().max() > 1e-2, "the rounding must show, or this test shows nothing"
    torch.testing.assert_close(_logits(AutoModelForCausalLM.from_pretrained(folder)), rounded, rtol=0, atol=1e-5)
    with plain_weights(folder, tmp_path / "near") as plain:
        found = load_file(plain / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-7, msg=name)
        assert "quantization_config" not in json.loads((plain / "config.json").read_text())
        assert AutoTokenizer.from_pretrained(plain).get_vocab() == task_tokenizer().get_vocab()
    assert list((tmp_path / "near").iterdir()) == [], "the plain folder ends with the block"


def test_only_the_decoders_matrices_are_packed(student: Path, tmp_path: Path) -> None:
    quantize(student, tmp_path / "int4", "int4", 32)
    before, after = load_file(student / "model.safetensors"), load_file(tmp_path / "int4" / "model.safetensors")
    packed = {name.removesuffix("_packed") for name in after if name.endswith("_packed")}
    assert packed == {name for name in before if any(f".{module}.weight" in name for module in DECODER)}
    for name in before.keys() - packed:
        assert torch.equal(before[name], after[name])
    name = "model.layers.1.mlp.down_proj.weight"
    assert (after[f"{name}_packed"].dtype, after[f"{name}_packed"].shape) == (torch.int32, (64, 128 // 8))
    assert after[f"{name}_scale"].shape == (64, 128 // 32)
    # 4 bits a weight and 32 for each 32 of them are 5 bits, where 32 were.
    ideal = sum(before[name].numel() * (5 / 8 if name in packed else 4) for name in before)
    assert ideal <= size_bytes(tmp_path / "int4") < 1.2 * ideal < size_bytes(student)


def test_tied_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    source = TinyModel(type="tiny", layers=1, width=64, tie_embeddings=True)
    tied = build_tiny_model(source, tmp_path / "tied")
    quantize(tied, tmp_path / "int8", "int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(
        model.get_output_embeddings().weight, AutoModelForCausalLM.from_pretrained(tied).get_input_embeddings().weight
    )


def test_half_precision_comes_back_in_its_dtype(student: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(half)
    task_tokenizer().save_pretrained(half)
    quantize(half, tmp_path / "int8", "int8")
    with plain_weights(tmp_path / "int8", tmp_path) as plain:
        weights = load_file(plain / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    original = load_file(half / "model.safetensors")[name].float()
    step = original.abs().amax(1, keepdim=True) / 127.5
    # Half a step of rounding, one more for the largest, and two roundings to 8 bits of mantissa.
    assert ((weights[name].float() - original).abs() <= 0.5 * step + 2 * 2**-8 * original.abs().amax(1, keepdim=True)).all()


def test_a_plain_folder_is_measured_as_it_is(student: Path, tmp_path: Path) -> None:
    with plain_weights(student, tmp_path / "near") as plain:
        assert plain == student
    assert not (tmp_path / "near").exists()


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("method", "group", "message"),
    [
        ("int3", None, "--quantize int3: unknown; use int8 or int4"),
        ("int8", 32, "--group-size 32: int8 has one scale a row"),
        ("int4", None, r"--group-size 128: the 64 weights a row of model\.layers\.0\.self_attn\.q_proj .* such as 64"),
        ("int4", 48, r"--group-size 48: the 64 weights .* such as 32"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    student: Path, tmp_path: Path, method: str, group: int | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        quantize(student, tmp_path / "to", method, group)
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_folder_is_not_quantised_again(student: Path, tmp_path: Path) -> None:
    quantize(student, tmp_path / "once", "int8")
    with pytest.raises(DataError, match="quantised already"):
        quantize(tmp_path / "once", tmp_path / "twice", "int4", 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantised by gptq; only compressed-tensors"),
        ({"config_groups": {"a": {"input_activations": {"num_bits": 8}}}}, "it quantises activations"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "it quantises activations or KV cache"),
    ],
)
def test_what_plain_weights_cannot_show_is_refused(student: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "int8"
    quantize(student, folder, "int8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message), plain_weights(folder, tmp_path / "near"):
        pass
    assert not any((tmp_path / "near").iterdir())


def test_a_folder_without_a_model_is_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Hugging Face model"), plain_weights(tmp_path / "none", tmp_path):
        pass
    shutil.copy(student / "config.json", tmp_path)
    with pytest.raises(DataError, match="no Hugging Face model"), plain_weights(tmp_path, tmp_path):
        pass
