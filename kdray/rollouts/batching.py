"""Padded batch of an optimizer step from rollouts or supervised examples, with its shards and micro-batches.

A loss is divided by the number of response tokens of the whole update, which every part carries; so neither the order of rows,
nor padding, nor the split over ranks and micro-batches changes its gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kdray.errors import DataError
from kdray.rollouts.columns import Column, batch_columns, target_mask, values_of
from kdray.types import Reference, Rollout, TrainBatch

_RECORDED = tuple(column for column in batch_columns() if column.stage != "batching")
"""Columns of a batch that rollouts already have."""
_MADE = {column.name: column for column in batch_columns() if column.stage == "batching"}

FRESH = "/staleness_0"
"""End of the names of groups whose tokens were sampled by the version that the step trains; see `token_groups`."""


def rollouts_to_batch(
    rollouts: Sequence[Rollout],
    step: int,
    dropped: Collection[int] = (),
    weights: Mapping[int, float] | None = None,
    advantages: Mapping[int, float] | None = None,
) -> TrainBatch:
    """Build a batch with one row per rollout, in order, and every per-token column that a loss may read and the rollouts have.

    Targets are the response tokens except those of the environment, which are context like the prompt.
    If a teacher wrote some of the rollouts without the student, columns that only some have are omitted: a loss on the text
    alone trains both kinds together, and one that needs more raises an error.
    Args: step: the optimizer step that trains them, counted from 1; it starts from student version `step - 1`; dropped: sample
          ids whose tokens are not targets; weights: loss weights of the rollouts, by sample id; None weighs all equally;
          advantages: of the rollouts in reward, by sample id; None without a reward.
    Raises: DataError if in any other case only some of the rollouts have a column.
    """
    batch = _pad(
        [rollout.sample_id for rollout in rollouts],
        [(rollout.prompt_ids, rollout.token_ids) for rollout in rollouts],
        step,
    )
    black_box = any(rollout.student_logprobs is None for rollout in rollouts)
    places = _Places.of(batch, rollouts)
    for column in _RECORDED:
        values = values_of(rollouts, column.name)
        known = [value for value in values if value is not None]
        if known and len(known) < len(rollouts) and not black_box:
            lacking = [rollout.sample_id for rollout, value in zip(rollouts, values, strict=True) if value is None]
            raise DataError(
                f"step {step}: samples {lacking[:8]} have no {column.name} while others of the batch do; "
                "let the same teacher score all rollouts of a batch"
            )
        if known and len(known) == len(rollouts):
            batch.columns[column.name] = places.column(column, known)
    is_target = target_mask(rollouts)
    groups, of_targets = token_groups(rollouts, step - 1)
    if rollouts:
        batch.columns["group"] = places.flat_column(_MADE["group"], of_targets, is_target)
    for name, given in (("weights", weights), ("advantages", advantages)):
        if given is not None:
            each = np.array([given[rollout.sample_id] for rollout in rollouts], dtype=np.float32)
            batch.columns[name] = places.flat_column(_MADE[name], np.repeat(each, places.lengths))
    kept = np.array([rollout.sample_id not in dropped for rollout in rollouts], dtype=bool)
    loss_mask = batch.loss_mask & kept[:, None]
    if not is_target.all():
        loss_mask[places.rows[~is_target], places.positions[~is_target]] = False
    return replace(batch, loss_mask=loss_mask, num_target_tokens=int(loss_mask.sum()), groups=groups)


def examples_to_batch(examples: Sequence[tuple[int, Reference]], step: int) -> TrainBatch:
    """Build a batch for supervised fine-tuning: a row per (prompt id, reference), with the prompt id as sample id. No columns.

    Targets are the tokens that the reference says the assistant wrote.
    """
    rows = [(reference.prompt_ids, reference.token_ids) for _, reference in examples]
    batch = _pad([prompt_id for prompt_id, _ in examples], rows, step)
    starts = np.array([len(prompt) for prompt, _ in rows], dtype=np.int64)
    loss_mask = np.zeros_like(batch.loss_mask)
    if rows:
        places = _places(starts, np.array([len(response) for _, response in rows], dtype=np.int64))
        loss_mask[places] = np.concatenate([reference.is_target for _, reference in examples])
    loss_mask &= batch.loss_mask
    return replace(batch, loss_mask=loss_mask, num_target_tokens=int(loss_mask.sum()))


def shard(batch: TrainBatch, rank: int, world_size: int) -> TrainBatch:
    """Return the rows of one rank, longest first: equal row counts on all ranks, token counts that differ by at most one row.

    Rows are dealt by length in snake order, so that the k-th micro-batches of all ranks also have rows of similar length.
    Padding rows fill up the last deal: every rank must run the same number of forward passes, which are collective.
    `num_target_tokens` remains that of the whole step.
    """
    return take_rows(batch, deal(batch.lengths, world_size)[:, rank])


def deal(lengths: np.ndarray, world_size: int) -> np.ndarray:
    """Return the rows that `shard` gives to the ranks, [deals, world_size]; -1 is a padding row."""
    by_length = np.argsort(-lengths, kind="stable")
    num_deals = -(-len(by_length) // world_size)
    dealt = np.full((num_deals, world_size), -1)
    dealt.ravel()[: len(by_length)] = by_length
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt


def micro_batches(batch: TrainBatch, micro_batch_size: int) -> Iterator[TrainBatch]:
    """Yield consecutive parts of at most `micro_batch_size` rows, each trimmed to its longest row (at least 1 token)."""
    for start in range(0, len(batch.lengths), micro_batch_size):
        yield take_rows(batch, np.arange(start, min(start + micro_batch_size, len(batch.lengths))))


def packed_micro_batches(batch: TrainBatch, longest: np.ndarray, tokens: int) -> Iterator[TrainBatch]:
    """Yield consecutive parts of as many rows as fit into `tokens` when padded to their longest one, at least one row each.

    The rows of a shard come longest first, so that rows of a part have similar lengths.
    Args: longest: [rows], the longest length that a row of this index has on any rank: all ranks then cut alike, and make the
          same number of passes, which are collective.
    """
    start = 0
    while start < len(longest):
        end, width = start + 1, max(1, int(longest[start]))
        while end < len(longest):
            width = max(width, int(longest[end]))
            if width * (end + 1 - start) > tokens:
                break
            end += 1
        yield take_rows(batch, np.arange(start, end))
        start = end


def _pad(sample_ids: list[int], rows: list[tuple[np.ndarray, np.ndarray]], step: int) -> TrainBatch:
    """Right-pad rows of (prompt ids, response ids)."""
    prompts = np.array([len(prompt) for prompt, _ in rows], dtype=np.int32)
    lengths = prompts + np.array([len(response) for _, response in rows], dtype=np.int32)
    width = max(1, int(lengths.max(initial=0)))
    token_ids = np.zeros((len(rows), width), dtype=np.int32)
    if rows:
        token_ids[_places(np.zeros_like(lengths), lengths)] = np.concatenate([part for row in rows for part in row])
    position = np.arange(width)
    loss_mask = (position >= prompts[:, None]) & (position < lengths[:, None])
    # Position 0 has no context to be predicted from.
    loss_mask[:, 0] = False
    return TrainBatch(
        step=step,
        sample_ids=np.array(sample_ids, dtype=np.int64),
        token_ids=token_ids,
        lengths=lengths.astype(np.int32),
        loss_mask=loss_mask,
        num_target_tokens=int(loss_mask.sum()),
    )


def _places(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, positions) of the tokens of all rows, concatenated, [T] each; row b starts at position `starts[b]`."""
    ends = np.cumsum(lengths)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return np.repeat(np.arange(len(lengths)), lengths), within + np.repeat(starts, lengths)


