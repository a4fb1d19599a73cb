"""Statistics that are recorded of log-softmax rows, computed on their device in few passes over the vocabulary.

A pass reads or writes an array [rows, vocab] of float32 once. With both models, a draw takes 6 and the statistics 14; nothing
here waits for the device or asks it for a value. Beside the rows themselves, up to four such arrays are held at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from actors.vllm_plugin.record_table import FLOATS, HIDDEN, INTS
from kdray.rollouts.columns import Column, recorded_columns
from kdray.rollouts.mixture import draw_mixed, log_mixture


class Rows(NamedTuple):
    """Log-softmax rows over the shared vocabulary, float32 [rows, vocab]; None for a model that this engine does not hold, or
    that it did not run."""

    teacher: torch.Tensor | None
    student: torch.Tensor | None
    hidden: torch.Tensor | None
    """The teacher's last hidden states, [rows, teacher width]; None without a teacher."""


class Probabilities(NamedTuple):
    """Exponentials of `Rows`, [rows, vocab]."""

    teacher: torch.Tensor | None
    student: torch.Tensor | None


class Statistics(NamedTuple):
    """Recorded columns as tensors [rows, columns], of which `actors.vllm_plugin.record_table.Slab` has the arrays."""

    floats: torch.Tensor  # float32, as FLOATS
    ints: torch.Tensor  # int32, as INTS
    hidden: torch.Tensor  # float16, as HIDDEN


def measured_columns(teacher: bool, student: bool, hidden: bool) -> tuple[Column, ...]:
    """Columns that an engine with these models can fill. Args: hidden: whether hidden states are recorded."""
    return tuple(
        column
        for column in recorded_columns()
        if (student or not column.of_student)
        and (teacher or column.stage != "scoring")
        and (hidden or column not in HIDDEN.wide)
    )


def probabilities(rows: Rows) -> Probabilities:
    """Both models' probabilities."""
    return Probabilities(*(None if part is None else part.exp() for part in (rows.teacher, rows.student)))


