"""Checks that the weights in a local model folder can be loaded: safetensors only, complete, and inside the folder.

Only headers are read, no tensors. A pickle is never opened, since unpickling runs code.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from kdray.errors import DataError

_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format."""


def check_weights(folder: Path) -> None:
    """Check all weights in `folder`. Raises: DataError naming the file that cannot be loaded, and the remedy."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        found = f", and pickled ones are not loaded, since a pickle can run code ({', '.join(pickled[:3])})" if pickled else ""
        raise DataError(f"model {folder}: the folder has no *.safetensors weights{found}; save it with save_pretrained")
    for path in files:
        check_file(path)
    if (folder / _INDEX).is_file():
        _check_index(folder / _INDEX)


def check_file(path: Path) -> None:
    """Check one safetensors file. Raises: DataError if its header cannot be read, or contradicts the file's length."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= _MAX_HEADER_BYTES:
            raise DataError(f"{path}: not safetensors; restore the file, or save the model again with save_pretrained")
        text = file.read(size)
    try:
        header: dict[str, Any] = json.loads(text)
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: its header cannot be read: the file is cut or damaged; restore it") from error
    length = path.stat().st_size
    if 8 + size + end != length:
        raise DataError(f"{path}: {length} bytes, and its header says {8 + size + end}: the file is cut or damaged; restore it")


def _check_index(path: Path) -> None:
    """Check the index that maps tensors to files."""
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not an index of weights: {error!r}; save the model again with save_pretrained") from error
    for name in sorted(map(str, names)):
        if PurePath(name).name != name:
            raise DataError(f"{path}: names {name}, which is no file of this folder; save the model again with save_pretrained")
        if not (path.parent / name).is_file():
            raise DataError(f"{path}: names {name}, which is not there; restore the file")
