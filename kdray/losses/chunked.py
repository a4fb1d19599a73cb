"""Losses from hidden states, computed in chunks of tokens inside the output head.

The logits of all tokens never exist at once: each chunk is turned into logits, rows, value and gradient, then freed. What is
kept is the gradient of the hidden states and of the student's head, each of the size of its tensor. The gradient is computed
together with the value, since a separate backward pass would recompute every chunk's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from kdray.errors import TrainingError
from kdray.losses.batch import LossBatch, LossOutput, check_columns, log_rows
from kdray.losses.head_products import head_products
from kdray.losses.objective import Objective
from kdray.losses.support import Buckets, buckets, full_rows, logits_gradient

DEFAULT_CHUNK_ROWS = 128
"""Rows per chunk: at 152k ids about 75 MiB for each of the about ten float32 tensors that a divergence needs."""

Terms = list[tuple[torch.Tensor, torch.Tensor | None]]
"""Tensors computed from a chunk's logits, each with the gradient of the loss in it; None if it is a part of the loss itself."""

Gradients = tuple[torch.Tensor | None, torch.Tensor | None]
"""Gradient of a loss in log q of the buckets [N, C] and of the recorded tokens [N]; None for what it does not read."""


def as_it_is(products: torch.Tensor) -> torch.Tensor:
    """Logits of a head whose products are the logits."""
    return products


def chunked_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    batch: LossBatch,
    objective: Objective,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    after_head: Callable[[torch.Tensor], torch.Tensor] = as_it_is,
    logits_dtype: torch.dtype | None = None,
) -> LossOutput:
    """The loss of a batch from hidden states at its N masked positions: the value and gradient that all logits would give.

    A loss that reads `token` is computed chunk by chunk. One that reads `buckets` gets those of all tokens, which need no
    vocabulary; its gradient in them then goes through each chunk, whose logits are computed a second time.
    Differentiable once, in hidden states, head and bias. Rows and their sums are computed in float32 (float64 stays).
    Args: hidden: [N, d], the states that predict the masked tokens, row by row; head: [vocab >= vocab_size, d]; bias: [vocab];
          batch: with a support, not with the teacher's logits, if the loss reads buckets; chunk_rows: tokens per chunk;
          after_head: scaling or capping between the head's products and the logits, elementwise; logits_dtype: None computes
          logits in the dtype of the hidden states.
    Raises: VocabError if the head has fewer rows than the shared vocabulary; TrainingError if the numbers of tokens differ,
    `chunk_rows` is not positive, or the loss reads whole logits.
    """
    _check(chunk_rows, len(head), batch.vocab_size)
    if objective.reads == "logits" or (objective.reads == "buckets" and batch.teacher_logits is not None):
        raise TrainingError("a loss that reads whole logits cannot be computed in chunks; give its function all logits")
    tokens = batch.packed()
    if len(hidden) != tokens.mask.numel():
        raise TrainingError(
            f"{len(hidden)} hidden states for {tokens.mask.numel()} masked tokens; take the states at the positions that "
            "predict them"
        )
    chunks = _Chunks(tokens, objective, after_head)
    if objective.reads == "token":
        # With the teacher's logits the buckets are whole rows, which autograd takes through.
        of_buckets = objective.of_buckets is not None and batch.teacher_logits is None
        terms = chunks.by_buckets if of_buckets else chunks.by_logits
        total = _Chunked.apply(hidden, head, bias, terms, batch.vocab_size, chunk_rows, logits_dtype)
        return LossOutput(total, chunks.sums)
    with torch.no_grad():
        used_head, used_bias = head[: batch.vocab_size], _cut(bias, batch.vocab_size)
        parts = [
            chunks.found(rows, after_head(head_products(hidden[rows], used_head, used_bias, logits_dtype)))[1]
            for rows in _slices(len(hidden), chunk_rows)
        ]
    both = Buckets.joined(parts)
    value, gradients = chunks.evaluated(both, batch)
    again = partial(chunks.again, both=both, gradients=gradients)
    # The value of the chunks is 0: only the gradient is missing.
    total = value + _Chunked.apply(hidden, head, bias, again, batch.vocab_size, chunk_rows, logits_dtype)
    return LossOutput(total, chunks.sums)


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
    after_head: Callable[[torch.Tensor], torch.Tensor] = as_it_is,
    logits_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum of `divergence` over N positions, with rows computed by both models' heads, nats; a scalar, at least float32.

    Differentiable once, in the student's hidden states, head and bias; the teacher gets no gradient. Rows and their sums are
    computed in float32 (float64 stays).
    Args: student_hidden, teacher_hidden: [N, d_student], [N, d_teacher], after the final norm, in the dtype of their head;
          student_head, teacher_head: [vocab >= vocab_size, d]; further rows are embedding padding, cut before the softmax;
          divergence: one value per row, such as `kdray.losses.divergence_of(settings)`;
          chunk_rows: rows per chunk; more rows take more memory, and less of the time to accumulate head gradients;
          student_bias, teacher_bias: [vocab], if the head has one; token_ids: [N] long, for `hinton`'s hard labels;
          after_head: as for `chunked_loss`, of the student; logits_dtype: as for `chunked_loss`, of both models.
    Raises: VocabError if a head has fewer rows than `vocab_size`; TrainingError if the numbers of positions differ
    or `chunk_rows` is not positive.
    """
    _check(chunk_rows, len(student_head), vocab_size)
    check_columns("teacher's logits", len(teacher_head), vocab_size)
    if len(student_hidden) != len(teacher_hidden):
        raise TrainingError(
            f"{len(student_hidden)} positions of the student but {len(teacher_hidden)} of the teacher; "
            "take the hidden states of both at the same masked positions"
        )
    teacher_head, teacher_bias = teacher_head[:vocab_size].detach(), _cut(teacher_bias, vocab_size)

    def chunk_value(rows: slice, products: torch.Tensor) -> Terms:
        """The divergence of a chunk from the student's logits; the teacher's are computed here and freed afterwards."""
        with torch.no_grad():
            teacher_rows = log_rows(head_products(teacher_hidden[rows], teacher_head, teacher_bias, logits_dtype))
        ids = None if token_ids is None else token_ids[rows]
        return [(divergence(full_rows(teacher_rows, log_rows(after_head(products)), ids)).sum(), None)]

    return _Chunked.apply(student_hidden, student_head, student_bias, chunk_value, vocab_size, chunk_rows, logits_dtype)


def _check(chunk_rows: int, head_rows: int, vocab_size: int) -> None:
    if chunk_rows < 1:
        raise TrainingError(f"chunk_rows={chunk_rows}: a chunk holds at least one row; leave it at {DEFAULT_CHUNK_ROWS}")
    check_columns("student's logits", head_rows, vocab_size)


def _slices(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of consecutive rows; an empty one if there is no row, so that names of sums are known even then."""
    return (slice(start, start + chunk_rows) for start in range(0, max(num_rows, 1), chunk_rows))


