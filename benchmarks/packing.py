"""Forward passes of a training step, rows packed by tokens or a fixed number in each: `python -m benchmarks.packing`.

Lengths as reasoning has them: lognormal with sigma 1.2, cut at 8,192 tokens. Both ways have the same largest pass. Prints and
writes the counts, on one and on four ranks, for several medians of the lengths; nothing is timed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kdray.rollouts.batching import micro_batches, packed_micro_batches, rollouts_to_batch, shard
from kdray.types import Rollout, TrainBatch

CAP, SIGMA, PROMPT = 8192, 1.2, 128
BATCH, ROWS = 512, 4
"""Rollouts of a step, and rows of a pass; the budget is as many tokens as these rows have at the cap."""


def _batch(median: int, seed: int) -> TrainBatch:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(np.log(median), SIGMA, BATCH).astype(int) + 1, CAP)
    empty = [np.zeros(length, np.float32) for length in lengths]
    prompt = np.zeros(PROMPT, np.int32)
    rollouts = [
        Rollout(index, index, prompt, np.zeros(len(each), np.int32), each, each, np.zeros(len(each), np.int32), 0.0, "stop")
        for index, each in enumerate(empty)
    ]
    return rollouts_to_batch(rollouts, step=1)


def count(median: int, ranks: int, seed: int) -> dict[str, float]:
    """Passes of a rank, and the share of their positions that are padding."""
    batch = _batch(median, seed)
    shards = [shard(batch, rank, ranks) for rank in range(ranks)]
    longest = np.max([piece.lengths for piece in shards], axis=0)
    budget = ROWS * (CAP + PROMPT)
    found = {
        "fixed": [list(micro_batches(piece, ROWS)) for piece in shards],
        "packed": [list(packed_micro_batches(piece, longest, budget)) for piece in shards],
    }
    numbers: dict[str, float] = {"median": median, "ranks": ranks}
    for name, of_ranks in found.items():
        parts = [part for each in of_ranks for part in each]
        numbers[f"{name}_passes"] = len(of_ranks[0])
        positions = sum(part.token_ids.size for part in parts)
        numbers[f"{name}_padding"] = round(1 - sum(int(part.lengths.sum()) for part in parts) / positions, 4)
    return numbers | {"ratio": round(numbers["packed_passes"] / numbers["fixed_passes"], 3)}


def main() -> None:
    rows = [count(median, ranks, seed=0) for median in (500, 1000, 2000) for ranks in (1, 4)]
    for row in rows:
        print(row)
    path = Path(__file__).parent / "results/packing.json"
    path.write_text(json.dumps({"batch": BATCH, "rows": ROWS, "cap": CAP, "sigma": SIGMA, "passes": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