@dataclass(frozen=True)
class _Places:
    """Indices of the response tokens of all rollouts in a batch, concatenated over rollouts."""

    shape: tuple[int, ...]  # [B, S]
    starts: np.ndarray  # [B]
    lengths: np.ndarray  # [B]
    rows: np.ndarray  # [T]
    positions: np.ndarray  # [T]

    @classmethod
    def of(cls, batch: TrainBatch, rollouts: Sequence[Rollout]) -> _Places:
        starts = np.array([len(rollout.prompt_ids) for rollout in rollouts], dtype=np.int64)
        lengths = np.array([len(rollout.token_ids) for rollout in rollouts], dtype=np.int64)
        return cls(batch.token_ids.shape, starts, lengths, *_places(starts, lengths))

    def column(self, column: Column, values: Sequence[np.ndarray]) -> np.ndarray:
        """Scatter response columns [T] or [T, K] to the positions of their tokens: [B, S] or [B, S, widest K]."""
        if column.width == "token":
            return self.flat_column(column, np.concatenate(values))
        widths = np.array([value.shape[1] for value in values])
        out = np.full((*self.shape, widths.max()), column.fill, dtype=column.dtype)
        # Rows of equal width are scattered at once; one by one, they would take longer than the rest of the loop.
        for width in set(widths.tolist()):
            of_width = np.flatnonzero(widths == width)
            rows, positions = _places(self.starts[of_width], self.lengths[of_width])
            out[of_width[rows], positions, :width] = np.concatenate([values[row] for row in of_width])
        return out

    def flat_column(self, column: Column, values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Scatter values, concatenated over rollouts, to [B, S]. Args: where: [T] bool, tokens that have a value."""
        out = np.full(self.shape, column.fill, dtype=column.dtype)
        rows, positions = self.rows, self.positions
        if where is not None and not where.all():
            rows, positions = rows[where], positions[where]
        out[rows, positions] = values
        return out


def take_rows(batch: TrainBatch, rows: np.ndarray) -> TrainBatch:
    """Copy the given rows, trimmed to the longest of them; row -1 is a padding row."""
    padding = rows < 0
    lengths = np.where(padding, 0, batch.lengths[rows])
    width = max(1, int(lengths.max(initial=0)))
    loss_mask = batch.loss_mask[rows, :width]
    loss_mask[padding] = False
    token_ids = batch.token_ids[rows, :width]
    token_ids[padding] = 0
    return replace(
        batch,
        sample_ids=np.where(padding, -1, batch.sample_ids[rows]),
        token_ids=token_ids,
        lengths=lengths.astype(np.int32),
        loss_mask=loss_mask,
        columns={name: column[rows, :width] for name, column in batch.columns.items()},
    )


def token_groups(rollouts: Sequence[Rollout], trained_version: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Group the targets of rollouts by teacher and staleness in steps: `teacher/<name>/staleness_<steps>`.

    Returns: the sorted names of non-empty groups; the index of each target's name, concatenated over rollouts, [N] int32.
    """
    teachers = sorted({rollout.teacher for rollout in rollouts})
    number = {teacher: index for index, teacher in enumerate(teachers)}
    is_target = target_mask(rollouts)
    of_teacher = np.repeat([number[rollout.teacher] for rollout in rollouts], [len(rollout.token_ids) for rollout in rollouts])
    if not is_target.any():
        return (), np.empty(0, dtype=np.int32)
    staleness = trained_version - np.concatenate([rollout.student_versions for rollout in rollouts]).astype(np.int64)
    if not is_target.all():
        of_teacher, staleness = of_teacher[is_target], staleness[is_target]
    least, span = int(staleness.min()), int(np.ptp(staleness)) + 1
    codes = of_teacher * span + (staleness - least)
    present = np.flatnonzero(np.bincount(codes))
    names = [f"teacher/{teachers[code // span]}/staleness_{code % span + least}" for code in present]
    order = sorted(range(len(names)), key=lambda place: names[place])
    place_of = np.zeros(int(present[-1]) + 1, dtype=np.int32)
    place_of[present[order]] = np.arange(len(names))
    return tuple(names[place] for place in order), place_of[codes]
