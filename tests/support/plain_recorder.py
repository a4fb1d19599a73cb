"""The recorder's draws and columns computed plainly: a reference for tests, in as many passes as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from actors.vllm_plugin.row_statistics import Rows
from kdray.rollouts.mixture import draw, log_mixture
from kdray.rollouts.seeds import uniforms

Columns = dict[str, torch.Tensor]


def random_rows(count: int, vocab: int, seed: int, scale: float = 3.0) -> Rows:
    """Log-softmax rows of two models that differ, and hidden states of width 4."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(count, vocab, generator=generator) * scale for _ in range(2))
    hidden = torch.randn(count, 4, generator=generator)
    return Rows(teacher.log_softmax(-1), (teacher + student).log_softmax(-1), hidden)


def drawn(rows: Rows, alpha: torch.Tensor, seeds: list[int], positions: list[int]) -> torch.Tensor:
    """Token ids drawn from the mixture, [n]. Args: alpha: [n, 1]."""
    where = uniforms(np.array(seeds, dtype=np.uint64), np.array(positions))
    return draw(mixture(rows, alpha), torch.from_numpy(where))


def mixture(rows: Rows, alpha: torch.Tensor | None) -> torch.Tensor:
    if rows.teacher is not None and rows.student is not None and alpha is not None:
        return log_mixture(rows.teacher, rows.student, alpha)
    only = rows.teacher if rows.teacher is not None else rows.student
    assert only is not None
    return only


def columns(
    rows: Rows,
    tokens: torch.Tensor,
    alpha: torch.Tensor | None,
    top: tuple[int, int],
    asked: torch.Tensor | None = None,
    top_k: bool = True,
) -> Columns:
    """Every column of rows at tokens, by name. Args: top: size of the teacher's and of the student's part of the support."""
    teacher, student = rows.teacher, rows.student
    at = tokens.unsqueeze(-1)
    found = {"mixture_logprobs": mixture(rows, alpha).gather(-1, at), "token_ids": at}
    if student is not None:
        found["student_logprobs"] = student.gather(-1, at)
    if teacher is not None:
        vocab = teacher.shape[-1]
        parts = [] if asked is None else [asked]
        if top_k:
            parts.append(teacher.topk(min(top[0], vocab)).indices)
            if student is not None and top[1] and parts[-1].shape[-1] < vocab:
                parts.append(student.topk(min(top[1], vocab)).indices)
        support = torch.empty((len(teacher), 0), dtype=torch.long)
        for part in parts:
            taken = _named(support, vocab).gather(-1, part.clamp(min=0))
            support = torch.cat([support, part.masked_fill(taken, -1)], -1)
        found["support_ids"] = support
        found["support_logprobs"] = teacher.gather(-1, support.clamp(min=0)).masked_fill(support < 0, -torch.inf)
        found["teacher_logprobs"] = teacher.gather(-1, at)
        outside = teacher.double().masked_fill(_named(support, vocab), -torch.inf)
        found["tail_logprobs"] = outside.logsumexp(-1, keepdim=True).float()
        if student is not None:
            found |= {"reverse_kl": _kl(student, teacher), "forward_kl": _kl(teacher, student)}
    return found


def _named(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    flags = torch.zeros(len(ids), vocab + 1, dtype=torch.bool)
    return flags.scatter_(-1, ids.where(ids >= 0, vocab), True)[:, :vocab]


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    mass = first.exp()
    return torch.where(mass > 0, mass * (first - second), 0.0).sum(-1, keepdim=True)


class NoTransfers(TorchDispatchMode):
    """Fails at every operation that brings values from one device to another, to Python or from there."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "_unique2", "unique_dim")

    def __enter__(self) -> NoTransfers:
        self._from_python = _NothingFromPython()
        self._from_python.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._from_python.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} needs a value of the device"
        out = func(*args, **(kwargs or {}))
        # A scalar on the host may be an operand anywhere; it is passed on with the kernel.
        devices = {tensor.device for tensor in _tensors((args, kwargs, out)) if tensor.dim()}
        assert len(devices) <= 1, f"{name} goes between {devices}"
        return out


class _NothingFromPython(TorchFunctionMode):
    """Fails where numbers of Python or numpy become a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy), f"{func.__name__} brings values"
        return func(*args, **(kwargs or {}))


class ByteMeter(TorchDispatchMode):
    """Counts the bytes that operations read and write, in arrays [rows, vocab] of float32."""

    # These touch as many elements of their first operand as they have indices.
    SPARSE = ("gather", "index", "index_put_", "scatter_", "searchsorted", "embedding")
    VIEWS = ("slice", "view", "unsqueeze", "squeeze", "expand", "reshape", "_unsafe_view", "alias", "unflatten", "t", "detach")

    def __init__(self, rows: int, vocab: int) -> None:
        super().__init__()
        self.unit = rows * vocab * 4
        self.bytes = 0

    @property
    def passes(self) -> float:
        return self.bytes / self.unit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.VIEWS:
            return out
        operands = list(_tensors((args, kwargs)))
        results = list(_tensors(out))
        if name in self.SPARSE:
            # Sorted rows are searched, not read.
            moved = 2 * sum(_size(tensor) for tensor in operands[1:]) + (_size(results[0]) if not name.endswith("_") else 0)
        else:
            moved = sum(_size(tensor) for tensor in (*operands, *results))
        self.bytes += moved
        return out


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
