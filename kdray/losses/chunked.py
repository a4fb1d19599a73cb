"""Full-vocabulary divergence from hidden states, computed in chunks of rows.

The logits of all tokens never exist at once: each chunk is turned into logits, rows, value and gradient, then freed. What is
kept is the gradient of the hidden states and of the student's head, each of the size of its tensor. The gradient is computed
together with the value, since a separate backward pass would recompute every chunk's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from kdray.errors import TrainingError
from kdray.losses.batch import check_columns, log_rows
from kdray.losses.support import Buckets, full_rows

DEFAULT_CHUNK_ROWS = 128
"""Rows per chunk: at 152k ids about 75 MiB for each of the about ten float32 tensors that a divergence needs."""


def chunked_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    divergence: Callable[[Buckets], torch.Tensor],
    vocab_size: int,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of `divergence` over N positions, with rows computed by both models' heads, nats; a scalar, at least float32.

    Differentiable once, in the student's hidden states, head and bias; the teacher gets no gradient. Logits are computed in the
    dtype of the hidden states, rows and their sums in float32 (float64 stays).
    Args: student_hidden, teacher_hidden: [N, d_student], [N, d_teacher], after the final norm, in the dtype of their head;
          student_head, teacher_head: [vocab >= vocab_size, d]; further rows are embedding padding, cut before the softmax;
          divergence: one value per row, such as `kdray.losses.divergence_of(settings)`;
          chunk_rows: rows per chunk; more rows take more memory, and less of the time to accumulate head gradients;
          student_bias, teacher_bias: [vocab], if the head has one; token_ids: [N] long, for `hinton`'s hard labels.
    Raises: VocabError if a head has fewer rows than `vocab_size`; TrainingError if the numbers of positions differ
    or `chunk_rows` is not positive.
    """
    if chunk_rows < 1:
        raise TrainingError(f"chunk_rows={chunk_rows}: a chunk holds at least one row; leave it at {DEFAULT_CHUNK_ROWS}")
    if len(student_hidden) != len(teacher_hidden):
        raise TrainingError(
            f"{len(student_hidden)} positions of the student but {len(teacher_hidden)} of the teacher; "
            "take the hidden states of both at the same masked positions"
        )
    for owner, head in (("student", student_head), ("teacher", teacher_head)):
        check_columns(f"{owner}'s logits", len(head), vocab_size)
    teacher_head, teacher_bias = teacher_head[:vocab_size].detach(), _cut(teacher_bias, vocab_size)

    def chunk_value(rows: slice, student_logits: torch.Tensor) -> torch.Tensor:
        """The divergence of a chunk from the student's logits; the teacher's are computed here and freed afterwards."""
        with torch.no_grad():
            teacher_rows = log_rows(linear(teacher_hidden[rows], teacher_head, teacher_bias))
        ids = None if token_ids is None else token_ids[rows]
        return divergence(full_rows(teacher_rows, log_rows(student_logits), ids)).sum()

    return _Chunked.apply(student_hidden, student_head, student_bias, chunk_value, vocab_size, chunk_rows)


def _cut(bias: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    return None if bias is None else bias[:vocab_size]


class _Chunked(torch.autograd.Function):
    """Sum of `chunk_value(rows, logits)` over chunks of rows, with the gradient of hidden states, head and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        chunk_value: Callable[[slice, torch.Tensor], torch.Tensor],
        vocab_size: int,
        chunk_rows: int,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        wants_hidden, wants_head, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Sums over chunks are accumulated in float32: in bfloat16 the later chunks would be rounded away.
        grad_head = torch.zeros_like(head, dtype=wide) if wants_head else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants_bias else None
        used_head, used_bias = head[:vocab_size], _cut(bias, vocab_size)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = linear(hidden[rows], used_head, used_bias)
            if not any(ctx.needs_input_grad):
                total += chunk_value(rows, logits)
                continue
            with torch.enable_grad():
                value = chunk_value(rows, logits.requires_grad_())
            (grad,) = torch.autograd.grad(value, logits)  # [rows, vocab] in the dtype of the logits
            total += value.detach()
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ used_head
            if grad_head is not None and grad_head.dtype == grad.dtype:
                grad_head[:vocab_size].addmm_(grad.T, hidden[rows])
            elif grad_head is not None:
                grad_head[:vocab_size] += grad.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias[:vocab_size] += grad.sum(0, dtype=wide)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_head is None else grad_head.to(head.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The incoming scale is float32; gradients keep the dtype of their tensor.
        scaled = (None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None)