def draw_rows(masses: Probabilities, alpha: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Token ids [n] drawn from alpha p + (1 - alpha) q; from the only model, if there is one. Args: alpha: [n, 1]."""
    if masses.teacher is None or masses.student is None:
        # The engine rejects any alpha except the one at which the missing model drops out.
        return draw_mixed([(torch.ones_like(alpha), _either(*masses))], uniforms)
    return draw_mixed([(alpha, masses.teacher), (1.0 - alpha, masses.student)], uniforms)


class RowStatistics:
    """Measurement of rows: which ids belong to the support, and whether hidden states are recorded."""

    def __init__(self, teacher_top_k: int, student_top_k: int, record_hidden: bool) -> None:
        self.teacher_top_k = teacher_top_k
        self.student_top_k = student_top_k
        self.record_hidden = record_hidden

    def measure(
        self,
        rows: Rows,
        masses: Probabilities,
        tokens: torch.Tensor,
        versions: torch.Tensor,
        *,
        alpha: torch.Tensor | None = None,
        asked: torch.Tensor | None = None,
        top_k: bool = True,
    ) -> Statistics:
        """All recorded columns of rows [n, vocab] at tokens [n]; nan, or of width 0, for columns of a model without rows.

        Args: masses: the rows' probabilities, overwritten; versions: [n] int64 versions of the student; alpha: [n, 1], None for
              tokens that the mixture did not draw; asked: [n, M] ids that come first in the support; top_k: whether the support
              also holds the models' own top ids.
        """
        teacher, student = rows.teacher, rows.student
        count, device = len(tokens), tokens.device
        at = tokens.unsqueeze(-1)
        measured = measured_columns(teacher is not None, student is not None, self.record_hidden)
        nothing = torch.full((count, 1), torch.nan, device=device)
        floats = {column.name: nothing for column in FLOATS.single if column not in measured}
        floats |= {column.name: nothing[:, :0] for column in FLOATS.wide if column not in measured}
        support = torch.empty((count, 0), dtype=torch.long, device=device)
        if student is not None:
            floats["student_logprobs"] = student.gather(-1, at)
        if teacher is not None:
            support, floor = self._support(teacher, student, asked, top_k)
            floats["teacher_logprobs"] = teacher.gather(-1, at)
            floats["support_logprobs"] = teacher.gather(-1, support.clamp(min=0)).masked_fill_(support < 0, -torch.inf)
            if student is not None:
                unknown = (floats["teacher_logprobs"] + floats["student_logprobs"]).isnan()
                reverse_kl, forward_kl = _divergences(rows, masses)
                floats["reverse_kl"] = reverse_kl.masked_fill_(unknown, torch.nan)
                floats["forward_kl"] = forward_kl.masked_fill_(unknown, torch.nan)
            # Last: it overwrites the teacher's probabilities.
            assert masses.teacher is not None
            floats["tail_logprobs"] = _log_outside(masses.teacher, support, floor)
        if teacher is not None and student is not None and alpha is not None:
            floats["mixture_logprobs"] = log_mixture(floats["teacher_logprobs"], floats["student_logprobs"], alpha)
        else:
            floats["mixture_logprobs"] = floats["teacher_logprobs" if teacher is not None else "student_logprobs"]
        ints = {"token_ids": at, "student_versions": versions.unsqueeze(-1), "support_ids": support}
        hidden = torch.empty((count, 0), dtype=torch.float16, device=device)
        if self.record_hidden and rows.hidden is not None:
            hidden = rows.hidden.to(torch.float16)
        return Statistics(
            torch.cat([floats[name] for name in FLOATS.names], dim=-1),
            torch.cat([ints[name] for name in INTS.names], dim=-1).to(torch.int32),
            hidden,
        )

    def _support(
        self, teacher: torch.Tensor, student: torch.Tensor | None, asked: torch.Tensor | None, top_k: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Support [n, K]: requested ids, then the teacher's top-k, then the student's; -1 for an id that already occurs to the
        left. And the teacher's highest logprob outside it, [n, 1]."""
        vocab = teacher.shape[-1]
        width = 0 if asked is None else asked.shape[-1]
        if top_k:
            width += self.teacher_top_k + self.student_top_k
        # One id more than the support can hold: at least one of these is outside.
        best = teacher.topk(min(width + 1, vocab), dim=-1)
        parts = [] if asked is None else [asked]
        if top_k:
            parts.append(best.indices[:, : self.teacher_top_k])
            if student is not None and self.student_top_k and parts[-1].shape[-1] < vocab:
                parts.append(student.topk(min(self.student_top_k, vocab), dim=-1).indices)
        support = torch.empty((len(teacher), 0), dtype=torch.long, device=teacher.device)
        for part in parts:
            support = torch.cat([support, part.masked_fill(_among(part, support), -1)], dim=-1)
        outside = best.values.masked_fill(_among(best.indices, support), -torch.inf)
        return support, outside.amax(-1, keepdim=True)


def _divergences(rows: Rows, masses: Probabilities) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) and KL(teacher || student), nats, [n, 1]; a zero probability contributes nothing."""
    assert rows.teacher is not None
    assert rows.student is not None
    assert masses.teacher is not None
    assert masses.student is not None
    gap = rows.teacher - rows.student
    # Zero probability times infinite gap is nan, and is left out of the sum.
    forward = (masses.teacher * gap).nansum(-1, keepdim=True)
    return -gap.mul_(masses.student).nansum(-1, keepdim=True), forward


def _log_outside(mass: torch.Tensor, support: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Log of each row's mass outside the support, [n, 1]; -inf if that is none. Overwrites `mass`.

    Args: floor: the highest logprob outside; it stands for a mass that underflows.
    """
    if not support.shape[-1]:
        return torch.zeros_like(floor)
    # Slots without an id repeat one of the row's own; a row without any has all of its mass outside.
    own = support.amax(-1, keepdim=True)
    outside = mass.scatter_(-1, support.where(support >= 0, own).clamp_(min=0), 0.0).sum(-1, keepdim=True)
    return torch.maximum(outside.log(), floor).masked_fill_(own < 0, 0.0)


def _among(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mask [n, K] of the ids [n, K] that occur in the same row of others [n, M]."""
    return (ids.unsqueeze(-1) == others.unsqueeze(-2)).any(-1)


def _either(teacher: torch.Tensor | None, student: torch.Tensor | None) -> torch.Tensor:
    rows = teacher if teacher is not None else student
    assert rows is not None
    return rows
