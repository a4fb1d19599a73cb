"""Teacher and student restricted to the recorded support plus one bucket for everything else.

With the tail bucket both sides stay probability distributions: a divergence between them is a lower bound of the one
over the whole vocabulary, grows with the support, and equals it once the support covers all ids. Dropping the tail
instead would pay the student for moving mass out of the support.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdray.losses.batch import LossBatch


@dataclass(frozen=True)
class Buckets:
    """Two distributions over K support ids and their tail, at N positions. Absent buckets hold 0 and count nothing."""

    teacher: torch.Tensor  # [N, K + 1] log p, the tail last
    student: torch.Tensor  # [N, K + 1] log q, with gradient
    present: torch.Tensor  # [N, K + 1] bool: slot in use; for the tail, some id lies outside the support

    def sum(self, terms: torch.Tensor) -> torch.Tensor:
        """Sum of `terms` [N, K + 1] over all positions and present buckets."""
        return terms.masked_fill(~self.present, 0.0).sum()

    def reverse_kl(self) -> torch.Tensor:
        """Sum over positions of KL(student || teacher), nats."""
        return self.sum(kl_terms(self.student, self.teacher))

    def forward_kl(self) -> torch.Tensor:
        """Sum over positions of KL(teacher || student), nats."""
        return self.sum(kl_terms(self.teacher, self.student))

    def metric_sums(self) -> dict[str, torch.Tensor]:
        """Detached sums that every support loss reports: the KL that the support sees, both masses outside of it."""
        tail = self.present[:, -1]
        return {
            "reverse_kl_support": self.reverse_kl().detach(),
            "teacher_tail_mass": self.teacher[:, -1].exp().masked_fill(~tail, 0.0).sum(),
            "student_tail_mass": self.student[:, -1].detach().exp().masked_fill(~tail, 0.0).sum(),
        }


def kl_terms(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """exp(first) * (first - second), elementwise: the summands of KL(first || second); 0 where first is -inf."""
    return first.exp() * (first.clamp(min=torch.finfo(first.dtype).min) - second)


def buckets(student_rows: torch.Tensor, batch: LossBatch) -> Buckets:
    """Both models on the batch's support and its tail.

    The student's tail is a logsumexp over the ids outside the support, not log(1 - Q): that one loses all digits, and
    its gradient, once Q is near 1.
    Args: student_rows: [N, vocab] log-softmax at the masked positions, from `LossBatch.masked_rows`.
    Source: chain rule of KL over the partition {each support id, the rest}; Cover & Thomas, theorem 2.5.3.
    """
    ids = batch.masked("support_ids")  # [N, K]
    num_rows, vocab = student_rows.shape
    used = ids >= 0
    has_tail = used.sum(-1, keepdim=True) < vocab  # [N, 1]
    # Unused slots land in a further column, which is cut off again.
    inside = torch.zeros(num_rows, vocab + 1, dtype=torch.bool, device=ids.device)
    inside = inside.scatter_(-1, ids.where(used, vocab), True)[:, :vocab]
    # A fully covered row is all -inf; its tail is absent below, and no gradient passes a masked fill.
    outside = student_rows.masked_fill(inside, -torch.inf)
    present = torch.cat([used, has_tail], dim=-1)
    student = torch.cat(
        [student_rows.gather(-1, ids.clamp(min=0)), outside.logsumexp(-1, keepdim=True)], dim=-1
    ).masked_fill(~present, 0.0)
    teacher = torch.cat([batch.masked("support_logprobs"), batch.masked("tail_logprobs").unsqueeze(-1)], dim=-1).to(
        student.dtype
    )
    return Buckets(teacher=teacher.masked_fill(~present, 0.0), student=student, present=present)
