"""Teacher and student over the same buckets: every id of the vocabulary, or a recorded support plus one tail bucket.

Only this module knows where rows come from; a divergence sees `Buckets` and returns one value per row.
With the tail bucket both sides remain probability distributions: an f-divergence between them is a lower bound of the one over
the whole vocabulary, grows with the support, and equals it once the support covers all ids. Without the tail, the student would
be rewarded for moving mass out of the support, so no loss here can drop it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdray.losses.batch import LossBatch, LossOutput, check_columns, log_rows


@dataclass(frozen=True)
class Buckets:
    """Two distributions over the same C buckets, at N positions. Absent buckets hold 0 and are not counted.

    C is K + 1 with a tail (K support ids, the tail last), or the size of the vocabulary without.
    """

    teacher: torch.Tensor  # [N, C] log p
    student: torch.Tensor  # [N, C] log q, with gradient
    present: torch.Tensor  # [N, C] bool: slot in use; for the tail, some id lies outside the support
    has_tail: bool = True
    """False if each bucket is one id of the vocabulary: all are present, and the divergence is exact."""
    token_logprobs: torch.Tensor | None = None  # [N] log q of the recorded token, with gradient

    @classmethod
    def joined(cls, parts: Sequence[Buckets]) -> Buckets:
        """The positions of all parts, one after the other. Args: parts: at least one, all over the same buckets."""
        tokens = [part.token_logprobs for part in parts if part.token_logprobs is not None]
        return cls(
            teacher=torch.cat([part.teacher for part in parts]),
            student=torch.cat([part.student for part in parts]),
            present=torch.cat([part.present for part in parts]),
            has_tail=parts[0].has_tail,
            token_logprobs=torch.cat(tokens) if tokens else None,
        )

    def part(self, rows: slice) -> Buckets:
        """Some of the positions, without copies."""
        tokens = None if self.token_logprobs is None else self.token_logprobs[rows]
        return replace(
            self, teacher=self.teacher[rows], student=self.student[rows], present=self.present[rows], token_logprobs=tokens
        )

    def detach(self) -> Buckets:
        """The same without the student's gradient."""
        tokens = None if self.token_logprobs is None else self.token_logprobs.detach()
        return replace(self, student=self.student.detach(), token_logprobs=tokens)

    def filled(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """`values` [N, C] with `fill` in the absent buckets."""
        return values.masked_fill(~self.present, fill) if self.has_tail else values

    def row_sums(self, terms: torch.Tensor) -> torch.Tensor:
        """Sum of `terms` [N, C] over the present buckets of each position, [N]."""
        return self.filled(terms, 0.0).sum(-1)

    def reverse_kl(self) -> torch.Tensor:
        """Sum over positions of KL(student || teacher), nats."""
        return self.row_sums(kl_terms(self.student, self.teacher)).sum()

    def metric_sums(self) -> dict[str, torch.Tensor]:
        """Detached sums that every support loss reports: the KL over the support, and both models' mass outside it."""
        tail = self.present[:, -1] if self.has_tail else torch.zeros_like(self.present[:, -1])
        with torch.no_grad():
            return {
                "reverse_kl_support": self.reverse_kl(),
                "teacher_tail_mass": self.teacher[:, -1].exp().masked_fill(~tail, 0.0).sum(),
                "student_tail_mass": self.student[:, -1].exp().masked_fill(~tail, 0.0).sum(),
            }


def kl_terms(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """exp(first) * (first - second), elementwise: the summands of KL(first || second); 0 where first is -inf."""
    # Both -inf would be 0 x inf; a masked fill also stops the gradient there.
    return first.exp() * (first - second).masked_fill(first == -torch.inf, 0.0)


def log_mixture(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """log(share exp(first) + (1 - share) exp(second)), elementwise, for 0 < share < 1."""
    # Where both are -inf, the derivative of logaddexp is 0 / 0: far below any logarithm of a mass is as good.
    far = 0.5 * torch.finfo(first.dtype).min
    return torch.logaddexp(first.clamp(min=far) + math.log(share), second.clamp(min=far) + math.log1p(-share))


def buckets(student_rows: torch.Tensor, batch: LossBatch) -> Buckets:
    """Both models over the batch's support and tail, or over the whole vocabulary if the batch has the teacher's logits.

    The student's tail is a logsumexp over the ids outside the support rather than log(1 - Q), which loses all digits, and its
    gradient, once Q is near 1.
    Args: student_rows: [N, vocab] log-softmax at the masked positions, from `LossBatch.masked_rows`.
    Source: chain rule of KL over the partition {each support id, the rest}; Cover & Thomas, theorem 2.5.3.
    """
    token_ids = batch.masked("token_ids")
    if batch.teacher_logits is not None:
        check_columns("teacher's logits", batch.teacher_logits.shape[-1], batch.vocab_size)
        teacher_rows = log_rows(batch.at_targets(batch.teacher_logits[..., : batch.vocab_size]).detach())
        return full_rows(teacher_rows, student_rows, token_ids)
    ids = batch.masked("support_ids")  # [N, K]
    num_rows, vocab = student_rows.shape
    used = ids >= 0
    has_tail = used.sum(-1, keepdim=True) < vocab  # [N, 1]
    # Unused slots scatter into an extra column, which is then removed.
    inside = torch.zeros(num_rows, vocab + 1, dtype=torch.bool, device=ids.device)
    inside = inside.scatter_(-1, ids.where(used, vocab), True)[:, :vocab]
    # A fully covered row is all -inf; its tail is absent below, and no gradient flows through a masked fill.
    outside = student_rows.masked_fill(inside, -torch.inf)
    present = torch.cat([used, has_tail], dim=-1)
    student = torch.cat([student_rows.gather(-1, ids.clamp(min=0)), outside.logsumexp(-1, keepdim=True)], dim=-1).masked_fill(
        ~present, 0.0
    )
    teacher = torch.cat([batch.masked("support_logprobs"), batch.masked("tail_logprobs").unsqueeze(-1)], dim=-1).to(
        student.dtype
    )
    return Buckets(
        teacher=teacher.masked_fill(~present, 0.0),
        student=student,
        present=present,
        token_logprobs=at_tokens(student_rows, token_ids),
    )


@torch.no_grad()
def logits_gradient(
    student_rows: torch.Tensor,
    found: Buckets,
    batch: LossBatch,
    of_student: torch.Tensor | None,
    of_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of a loss in the student's logits, [N, vocab], from its gradient in `buckets(student_rows, batch)`.

    With g the gradient in a bucket, S the support and T the student's mass outside it:
    d/dz_j = [j in S] g_j + [j not in S] g_tail q_j / T - q_j sum g, and as much for the recorded token.
    Args: student_rows: [N, vocab] log-softmax, overwritten; found: the buckets; of_student: [N, K + 1], gradient in
          `found.student`; of_tokens: [N], in `found.token_logprobs`; None where the loss does not read it.
    """
    num_rows, vocab = student_rows.shape
    # Unused slots of the support scatter into an extra column, which is then removed.
    gradient = student_rows.new_zeros(num_rows, vocab + 1)
    total = student_rows.new_zeros(num_rows, 1)
    if of_student is not None:
        of_student = found.filled(of_student, 0.0)
        ids = batch.masked("support_ids")
        ids = ids.where(ids >= 0, vocab)
        # As a difference of logarithms: T itself may underflow.
        torch.sub(student_rows, found.student[:, -1:], out=gradient[:, :vocab])
        gradient.exp_().scatter_(-1, ids, 0.0).mul_(of_student[:, -1:]).scatter_add_(-1, ids, of_student[:, :-1])
        total += of_student.sum(-1, keepdim=True)
    if of_tokens is not None:
        gradient.scatter_add_(-1, batch.masked("token_ids").unsqueeze(-1), of_tokens.unsqueeze(-1))
        total += of_tokens.unsqueeze(-1)
    return gradient[:, :vocab].sub_(student_rows.exp_().mul_(total))


def full_rows(teacher_rows: torch.Tensor, student_rows: torch.Tensor, token_ids: torch.Tensor | None = None) -> Buckets:
    """Both models over the whole vocabulary. Args: log-softmax rows [N, vocab]; token_ids: [N] recorded tokens, if known."""
    return Buckets(
        teacher=teacher_rows.to(student_rows.dtype),
        student=student_rows,
        present=torch.ones((), dtype=torch.bool, device=student_rows.device).expand(student_rows.shape),  # takes no memory
        has_tail=False,
        token_logprobs=None if token_ids is None else at_tokens(student_rows, token_ids),
    )


def at_tokens(rows: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """rows[n, token_ids[n]], [N]."""
    return rows.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


Divergence = Callable[[Buckets, Any], torch.Tensor]
"""(buckets, the loss's settings) -> one value per position [N], nats, with the student's gradient."""


def buckets_loss(implementation: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    """Wrap a loss that reads buckets, `f(rows, batch, settings)`, as a loss that reads logits."""

    def loss(student_logits: torch.Tensor, batch: LossBatch, settings: Any, **step: Any) -> LossOutput:
        return implementation(buckets(batch.masked_rows(student_logits), batch), batch, settings, **step)

    loss.__doc__ = implementation.__doc__
    return loss


def divergence_loss(divergence: Divergence) -> Callable[..., LossOutput]:
    """Wrap a divergence as a loss that sums it over the masked tokens of a batch, with prefixes taken as given."""

    def loss(student_logits: torch.Tensor, batch: LossBatch, settings: Any) -> LossOutput:
        return divergence_sum(divergence, buckets(batch.masked_rows(student_logits), batch), settings)

    loss.__doc__ = divergence.__doc__
    return loss


def divergence_sum(divergence: Divergence, rows: Buckets, settings: Any) -> LossOutput:
    """Sum of a divergence over positions, with the sums that every support loss reports."""
    return LossOutput(total=divergence(rows, settings).sum(), sums=rows.metric_sums())
