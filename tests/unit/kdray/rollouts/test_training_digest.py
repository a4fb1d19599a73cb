"""Digests of what is trained: the same however a batch is split, and another one for any other sample, token or target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kdray.rollouts.batching import micro_batches, shard, take_rows
from kdray.rollouts.training_digest import ShardRecord, dealt_shards, row_digests, times
from kdray.types import TrainBatch

ROWS, WIDTH = 11, 9


@pytest.fixture
def batch() -> TrainBatch:
    rng = np.random.default_rng(4)
    lengths = rng.integers(2, WIDTH + 1, ROWS)
    inside = np.arange(WIDTH) < lengths[:, None]
    mask = inside & (np.arange(WIDTH) > 0)
    tokens = np.where(inside, rng.integers(1, 40, inside.shape), 0).astype(np.int32)
    columns = {
        "teacher_logprobs": np.where(mask, rng.normal(size=mask.shape), 0.0).astype(np.float32),
        "support_ids": np.where(mask[..., None], rng.integers(0, 40, (*mask.shape, 3)), -1).astype(np.int32),
        "weights": mask.astype(np.float32),
    }
    return TrainBatch(2, np.arange(ROWS) + 30, tokens, lengths.astype(np.int32), mask, int(mask.sum()), columns)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_that_train_their_shards_have_the_digests_of_what_they_were_given(
    batch: TrainBatch, ranks: int, passes: int, size: int
) -> None:
    """With padding rows on some ranks, any order of rows, any width of a micro-batch."""
    given = dealt_shards(batch, ranks)
    assert sorted(i for each in given for i in each.sample_ids) == batch.sample_ids.tolist()
    assert sum(each.num_target_tokens for each in given) == batch.num_target_tokens
    total = sum(row_digests(batch)) % 2**128
    assert sum(int(each.digest, 16) for each in given) % 2**128 == total
    for rank, expected in enumerate(given):
        rows, record = shard(batch, rank, ranks), ShardRecord()
        for number in range(passes):
            order = np.random.default_rng(number).permutation(len(rows.lengths))
            for part in micro_batches(take_rows(rows, order), size):
                record.add(part)
            record.applied()
        found = record.shard(updates=passes)
        assert found.sample_ids == expected.sample_ids
        assert found.digest == times(expected.digest, passes)
        assert found.num_target_tokens == passes * expected.num_target_tokens


def test_a_gradient_that_was_not_applied_does_not_count(batch: TrainBatch) -> None:
    record = ShardRecord()
    record.add(batch)
    assert record.shard(0) == ShardRecord().shard(0)
    record.applied()
    record.applied()
    (expected,) = dealt_shards(batch, 1)
    assert record.shard(0) == expected


def other_token(batch: TrainBatch) -> TrainBatch:
    tokens = batch.token_ids.copy()
    tokens[3, 1] += 1
    return replace(batch, token_ids=tokens)


def other_target(batch: TrainBatch) -> TrainBatch:
    mask = batch.loss_mask.copy()
    mask[3, 1] = False
    return replace(batch, loss_mask=mask)


def swapped_responses(batch: TrainBatch) -> TrainBatch:
    """The rows stay, and two ids change places."""
    ids = batch.sample_ids.copy()
    ids[[0, 1]] = ids[[1, 0]]
    return replace(batch, sample_ids=ids)


def shorter(batch: TrainBatch) -> TrainBatch:
    lengths = batch.lengths.copy()
    lengths[3] -= 1
    return replace(batch, lengths=lengths)


def another_s_teacher(batch: TrainBatch) -> TrainBatch:
    """What the teacher said of one sample stands with another one."""
    columns = {name: column.copy() for name, column in batch.columns.items()}
    columns["teacher_logprobs"][[3, 4]] = columns["teacher_logprobs"][[4, 3]]
    return replace(batch, columns=columns)


def other_support(batch: TrainBatch) -> TrainBatch:
    columns = {name: column.copy() for name, column in batch.columns.items()}
    columns["support_ids"][3, 1, 2] += 1
    return replace(batch, columns=columns)


def without_weights(batch: TrainBatch) -> TrainBatch:
    return replace(batch, columns={name: column for name, column in batch.columns.items() if name != "weights"})


def renamed(batch: TrainBatch) -> TrainBatch:
    return replace(batch, columns={name.replace("weights", "advantages"): column for name, column in batch.columns.items()})


CHANGES = [other_token, other_target, swapped_responses, shorter, another_s_teacher, other_support, without_weights, renamed]


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_sample_has_another_digest(batch: TrainBatch, change: object) -> None:
    assert dealt_shards(change(batch), 1)[0].digest != dealt_shards(batch, 1)[0].digest  # type: ignore[operator]


def test_what_stands_in_padding_does_not_count(batch: TrainBatch) -> None:
    tokens = np.where(np.arange(WIDTH) < batch.lengths[:, None], batch.token_ids, 7)
    columns = {**batch.columns, "weights": np.where(np.arange(WIDTH) < batch.lengths[:, None], batch.columns["weights"], 7)}
    columns["weights"] = columns["weights"].astype(np.float32)
    assert row_digests(replace(batch, token_ids=tokens, columns=columns)) == row_digests(batch)