def _cut(bias: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    return None if bias is None else bias[:vocab_size]


@dataclass
class _Chunks:
    """Terms of an objective over chunks of tokens."""

    tokens: LossBatch
    """All tokens, packed."""
    objective: Objective
    after_head: Callable[[torch.Tensor], torch.Tensor]
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sums of the loss over what has been evaluated."""

    def by_logits(self, rows: slice, products: torch.Tensor) -> Terms:
        """A part of the loss, differentiated by autograd through its logits."""
        output = self.objective.of_logits(self.after_head(products).unsqueeze(0), self.tokens.tokens(rows))
        self._add(output.sums)
        return [(output.total, None)]

    def by_buckets(self, rows: slice, products: torch.Tensor) -> Terms:
        """A part of the loss, and its gradient in the logits."""
        logits = self.after_head(products)
        student, found = self.found(rows, logits)
        part = self.tokens.tokens(rows)
        value, gradients = self.evaluated(found, part)
        return [(value, None), (logits, logits_gradient(student, found, part, *gradients).to(logits.dtype))]

    def again(self, rows: slice, products: torch.Tensor, both: Buckets, gradients: Gradients) -> Terms:
        """The gradient in a chunk's logits of a loss of the buckets of all tokens."""
        logits = self.after_head(products)
        part = self.tokens.tokens(rows)
        with torch.no_grad():
            student = part.masked_rows(logits.unsqueeze(0))
        mine = [None if gradient is None else gradient[rows] for gradient in gradients]
        return [(logits, logits_gradient(student, both.part(rows), part, *mine).to(logits.dtype))]

    @torch.no_grad()
    def found(self, rows: slice, logits: torch.Tensor) -> tuple[torch.Tensor, Buckets]:
        """The student's rows of a chunk, and both models' buckets; without gradient."""
        part = self.tokens.tokens(rows)
        student = part.masked_rows(logits.unsqueeze(0))
        return student, buckets(student, part)

    def evaluated(self, found: Buckets, batch: LossBatch) -> tuple[torch.Tensor, Gradients]:
        """Value of the loss, and its gradients in log q of the buckets and of the recorded tokens."""
        assert self.objective.of_buckets is not None
        assert found.token_logprobs is not None
        leaves = (found.student.requires_grad_(), found.token_logprobs.requires_grad_())
        with torch.enable_grad():
            output = self.objective.of_buckets(found, batch)
        self._add(output.sums)
        of_student, of_tokens = torch.autograd.grad(output.total, leaves, allow_unused=True)
        return output.total.detach(), (of_student, of_tokens)

    def _add(self, sums: dict[str, torch.Tensor]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


class _Chunked(torch.autograd.Function):
    """Sum of the terms `chunk_terms(rows, products)` over chunks of rows, with the gradient of hidden states, head and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        chunk_terms: Callable[[slice, torch.Tensor], Terms],
        vocab_size: int,
        chunk_rows: int,
        logits_dtype: torch.dtype | None,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        wants_hidden, wants_head, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Sums over chunks are accumulated in float32: in bfloat16 the later chunks would be rounded away.
        grad_head = torch.zeros_like(head, dtype=wide) if wants_head else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants_bias else None
        used_head, used_bias = head[:vocab_size], _cut(bias, vocab_size)
        wanted = any(ctx.needs_input_grad)
        for rows in _slices(len(hidden), chunk_rows):
            products = head_products(hidden[rows], used_head, used_bias, logits_dtype).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                terms = chunk_terms(rows, products)
            total += sum(term.detach() for term, gradient in terms if gradient is None)
            if not wanted:
                continue
            grad = _gradient(terms, products)  # [rows, vocab] in the dtype of the products
            del products, terms
            if grad_bias is not None:
                grad_bias[:vocab_size] += grad.sum(0, dtype=wide)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ used_head
            if grad_head is not None and grad_head.dtype == grad.dtype:
                grad_head[:vocab_size].addmm_(grad.T, hidden[rows])
            elif grad_head is not None:
                grad_head[:vocab_size] += grad.T @ hidden[rows]
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
        return (*scaled, None, None, None, None)


def _gradient(terms: Terms, products: torch.Tensor) -> torch.Tensor:
    """Gradient of a chunk's part of the loss in the head's products."""
    wanted = [(term, gradient) for term, gradient in terms if term.requires_grad]
    if not wanted:
        # A chunk none of whose tokens counts.
        return torch.zeros_like(products)
    (found,) = torch.autograd.grad([term for term, _ in wanted], products, [gradient for _, gradient in wanted])
    return found
