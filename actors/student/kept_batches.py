"""Batches since the last checkpoint, which ranks that restart train again, on the disk of the driver's node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kdray.errors import TrainingError
from kdray.types import TrainBatch

_VALUES, _COLUMN = "values", "column "
"""Names in a file: of the fields that are no arrays, as JSON; what precedes a column's own name."""

Shards = Sequence[TrainBatch]


class KeptBatches:
    """Folder with the shards of every rank by the index of their command, and of pretraining text beside them, if any."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: an empty one."""
        self._folder = folder
        self._bytes: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Size of everything that is kept."""
        return sum(self._bytes.values())

    def __contains__(self, index: int) -> bool:
        return index in self._bytes

    def put(self, index: int, shards: Shards, text: Shards | None) -> None:
        """Keep a command's shards, in the order of the ranks. Raises: OSError if there is no room."""
        kinds = {"batch": shards} if text is None else {"batch": shards, "text": text}
        files = {self._path(index, kind, rank): shard for kind, of in kinds.items() for rank, shard in enumerate(of)}
        try:
            for path, shard in files.items():
                write_batch(path, shard)
        except BaseException:
            for path in files:
                path.unlink(missing_ok=True)
            raise
        self._bytes[index] = sum(path.stat().st_size for path in files)

    def get(self, index: int, rank: int) -> tuple[TrainBatch, TrainBatch | None]:
        """Return a rank's shard, and its text. Raises: TrainingError if they cannot be read."""
        text = self._path(index, "text", rank)
        try:
            return read_batch(self._path(index, "batch", rank)), read_batch(text) if text.exists() else None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise TrainingError(
                f"{self._folder}: a batch that restarted ranks have to train again cannot be read: {error!r}; continue with "
                "--resume, which draws it again"
            ) from error

    def drop(self, index: int) -> None:
        """Delete the shards of a command."""
        if self._bytes.pop(index, None) is not None:
            for path in self._folder.glob(f"{index:08d}-*"):
                path.unlink()

    def close(self) -> None:
        """Delete everything."""
        self._bytes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, index: int, kind: str, rank: int) -> Path:
        return self._folder / f"{index:08d}-{kind}-{rank:05d}.safetensors"


def write_batch(path: Path, batch: TrainBatch) -> None:
    """Write a batch: its arrays, and its other fields as JSON beside them."""
    own = {each.name: getattr(batch, each.name) for each in fields(batch) if each.name != "columns"}
    arrays = {name: value for name, value in own.items() if isinstance(value, np.ndarray)}
    values = json.dumps({name: value for name, value in own.items() if name not in arrays})
    arrays |= {f"{_COLUMN}{name}": value for name, value in batch.columns.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path, {_VALUES: values})


def read_batch(path: Path) -> TrainBatch:
    """Read what `write_batch` wrote."""
    with safe_open(path, framework="np") as found:
        values: dict[str, Any] = json.loads(found.metadata()[_VALUES])
        arrays = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 - not a dict
    columns = {name.removeprefix(_COLUMN): value for name, value in arrays.items() if name.startswith(_COLUMN)}
    values |= {name: value for name, value in arrays.items() if not name.startswith(_COLUMN)}
    return TrainBatch(**values | {"groups": tuple(values["groups"])}, columns=columns)
