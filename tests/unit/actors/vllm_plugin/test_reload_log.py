"""Warnings of vLLM's reload: that of a layer without weights in the checkpoint says nothing, that of any other is kept."""

from __future__ import annotations

import logging

import torch
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from actors.vllm_plugin.worker_extension import _RELOAD_LOG, _quiet_about_empty_layers


class Table(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cosines", torch.ones(4), persistent=False)


class Layer(torch.nn.Linear):
    pass


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = Table(), Layer(2, 2)


def test_only_layers_of_which_a_checkpoint_holds_something_are_warned_about() -> None:
    block, heard = Block(), []

    class Hear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    def reload() -> list[str]:
        heard.clear()
        initialize_layerwise_reload(block)
        finalize_layerwise_reload(block, None)
        return list(heard)

    ear = Hear()
    _RELOAD_LOG.addHandler(ear)
    try:
        record_metadata_for_reloading(block)
        as_before = reload()
        assert as_before == ["Table: Failed to load weights", "Layer: Failed to load weights"], "vLLM warns of other things now"
        with _quiet_about_empty_layers(block, {"linear.weight", "linear.bias"}):
            assert reload() == ["Layer: Failed to load weights"]
        with _quiet_about_empty_layers(block, set()):
            assert reload() == []
        assert reload() == as_before
    finally:
        _RELOAD_LOG.removeHandler(ear)
