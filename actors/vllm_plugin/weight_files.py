"""Tensors of safetensors files, mapped into memory without the library's reader.

The reader of safetensors (0.5.3 to 0.8.0) leaks two Python integers, 64 bytes, for every tensor that it returns to torch: with
a new version of the weights each step, an engine would grow for as long as a run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def tensors_of(paths: Iterable[str | Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all files in the order of their names, each with its name.

    Else vLLM would keep more of them: those of a layer until it has the last, which may be in another file with an adapter.

    A tensor is a part of its file's mapping: pages are read when it is, and nothing that is written to it reaches the file.
    Raises: OSError; ValueError naming the file that is not whole, or a tensor whose dtype is unknown.
    """
    found = {name: tensor for path in paths for name, tensor in _mapped(Path(path)).items()}
    for name in sorted(found):
        yield name, found.pop(name)


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    size = path.stat().st_size
    try:
        content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        # The format: length of the header in eight bytes, the header as JSON, the tensors' bytes.
        begin = 8 + int.from_bytes(_bytes(content[:8]), "little")
        header = json.loads(_bytes(content[8:begin]))
        return {name: _tensor(content[begin:], **entry) for name, entry in header.items() if name != _METADATA}
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error!r}") from error


def _tensor(content: torch.Tensor, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> torch.Tensor:
    begin, end = data_offsets
    part = content[begin:end]
    if part.data_ptr() % _DTYPES[dtype].itemsize:
        # No header that safetensors writes leads here; torch refuses to view such bytes.
        part = part.clone()
    return part.view(_DTYPES[dtype]).view(shape)


def _bytes(part: torch.Tensor) -> bytes:
    return part.numpy().tobytes()
