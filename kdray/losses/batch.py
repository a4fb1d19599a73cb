"""Input and output of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from kdray.errors import TrainingError, VocabError
from kdray.rollouts.columns import loss_columns
from kdray.types import TrainBatch

_COLUMNS = loss_columns()
_INDICES = frozenset(column.name for column in _COLUMNS if column.width == "support" and issubclass(column.dtype, np.integer))
"""Columns of ids, used as indices."""


@dataclass(frozen=True)
class LossBatch:
    """Tensors of one micro-batch, aligned with the token that they describe.

    Only positions where `mask` is True are read; the others may hold anything. Columns that were not recorded are None.
    They are those that `kdray.rollouts.columns` names for a loss.
    """

    token_ids: torch.Tensor  # [B, S] long
    mask: torch.Tensor  # [B, S] bool, True at targets, possibly with gaps in between; a row is one rollout
    vocab_size: int
    """Token ids that teacher and student share; further columns of the student's logits are embedding padding."""
    mixture_logprobs: torch.Tensor | None = None  # [B, S] log m of the sampler
    student_logprobs: torch.Tensor | None = None  # [B, S] log q of the sampler
    teacher_logprobs: torch.Tensor | None = None  # [B, S] log p
    support_ids: torch.Tensor | None = None  # [B, S, K] long, all different (but for `uld`); -1 is an unused slot
    support_logprobs: torch.Tensor | None = None  # [B, S, K] log p at support_ids; -inf where unused
    tail_logprobs: torch.Tensor | None = None  # [B, S] log of the teacher's mass outside the support; -inf if it covers all
    log_z: torch.Tensor | None = None  # [B, S] log Z of an ensemble's geometric mean; None where one teacher gave the columns
    group: torch.Tensor | None = None  # [B, S] int, index in `groups`
    groups: tuple[str, ...] = ()
    """Names under which `by_group` aggregates."""
    weights: torch.Tensor | None = None  # [B, S] weight of a token in the loss; None where all count alike
    teacher_logits: torch.Tensor | None = None  # [B, S, vocab >= vocab_size]; where given, read instead of the support
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further columns, without a field of their own, by name."""
    all_targets: bool = False
    """`mask` is True everywhere, so that nothing has to be gathered: see `packed`."""

    @classmethod
    def from_train_batch(cls, batch: TrainBatch, vocab_size: int, device: torch.device | str = "cpu") -> LossBatch:
        """Convert a batch to tensors on `device`, without columns that no loss reads."""
        columns: dict[str, Any] = {}
        for column in _COLUMNS:
            if column.name in batch.columns:
                tensor = torch.from_numpy(batch.columns[column.name]).to(device)
                columns[column.name] = tensor.long() if column.name in _INDICES else tensor
        own = {each.name for each in fields(cls)}
        return cls(
            token_ids=torch.from_numpy(batch.token_ids).to(device, torch.long),
            mask=torch.from_numpy(batch.loss_mask).to(device),
            vocab_size=vocab_size,
            groups=batch.groups,
            more={name: tensor for name, tensor in columns.items() if name not in own},
            **{name: tensor for name, tensor in columns.items() if name in own},
        )

    def masked(self, name: str) -> torch.Tensor:
        """The column `name` at the N masked positions, row by row: [N] or [N, K].

        Raises: TrainingError if the sampler did not record it.
        """
        column = self.more[name] if name in self.more else getattr(self, name, None)
        if column is None:
            raise TrainingError(
                f"the batch has no column {name}, which this loss needs; let a teacher sample or score the rollouts first"
            )
        return self.at_targets(column)

    def at_targets(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [B, S, ...] at the N masked positions, row by row: [N, ...]."""
        return values.flatten(0, 1) if self.all_targets else values[self.mask]

    def packed(self) -> LossBatch:
        """The masked positions alone, one after the other in a single row, [1, N]: for losses that are sums over tokens."""
        return self._with_columns(lambda column: self.at_targets(column).unsqueeze(0), all_targets=True)

    def tokens(self, part: slice) -> LossBatch:
        """Some of the tokens of a packed batch, without copies."""
        return self._with_columns(lambda column: column[:, part], all_targets=self.all_targets)

    def _with_columns(self, change: Callable[[torch.Tensor], torch.Tensor], all_targets: bool) -> LossBatch:
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        changed: dict[str, Any] = {name: change(column) for name, column in columns.items() if isinstance(column, torch.Tensor)}
        more = {name: change(column) for name, column in self.more.items()}
        return replace(self, **changed, more=more, all_targets=all_targets)

    def shares(self, name: str, flags: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sums of `flags` [N] over all tokens, and over those of each group together with their number.

        The names are `name`, `<group>/name` and `<group>/tokens`; every group of the step is present, even if empty, since
        ranks are summed by name.
        """
        sums = {name: flags.sum()}
        if self.group is not None:
            index = self.group[self.mask]
            for number, group in enumerate(self.groups):
                inside = index == number
                sums[f"{group}/{name}"] = (flags & inside).sum()
                sums[f"{group}/tokens"] = inside.sum()
        return sums

    def masked_rows(self, student_logits: torch.Tensor) -> torch.Tensor:
        """Student log-softmax rows [N, vocab_size] at the masked positions, in float32 (float64 stays).

        Gathering before the softmax spends no memory on prompts and padding, and no gradient reaches them.
        Args: student_logits: [B, S, vocab >= vocab_size], any float dtype; [b, s] predicts token_ids[b, s].
        Raises: VocabError if the logits have fewer columns than `vocab_size`.
        """
        check_columns("student's logits", student_logits.shape[-1], self.vocab_size)
        return log_rows(self.at_targets(student_logits[..., : self.vocab_size]))


def log_rows(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the last dimension, in float32 (float64 stays)."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def check_columns(what: str, columns: int, vocab_size: int) -> None:
    """Raises: VocabError if `what` covers fewer ids than the shared vocabulary."""
    if columns < vocab_size:
        raise VocabError(
            f"the {what} have {columns} columns but the shared vocabulary has {vocab_size} ids; "
            "use models whose embeddings cover the teacher's tokenizer"
        )


@dataclass(frozen=True)
class LossOutput:
    """Sums over the masked tokens, so that any split into micro-batches and ranks adds up to the same numbers."""

    total: torch.Tensor
    """Scalar with gradient, nats; the caller divides it by the number of response tokens of the whole step."""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Detached scalars for `kdray.runs.metrics.reduce_sums`, by name."""
