"""A sample whose loss is not finite: the run ends, or leaves its batch out and goes on, also after a resume."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdray.errors import ConfigError, TrainingError
from kdray.rollouts.batching import shard
from kdray.runs.verify import verify
from kdray.types import StepReport, TrainBatch
from tests.support.stub_run import StubStudent, drive, stub_config

STEPS, BATCH = 8, 8


class NaNAt(StubStudent):
    """Ranks whose loss is not finite for some samples, as `actors.student.trainer` treats it."""

    samples: tuple[int, ...] = (37,)

    async def train_step(self, batch: TrainBatch, *others: Any, **named: Any) -> StepReport:
        bad = sorted(set(batch.sample_ids.tolist()) & set(self.samples))
        if not bad:
            return await super().train_step(batch)
        reason = f"step {batch.step}: the loss of the batch cannot be used: it is not finite for sample {bad[0]}"
        if not self._config.training.skips_not_finite:
            raise TrainingError(reason)
        for rank in self.ranks:
            rank.begin()
        told = tuple(rank.told() for rank in self.ranks)
        return StepReport(batch.step, np.nan, 0, np.nan, np.nan, 0.0, shards=told, left_out=reason)


class NaNOften(NaNAt):
    """In steps 3, 4, 6 and 7."""

    samples = tuple(step * BATCH - 1 for step in (3, 4, 6, 7))


class StopsAt6(NaNAt):
    """Dies in step 6, after the batch that it left out; the newest checkpoint is of step 3."""

    async def train_step(self, batch: TrainBatch, *others: Any, **named: Any) -> StepReport:
        if batch.step == 6:
            raise RuntimeError("killed")
        return await super().train_step(batch)


class Moving(NaNAt):
    """Says that it left the batch out, and trains it."""

    async def train_step(self, batch: TrainBatch, *others: Any, **named: Any) -> StepReport:
        report = await super().train_step(batch)
        if report.left_out:
            self.update([shard(batch, rank, 2) for rank in range(2)], batch.num_target_tokens)
            told = tuple(rank.told() for rank in self.ranks)
            return StepReport(batch.step, np.nan, 0, np.nan, np.nan, 0.0, shards=told, left_out=report.left_out)
        return report


def config_of(folder: Path, **training: Any) -> Any:
    return stub_config(folder, training={"steps": STEPS, "on_not_finite": "skip", **training})


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def left_out(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run, "events.jsonl") if line["kind"] == "batch_left_out"]


def test_the_default_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 5: .* not finite for sample 37"):
        asyncio.run(drive(config_of(tmp_path, on_not_finite="stop"), student_type=NaNAt))


def test_a_skipped_batch_is_the_one_that_verify_names(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    summary = asyncio.run(drive(config, student_type=NaNAt))
    assert (summary["lost_samples"], summary["duplicated_samples"]) == (0, 0)
    proof = verify(config.run_folder)
    assert (proof.state, proof.problems, proof.notes) == ("finished", [], [])
    assert ("batches left out", "1, not finite: step 5") in proof.facts
    line = lines(config.run_folder, "ledger.jsonl")[4]
    assert line["dropped"] == {"not_finite": list(range(32, 40))}
    assert line["trained_tokens"] == 0
    assert [record["updates"] for record in line["trained"]] == [4, 4]
    (event,) = left_out(config.run_folder)
    assert (event["step"], event["rule"]) == (5, "not_finite")
    metrics = lines(config.run_folder, "metrics.jsonl")[4]
    assert (metrics["loss"], metrics["filtered"], metrics["filtered/not_finite"]) == (None, 1.0, 1.0)


def test_a_resume_meets_the_same_batch_and_gets_past_it(tmp_path: Path) -> None:
    whole, killed = config_of(tmp_path / "whole"), config_of(tmp_path / "killed")
    asyncio.run(drive(whole, student_type=NaNAt))
    with pytest.raises(RuntimeError, match="killed"):
        asyncio.run(drive(killed, student_type=StopsAt6))
    asyncio.run(drive(killed, student_type=NaNAt))
    assert lines(killed.run_folder, "ledger.jsonl") == lines(whole.run_folder, "ledger.jsonl")
    proof = verify(killed.run_folder)
    assert (proof.state, proof.problems) == ("finished", [])
    assert [event["step"] for event in left_out(killed.run_folder)] == [5, 5]


def test_more_than_max_skipped_ends_the_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, max_skipped=3)
    with pytest.raises(TrainingError, match=r"step 7: .*left out 3 batches of the last 100 steps already \(steps 3, 4, 6\)"):
        asyncio.run(drive(config, student_type=NaNOften))
    # Those before the checkpoint count after a resume, too: it is at step 6.
    with pytest.raises(TrainingError, match=r"\(steps 3, 4, 6\), which is training.max_skipped=3"):
        asyncio.run(drive(config, student_type=NaNOften))
    assert verify(config.run_folder).problems == []


def test_a_batch_that_is_called_left_out_and_was_trained_is_found(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(TrainingError, match="step 5: rank 0 trained samples .* of step 5, which it was not given"):
        asyncio.run(drive(config, student_type=Moving))
    assert "training" in {kind for kind, _ in verify(config.run_folder).problems}


def test_verify_refuses_the_rule_where_it_does_not_hold(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    asyncio.run(drive(config, student_type=NaNAt))
    ledger = config.run_folder / "ledger.jsonl"
    text = ledger.read_text()
    ledger.write_text(text.replace('"not_finite": [32, ', '"not_finite": ['))
    assert ("rule", "step 5: not_finite leaves out a part of its batch, and not the whole") in verify(
        config.run_folder
    ).problems
    ledger.write_text(text)
    stored = config.run_folder / "config.yaml"
    stored.write_text(stored.read_text().replace("on_not_finite: skip", "on_not_finite: stop"))
    assert {kind for kind, _ in verify(config.run_folder).problems} == {"rule"}


def test_a_resume_may_change_the_settings_that_help_past_a_failure(tmp_path: Path) -> None:
    """The run ends at a batch; it goes on with `skip`, other filters and fewer steps, and all of it is in the files."""
    with pytest.raises(TrainingError, match="step 5"):
        asyncio.run(drive(config_of(tmp_path, on_not_finite="stop"), student_type=NaNAt))
    other = stub_config(
        tmp_path,
        training={"steps": STEPS - 1, "on_not_finite": "skip", "learning_rate": 1e-6},
        rollout={"filters": {"finished": True, "distinct": False}},
    )
    asyncio.run(drive(other, student_type=NaNAt))
    proof = verify(other.run_folder)
    assert (proof.state, proof.problems, proof.notes) == ("finished", [], [])
    changed = dict(proof.facts)["settings changed"]
    assert "training.on_not_finite after step 3: stop -> skip" in changed
    assert "training.learning_rate after step 3: 5e-06 -> 1e-06" in changed
    # Rules of the old config hold until the resume alone.
    rules = {rule for line in lines(other.run_folder, "ledger.jsonl")[:3] for rule in line.get("dropped", {})}
    assert "distinct" in rules
    ledger = other.run_folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"finished": [', '"distinct": ['))
    assert "rule" in {kind for kind, _ in verify(other.run_folder).problems}


def test_a_step_of_several_updates_cannot_skip(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_not_finite=skip with 2 updates a step .*set training.on_not_finite=stop"):
        config_of(tmp_path, inner_epochs=2)
