"""Strictly on-policy, the same seed twice: the same tokens, losses and weights, bit for bit, whatever order answers come in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.support.stub_run import drive, files_of, stub_config

MEASURED = {
    *("time", "tokens_per_s", "queue_age_s", "wait_rollout_s", "wait_teacher_s", "wait_sync_s"),
    *("wait_evaluation_s", "wait_checkpoint_s"),
}
"""What a clock says."""


def run(folder: Path, name: str, **sections: Any) -> Path:
    config = stub_config(folder, name, training={"steps": 15}, **sections)
    asyncio.run(drive(config, slow=True))
    return config.run_folder


def curve(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def tokens(run: Path) -> list[Any]:
    """Ids of the samples that were kept, by step."""
    return [pq.read_table(path).column("token_ids").to_pylist() for path in sorted((run / "samples").glob("*.parquet"))]


def test_the_same_seed_twice_is_the_same_run(tmp_path: Path) -> None:
    first, second = run(tmp_path, "first"), run(tmp_path, "second")
    assert curve(first) == curve(second)
    assert tokens(first) == tokens(second)
    assert (first / "ledger.jsonl").read_text() == (second / "ledger.jsonl").read_text()
    weights = [(files_of(each / "checkpoints/step-000015") / "student.npy").read_bytes() for each in (first, second)]
    assert weights[0] == weights[1]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    first, second = run(tmp_path, "first"), run(tmp_path, "second", run={"name": "second", "output": str(tmp_path), "seed": 6})
    assert curve(first) != curve(second)
    assert tokens(first) != tokens(second)
