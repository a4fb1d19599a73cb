"""The snapshot that rank 0 sends, in the form that vLLM reads: that of the installed version, and that of the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.base import WeightSource

from actors.weights.snapshot import snapshot, source_class

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@dataclass(frozen=True)
class NextMeta:
    """`ParamMeta` of vLLM 0.33, without its checks of owners."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    owners: tuple[int, ...] | None = field(default=None, kw_only=True)


class NextSource(ABC):
    """`WeightSource` of vLLM 0.33: its rules for subclasses, and what its engine of NCCL reads.

    As there, the two methods that a source has to bring raise here.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        metadata = cls.__dict__.get("metadata")
        if metadata is not None and not isinstance(metadata, cached_property):
            raise TypeError(f"{cls.__name__}.metadata must be a functools.cached_property")

    @property
    @abstractmethod
    def metadata(self) -> list[NextMeta]:
        raise NotImplementedError

    def owned_names(self, rank: int) -> list[str]:
        return [each.name for each in self.metadata if each.owners is None or rank in each.owners]

    def implements_iter_full(self) -> bool:
        return type(self).iter_full is not NextSource.iter_full

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError


def same(pairs: Any) -> bool:
    found = list(pairs)
    return [name for name, _ in found] == list(TENSORS) and all(tensor is TENSORS[name] for name, tensor in found)


def test_the_installed_vllm_reads_names_shapes_and_tensors() -> None:
    source = snapshot(TENSORS)
    assert isinstance(source, WeightSource)
    metadata = source.metadata if hasattr(WeightSource, "iter_full") else source.metadata()
    assert [(each.name, each.dtype, each.shape) for each in metadata] == [
        ("a.weight", torch.float32, (2, 3)),
        ("b", torch.bfloat16, (4,)),
    ]
    for _ in range(2):
        assert same(source.iter_full() if hasattr(WeightSource, "iter_full") else source)


def test_the_next_vllm_reads_the_same() -> None:
    source = source_class(NextSource, NextMeta)(TENSORS)
    assert source.implements_iter_full()
    assert source.metadata is source.metadata
    assert [(each.name, each.dtype, each.shape) for each in source.metadata] == [
        ("a.weight", torch.float32, (2, 3)),
        ("b", torch.bfloat16, (4,)),
    ]
    assert source.owned_names(0) == list(TENSORS)
    for _ in range(2):
        assert same(source.iter_full())


def test_the_next_vllm_refuses_the_form_of_this_one() -> None:
    """So that the test above tests something."""
    with pytest.raises(TypeError, match="cached_property"):
        type("Old", (NextSource,), {"metadata": lambda self: []})
