"""Tensors of safetensors files as an engine reads them, against the library's own reader."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.vllm_plugin.weight_files import _DTYPES, tensors_of


@pytest.mark.parametrize("dtype", _DTYPES.values(), ids=_DTYPES)
def test_every_dtype_reads_as_the_library_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    written = {
        "z.matrix": torch.arange(15).reshape(3, 5).to(dtype),
        "a.scalar": torch.tensor(1.0).to(dtype),
        "m.none": torch.empty(0, 4).to(dtype),
        "b.odd": torch.ones(7, dtype=torch.uint8),
    }
    save_file(written, path, metadata={"format": "pt"})
    found = dict(tensors_of([path]))
    assert list(found) == sorted(written)
    for name, expected in load_file(path).items():
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        assert torch.equal(found[name].contiguous().view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


def test_files_are_joined_in_the_order_of_names_and_left_as_they_are(tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"layer.b": torch.ones(2), "other": torch.ones(2)}, first)
    save_file({"layer.a": torch.ones(2), "other.c": torch.ones(2)}, second)
    content = first.read_bytes()
    for _, tensor in tensors_of([str(first), str(second)]):
        tensor.zero_()
    assert [name for name, _ in tensors_of([first, second])] == ["layer.a", "layer.b", "other", "other.c"]
    assert first.read_bytes() == content


def test_bytes_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 4)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert len(header) % 4
    ((_, tensor),) = tensors_of([path])
    assert tensor.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("kept", [0, 5, 40, -1], ids=["nothing", "torn length", "torn header", "torn tensor"])
def test_a_file_that_is_not_whole_is_named(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4, 4)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        list(tensors_of([path]))


def test_a_dtype_that_torch_may_not_have_is_named(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ValueError, match="'F4'"):
        list(tensors_of([tmp_path / "model.safetensors"]))


def test_reading_a_version_every_step_leaves_nothing_behind(tmp_path: Path) -> None:
    """The library's reader leaves two integers a tensor."""
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{number}": torch.zeros(300 + number) for number in range(20)}, path)

    def left(versions: int) -> int:
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(versions):
            for _ in tensors_of([path]):
                pass
        gc.collect()
        return sys.getallocatedblocks() - before

    left(10)
    assert left(200) < 400, "the reader of safetensors leaves 8,000"
