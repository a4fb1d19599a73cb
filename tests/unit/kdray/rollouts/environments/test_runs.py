"""Whole runs with an environment: the ledger, the proof of the files, repetition and resume."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from kdray.config import Config
from kdray.runs.folder import read_lines
from kdray.runs.verify import verify
from kdray.types import StepReport
from tests.support.stub_run import StubStudent, drive, stub_config

# A random table of next tokens asks often enough.
ASKS = {"type": "hints", "marks": "abcdefghijklmnop", "max_turns": 3, "max_reply_tokens": 1}


def config_of(folder: Path, name: str) -> Config:
    rollout = {"environment": ASKS, "max_new_tokens": 8, "filters": {"finished": True}}
    data = {"prompts": {"type": "task", "size": 48, "difficulty": 2}}
    return stub_config(folder, name, rollout=rollout, data=data, training={"steps": 12})


def line_by_line(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / "ledger.jsonl")


def test_a_run_with_turns_is_proved_and_repeats(tmp_path: Path, example_plugin: Path) -> None:
    runs = []
    for name in ("first", "second"):
        config = config_of(tmp_path, name)
        summary = asyncio.run(drive(config, slow=True))
        assert summary["lost_samples"] == summary["duplicated_samples"] == 0
        runs.append(config.run_folder)
    assert verify(runs[0]).problems == []
    assert line_by_line(runs[0]) == line_by_line(runs[1])
    metrics = read_lines(runs[0] / "metrics.jsonl")
    asked = [line for line in metrics if "turns" in line]
    assert len(asked) > 6
    assert sum(line["environment_tokens"] for line in asked) * 8 > 20
    assert all(0.0 < line["turns"] <= 3.0 for line in asked)
    shown = [row for path in (runs[0] / "samples").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert any("environment" in row["writer"] for row in shown)
    # The ledger, the ranks and the totals count what was drawn; the responses are longer.
    totals = json.loads((runs[0] / "summary.json").read_text())
    drawn = sum(sum(np.broadcast_to(line["tokens"], len(line["sample_ids"])).tolist()) for line in line_by_line(runs[0]))
    assert totals["tokens_generated"] == drawn
    assert totals["trained_tokens"] <= drawn


def test_a_run_that_died_goes_on_with_the_same_turns(tmp_path: Path, example_plugin: Path) -> None:
    class Dies(StubStudent):
        async def train_step(self, batch: Any, *rest: Any) -> StepReport:
            if batch.step == 8:
                raise KeyboardInterrupt
            return await super().train_step(batch, *rest)

    whole, died = config_of(tmp_path, "whole"), config_of(tmp_path, "died")
    asyncio.run(drive(whole))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(drive(died, student_type=Dies))
    assert verify(died.run_folder).problems == []
    asyncio.run(drive(died, slow=True))
    assert verify(died.run_folder).problems == []
    assert line_by_line(died.run_folder) == line_by_line(whole.run_folder)


def test_a_ledger_that_counts_the_environments_tokens_is_found_out(tmp_path: Path, example_plugin: Path) -> None:
    config = config_of(tmp_path, "wrong")
    asyncio.run(drive(config))
    path = config.run_folder / "ledger.jsonl"
    lines = line_by_line(config.run_folder)
    lines[3]["tokens"] = (np.broadcast_to(lines[3]["tokens"], len(lines[3]["sample_ids"])) + 1).tolist()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verify(config.run_folder).problems
