"""Extension of the vLLM worker: returns recorded arrays and loads new student weights.

vLLM mixes this class into its worker (`worker_extension_cls`); the engine calls the methods by name through `collective_rpc`.
Results are Arrow IPC bytes: vLLM's own encoding corrupts plain arrays unless insecure serialization is on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload, layerwise
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from actors.freed_memory import keep_returning
from actors.vllm_plugin.active_recorder import ActiveRecorder
from actors.vllm_plugin.lifetime import end_with
from actors.vllm_plugin.mixture_model import MixtureForCausalLM, register
from actors.vllm_plugin.record_table import Passes, write_records
from actors.vllm_plugin.row_statistics import measured_columns
from actors.vllm_plugin.weight_files import tensors_of

_RELOAD_LOG = logging.getLogger(layerwise.__name__)

register()


class WorkerExtension:
    """Methods added to the vLLM worker, all prefixed with `kdray_`; `self` is the worker."""

    def kdray_attach(self) -> None:
        """Give the recorder access to the runner. Called once, before the first request.

        Raises: ValueError if the recorder cannot follow the runner's batches.
        """
        assert ActiveRecorder.active is not None
        ActiveRecorder.active.attach(self.model_runner)  # type: ignore[attr-defined]

    def kdray_take(self, wanted: list[tuple[str, int]]) -> bytes | None:
        """Recorded columns of finished requests, in the order of `wanted`, for
        `actors.vllm_plugin.record_table.read_records`; None from a worker that keeps no records."""
        recorder, model = ActiveRecorder.active, MixtureForCausalLM.active
        assert recorder is not None
        assert model is not None
        if not recorder.batch.keeps_records:
            return None
        slabs = recorder.batch.take([(key, length) for key, length in wanted])
        hidden = recorder.batch.statistics.record_hidden
        columns = measured_columns(model.teacher is not None, model.student is not None, hidden)
        return write_records(slabs, columns, Passes(model.steps, model.teacher_steps))

    def kdray_drop(self, keys: list[str]) -> None:
        """Discard the records of aborted requests."""
        assert ActiveRecorder.active is not None
        ActiveRecorder.active.batch.drop(keys)

    def kdray_stats(self) -> dict[str, int]:
        """Counters of this worker: forward passes and those that ran the teacher, requests resumed after preemption and their
        tokens, requests and positions with records held, and the checksum of all tokens drawn."""
        assert ActiveRecorder.active is not None
        assert MixtureForCausalLM.active is not None
        batch, model = ActiveRecorder.active.batch, MixtureForCausalLM.active
        return {
            "steps": model.steps,
            "teacher_steps": model.teacher_steps,
            "readmitted": batch.readmitted,
            "recomputed_tokens": batch.recomputed_tokens,
            "held": len(batch.cells),
            "held_positions": batch.held_positions(),
            "draws": batch.checksum(),
        }

    def kdray_reload(self, which: str, paths: list[str], version: int) -> None:
        """Replace the weights of one of the two models by those in safetensors files (checkpoint names and layout).

        The caller has paused generation and drops cached and running KV afterwards; otherwise old keys and values would mix
        with new weights. Args: which: `student` or `teacher`. Raises: KeyError naming the parameters missing from the files.
        """
        _replace(self, which, version, lambda load: load(tensors_of(paths)))

    def kdray_connect(self, backend: str, info: dict[str, Any]) -> None:
        """Join rank 0's communicator for a single weight transfer. Args: info: vLLM's init info of the backend."""
        model = MixtureForCausalLM.active
        assert model is not None
        if (last := getattr(self, "_kdray_transfer", None)) is not None:
            last.shutdown()
        self._kdray_transfer = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend),
            self.vllm_config,  # type: ignore[attr-defined]
            self.device,  # type: ignore[attr-defined]
            model.student,
        )
        self._kdray_transfer.init_transfer_engine(self._kdray_transfer.parse_init_info(info))

    def kdray_receive(self, info: dict[str, Any], version: int) -> None:
        """Replace the student's weights by those sent by rank 0, then leave its communicator; otherwise as `kdray_reload`.

        Args: info: vLLM's update info, which lists the tensors to receive.
        """
        transfer = self._kdray_transfer

        def fill(load: Load) -> None:
            transfer.set_weight_update_target(_Target(load), self.model_config)  # type: ignore[attr-defined]
            transfer.update_weights(info)

        try:
            _replace(self, "student", version, fill)
        finally:
            transfer.shutdown()
            self._kdray_transfer = None

    def kdray_begin(self, pid: int) -> None:
        """Make this process end within a second of its parent and of the engine's owner, so that neither leaves an orphan, and
        return the memory that it frees.

        Where an engine has several workers, they are children of its process, which ends with them. Ray cleans up after a
        killed replica, except when its node's own daemon was killed too. Args: pid: the owner's.
        """
        end_with(pid)
        keep_returning()

    def kdray_set_version(self, version: int) -> None:
        """Set the version of the weights that were loaded at start."""
        assert MixtureForCausalLM.active is not None
        MixtureForCausalLM.active.student_version = version


Load = Callable[[Iterable[tuple[str, torch.Tensor]]], set[str]]


class _Target(torch.nn.Module):
    """Module whose weights a weight-transfer engine loads."""

    def __init__(self, load: Load) -> None:
        super().__init__()
        self.load_weights = load


def _replace(worker: Any, which: str, version: int, fill: Callable[[Load], Any]) -> None:
    """Replace the weights of one of the two models. Args: fill: passes all of them to the function it receives, in any number
    of parts. Raises: KeyError naming the missing parameters."""
    model = MixtureForCausalLM.active
    assert model is not None
    part = model.student if which == "student" else model.teacher
    assert part is not None, f"this engine holds no {which}"
    loaded: set[str] = set()

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        names = model.load(which, weights)
        loaded.update(names)
        return names

    with set_current_vllm_config(worker.vllm_config), torch.inference_mode():
        # vLLM packs linear weights for its kernels after the first load; only its layerwise reload unpacks, fills and repacks
        # them in place. Plain load_weights would write into emptied tensors.
        initialize_layerwise_reload(part)
        if current_platform.is_cpu():
            _unpack_experts(part)
        fill(load)
        ignored = _ignored(part, model.filled[which])
        with _quiet_about_empty_layers(part, model.filled[which]):
            finalize_layerwise_reload(part, worker.model_config)
        _pack_tied_head(part)
    missing = model.filled[which] - loaded
    if missing:
        raise KeyError(f"{which} version {version} lacks {sorted(missing)[:8]}")
    if ignored:
        raise ValueError(f"vLLM cannot replace the weights of {type(part).__name__}: it did not load those of {ignored[:4]}")
    if which == "student":
        model.student_version = version


def _unpack_experts(part: torch.nn.Module) -> None:
    """Let vLLM pack experts for its CPU kernels again: it does so only when it makes their kernel, not when weights change."""
    for module in part.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _ignored(part: torch.nn.Module, filled: set[str]) -> list[str]:
    """Layers that the first load filled and that the reload in progress left alone, although it returned their names: loaders
    that copy into parameters directly escape vLLM's layerwise reload, which then puts the old weights back."""
    names = []
    for name, layer in part.named_modules():
        info = get_layerwise_info(layer)
        own = {f"{name}.{each}" for each, _ in layer.named_parameters(recurse=False)}
        # A layer that was filled completely has been processed, and does not load any more.
        if own & filled and info.can_load() and not info.load_numel:
            names.append(name)
    return names


@contextmanager
def _quiet_about_empty_layers(part: torch.nn.Module, filled: set[str]) -> Iterator[None]:
    """Leave out vLLM's warning that a layer failed to load where a checkpoint holds nothing of it, such as tables of rotary
    embeddings: it would come with every version."""
    found: dict[str, bool] = {}
    for name, layer in part.named_modules():
        own = {f"{name}.{each}" for each in (*layer._parameters, *layer._buffers)}
        kind = type(layer).__name__
        # All that the warning says of a layer is its class.
        found[kind] = found.get(kind, True) and not own & filled

    def is_news(record: logging.LogRecord) -> bool:
        return not (record.args and found.get(str(record.args[0]), False))  # type: ignore[index]

    _RELOAD_LOG.addFilter(is_news)
    try:
        yield
    finally:
        _RELOAD_LOG.removeFilter(is_news)


def _is_tied(part: Any) -> bool:
    return bool(getattr(part.config, "tie_word_embeddings", False))


def _pack_tied_head(part: Any) -> None:
    """Repack a tied head: it shares the embedding's weight but keeps its own packed copy, which no loader refreshes."""
    if _is_tied(part) and hasattr(part, "lm_head"):
        part.lm_head.quant_method.process_weights_after_loading(part.lm_head)
