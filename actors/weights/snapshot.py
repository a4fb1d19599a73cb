"""Snapshot of the weights as the source that vLLM's trainer-side engines read, in the form of the installed version.

Since 0.33, `WeightSource.metadata` is a cached property and the tensors come from `iter_full`; before, `metadata` is a method
and the source itself is iterated.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource


def snapshot(tensors: dict[str, torch.Tensor]) -> Any:
    """vLLM's `WeightSource` of these tensors, all owned by the one process that sends them."""
    return source_class(WeightSource, ParamMeta)(tensors)


def source_class(base: type[Any], meta: type[Any]) -> type[Any]:
    """Class of snapshots. Args: base, meta: vLLM's `WeightSource` and `ParamMeta`."""

    def described(self: Any) -> list[Any]:
        return [meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def pairs(self: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    def begin(self: Any, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    fields: dict[str, Any] = {"__init__": begin}
    if getattr(base, "iter_full", None) is not None:
        # vLLM looks for the property among the class's own attributes as it is made.
        fields |= {"metadata": cached_property(described), "iter_full": pairs}
    else:
        fields |= {"metadata": described, "__iter__": pairs}
    return type("Snapshot", (base,), fields)
