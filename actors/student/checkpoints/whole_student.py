"""The student of a checkpoint as a Hugging Face folder, made by one process on the CPU, whatever number of ranks wrote it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.student.backend import backend_class
from actors.student.backends.torch import TorchBackend
from actors.student.features import without_wrapper
from actors.student.trainer import Phase, StudentTrainer
from kdray.config import Config
from kdray.config.backends import TorchSettings
from kdray.errors import DataError, TrainingError
from kdray.models.identity import pinned
from kdray.models.inspect import chat_template_text
from kdray.models.resolve import model_config, resolve_model
from kdray.models.saving import TokenizerSource
from kdray.runs.checkpoints import FILES, FOLDER, Committed, checkpoint_at, differing, read_marker
from kdray.runs.storage import Storage

_COMPARED = 32
"""Token ids on which the folder, loaded anew, is compared with the student."""


def write_student(config: Config, step: int, folder: Path, places: list[Storage]) -> None:
    """Write the student of a checkpoint of a run into a new folder, with its tokenizer.

    Args: config: the run's; step: the checkpoint's; places: storages of the run, of which the first one that has it is read.
    Raises: DataError if there is no such checkpoint, with those that there are, or it is not whole; TrainingError if it cannot
    be read, or the folder, loaded anew, is another model.
    """
    found = checkpoint_at(places, step)
    # A repository of the hub may have moved on since.
    config = pinned(config, found.progress.get("inputs", {}))
    base = resolve_model(config.student.model, config.run.output / ".models"), config.student.revision
    with _at_hand(found.storage, found.key, found.marker) as files, _start(config, found, base, places) as (model, revision):
        settings = config.training.model_copy(
            update={"backend": TorchSettings(), "ranks": 1, "gpus_per_rank": 0.0, "features": None}
        )
        vocab_size = int(model_config(model, revision).get_text_config().vocab_size)
        reader = _Reader(settings, backend_class(config.training).trained_weights(files))
        trainer = StudentTrainer(settings, vocab_size, config.run.seed, reader)
        try:
            trainer.start_phase(Phase(str(found.progress["stage"]), model, revision, None, 0.0, 1, base=base))
            trainer.load(files)
            ids = np.random.default_rng(0).integers(vocab_size, size=_COMPARED).tolist()
            trainer.export(folder, TokenizerSource(*base, chat_template_text(config)), ids)
        finally:
            trainer.close()


class _Reader(TorchBackend):
    """One process whose module gets the weights of a checkpoint of any backend, without optimizer or schedule."""

    def __init__(self, training: Any, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(training)
        self._weights = without_wrapper(weights)

    def load(self, folder: Path) -> dict[str, Any]:
        fill(self.module, self._weights, folder)
        return {"steps_done": 0}


def fill(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy a checkpoint's weights into a module. Frozen parameters and buffers that it lacks keep their values.

    Raises: TrainingError if a trained parameter is missing or has another shape.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, torch.nn.Parameter] = {}
    # A tied parameter has several names, and a checkpoint may hold any of them.
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    with torch.no_grad():
        for key, parameter in parameters.items():
            given = next((weights[name] for name in names[key] if name in weights), None)
            if given is None and not parameter.requires_grad:
                continue
            if given is None or given.shape != parameter.shape:
                held = "is not in it" if given is None else f"has the shape {tuple(given.shape)}, not {tuple(parameter.shape)}"
                raise TrainingError(f"{folder}: no checkpoint of this student: {names[key][0]} {held}")
            parameter.copy_(given)
        for name, buffer in module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])


@contextmanager
def _start(
    config: Config, found: Committed, base: tuple[str, str | None], places: Sequence[Storage]
) -> Iterator[tuple[str, str | None]]:
    """Folder or hub id, and revision, of the weights that the checkpoint's phase was started with.

    Args: base: the run's; places: that may hold an earlier phase's student, if the checkpoint's own does not.
    """
    earlier = None
    if found.progress["stage"] == "finetune":
        earlier = "checkpoints/distilled"
    elif config.training.sft.steps:
        earlier = "checkpoints/sft"
    if earlier is None:
        yield base
        return
    for storage in (found.storage, *places):
        if (marker := read_marker(storage, earlier)) is not None:
            break
    else:
        raise DataError(f"{found.storage.url}/{earlier}: is not there, and this phase began with it; restore the folder")
    with _at_hand(storage, earlier, marker) as folder:
        yield str(folder), None


@contextmanager
def _at_hand(storage: Storage, key: str, marker: Mapping[str, Any]) -> Iterator[Path]:
    """A folder of a storage on this machine, verified against its record. Raises: DataError."""
    files = marker[FILES]
    with tempfile.TemporaryDirectory(prefix="kdray-") as scratch:
        names = {name: f"{key}/{name}" for name in files}
        if storage.is_local:
            here, digests = storage.path(key), storage.digests(names.values())
        else:
            here = Path(scratch)
            digests = storage.get_files({each: here / name for name, each in names.items()})
        if (reason := differing(files, {name: digests[each] for name, each in names.items()})) is not None:
            raise DataError(f"{storage.url}/{key}: {reason}; choose another checkpoint")
        yield here / marker.get(FOLDER, "")
