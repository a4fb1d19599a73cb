"""Digests of the samples of a batch, and a rank's record of the samples that it trained.

A sample's digest covers its id, its tokens, which of them are targets, and every column that a loss may read: what the teacher
said of them, their weights and advantages. Padding does not enter. The digest of several samples is the sum of theirs modulo
2^128: it does not depend on their order, those of several ranks add up, and a sample that was trained twice counts twice. It
detects mistakes, not forgery.
"""

from __future__ import annotations

import numpy as np
import xxhash

from kdray.rollouts.batching import deal
from kdray.types import TrainBatch, TrainedShard

_MODULUS = 2**128


def row_digests(batch: TrainBatch) -> list[int]:
    """Compute the digest of every row, as a number below 2^128; 0 for a padding row."""
    digests = []
    given = {"token_ids": batch.token_ids, "loss_mask": batch.loss_mask, **batch.columns}
    columns = [(f"{name} {column.dtype.str}".encode(), column) for name, column in sorted(given.items())]
    for row, (sample_id, length) in enumerate(zip(batch.sample_ids.tolist(), batch.lengths.tolist(), strict=True)):
        if sample_id < 0:
            digests.append(0)
            continue
        hashed = xxhash.xxh3_128(sample_id.to_bytes(8, "little") + length.to_bytes(4, "little"))
        for name, column in columns:
            hashed.update(name)
            hashed.update(np.ascontiguousarray(column[row, :length]).data)
        digests.append(hashed.intdigest())
    return digests


def times(digest: str, passes: int) -> str:
    """Return the digest of samples that were trained `passes` times, given that of one pass."""
    return _text(int(digest, 16) * passes)


def dealt_shards(batch: TrainBatch, world_size: int) -> list[TrainedShard]:
    """Return what every rank has trained once it has made one pass over its shard (`kdray.rollouts.batching.shard`)."""
    digests = row_digests(batch)
    targets = batch.loss_mask.sum(-1).tolist()
    ids = batch.sample_ids.tolist()
    rows = [[row for row in column if row >= 0] for column in deal(batch.lengths, world_size).T.tolist()]
    return [
        TrainedShard(
            tuple(sorted(ids[row] for row in own)),
            _text(sum(digests[row] for row in own)),
            sum(targets[row] for row in own),
            updates=0,
        )
        for own in rows
    ]


class ShardRecord:
    """Record of one step on one rank: every micro-batch is added after its backward pass, and counts once it moved the weights.

    So a gradient that was never applied leaves no trace here.
    """

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._sum = 0
        self._targets = 0
        self.tokens = 0
        self.positions = 0
        """Tokens in the forward passes, and positions, padding included."""
        self._pending: list[tuple[list[int], int, int]] = []

    def add(self, part: TrainBatch) -> None:
        """Record that the gradient of a micro-batch was computed."""
        self.tokens += int(part.lengths.sum())
        self.positions += part.token_ids.size
        self._pending.append((part.sample_ids.tolist(), sum(row_digests(part)), int(part.loss_mask.sum())))

    def applied(self) -> None:
        """Record that the optimizer was stepped with the gradients of all micro-batches since the last call."""
        for ids, digest, targets in self._pending:
            self._ids.update(sample_id for sample_id in ids if sample_id >= 0)
            self._sum += digest
            self._targets += targets
        self._pending = []

    def shard(self, updates: int) -> TrainedShard:
        """Return the record. Args: updates: the optimizer's update counter after the step."""
        return TrainedShard(tuple(sorted(self._ids)), _text(self._sum), self._targets, updates)


def _text(total: int) -> str:
    return f"{total % _MODULUS:032x}"
