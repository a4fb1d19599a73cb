"""Comparison of what the driver gave the ranks with what they say they trained, in the columns of a ledger line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from kdray.rollouts.training_digest import dealt_shards, times
from kdray.types import TrainBatch, TrainedShard

_SHOWN = 5
_MOST_PASSES = 8
"""Passes that are recognised as such in a digest."""
_LONGEST = 2**24
"""Samples of a rank in a step, beyond which a damaged line is not written out."""


def training_columns(batch: TrainBatch, shards: Sequence[TrainedShard]) -> dict[str, Any]:
    """Build the columns of a ledger line that say what was given to the ranks, and what they trained; empty without a record.

    `dealt` is the rank that the driver gave each sample to, in the order of the ids, as one value if there is one rank;
    `dealt_digests` has a digest of each rank's samples, computed by the driver; `trained` has each rank's own record. Its
    samples are offsets from the step's first id, three or more in a row as [first, last].
    """
    if not shards:
        return {}
    given = dealt_shards(batch, len(shards))
    rank_of = {sample_id: rank for rank, shard in enumerate(given) for sample_id in shard.sample_ids}
    ranks = [rank_of[sample_id] for sample_id in batch.sample_ids.tolist()]
    first = int(batch.sample_ids.min())
    return {
        "dealt": ranks[0] if len(set(ranks)) == 1 else ranks,
        "dealt_digests": [shard.digest for shard in given],
        "trained": [
            {
                "samples": as_ranges([sample_id - first for sample_id in shard.sample_ids]),
                "digest": shard.digest,
                "targets": shard.num_target_tokens,
                "updates": shard.updates,
            }
            for shard in shards
        ],
    }


def differences(line: Mapping[str, Any], batch_size: int, passes: int, updates: int) -> list[str]:
    """Describe where the ranks of a ledger line trained something else than they were given, each with its rank.

    Args: line: of a step whose columns have an entry for every sample; passes: over the samples of a step, 0 for a batch that
          was left out; updates: of the optimizer, this step's included.
    """
    try:
        return _differences(line, batch_size, passes, updates)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return [f"its record of the ranks cannot be read: {error!r}"]


def _differences(line: Mapping[str, Any], batch_size: int, passes: int, updates: int) -> list[str]:
    ids: list[int] = line["sample_ids"]
    ranks, tokens = _column(line["dealt"], len(ids)), _column(line["tokens"], len(ids))
    dropped = {sample_id for left_out in line.get("dropped", {}).values() for sample_id in left_out}
    digests, trained = line["dealt_digests"], line["trained"]
    if len(digests) != len(trained) or not set(ranks) <= set(range(len(trained))):
        return [f"{len(digests)} ranks were given samples, and {len(trained)} trained"]
    found = []
    for rank, record in enumerate(trained):
        given = {sample_id for sample_id, of in zip(ids, ranks, strict=True) if of == rank} if passes else set()
        own = {min(ids) + offset for offset in _numbers(record["samples"])}
        targets = passes * sum(
            count for sample_id, count in zip(ids, tokens, strict=True) if sample_id in given and sample_id not in dropped
        )
        if missing := sorted(given - own):
            found.append(f"rank {rank} did not train samples {_some(missing)}, which it was given")
        if strange := sorted(own - given):
            steps = sorted({sample_id // batch_size + 1 for sample_id in strange})
            found.append(f"rank {rank} trained samples {_some(strange)} of step {_some(steps)}, which it was not given")
        if not missing and not strange:
            found += [f"rank {rank} {what}" for what in _content(record, digests[rank], passes, targets)]
        if record["updates"] != updates:
            found.append(f"rank {rank}'s optimizer has made {record['updates']} updates, and {updates} were due")
    return found


def _content(record: Mapping[str, Any], given: str, passes: int, targets: int) -> list[str]:
    """Compare digest and targets of a rank that trained the samples that it was given."""
    found = []
    if record["digest"] != times(given, passes):
        other = next((count for count in range(_MOST_PASSES + 1) if record["digest"] == times(given, count)), None)
        found.append(
            "trained other tokens, targets or numbers of the teacher than those of the rollouts"
            if other is None
            else f"trained its samples {other} times, and not {passes}"
        )
    if record["targets"] != targets:
        found.append(f"trained {record['targets']} tokens, and its samples, without those left out, have {targets}")
    return found


def _column(value: Any, count: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * count


def _some(values: Sequence[int]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(str(value) for value in values[:_SHOWN]) + more


def as_ranges(offsets: Sequence[int]) -> list[int | list[int]]:
    """Shorten ascending numbers: three or more in a row become [first, last]."""
    found: list[int | list[int]] = []
    for _, run in groupby(enumerate(offsets), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        found += [[numbers[0], numbers[-1]]] if len(numbers) > 2 else numbers
    return found


def _numbers(ranges: Sequence[int | Sequence[int]]) -> list[int]:
    """Undo `as_ranges`."""
    found: list[int] = []
    for each in ranges:
        first, last = (each, each) if isinstance(each, int) else each
        if last - first > _LONGEST:
            raise ValueError(f"samples {first} to {last}")
        found += range(first, last + 1)
    return found
