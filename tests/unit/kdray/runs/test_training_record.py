"""Students that do not train what they are given: the run ends, and `kdray verify` says the same from the files alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdray.errors import TrainingError
from kdray.loop import Distillation
from kdray.rollouts.training_digest import dealt_shards
from kdray.runs.training_record import differences, training_columns
from kdray.runs.verify import verify
from kdray.types import TrainBatch, TrainedShard
from tests.support.stub_run import StubStudent, drive, stub_config

STEPS = 6


class Honest(StubStudent):
    pass


class Idle(StubStudent):
    """Does nothing."""

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        return 1.0


class Twice(StubStudent):
    """Applies every batch twice."""

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        super().update(shards, targets)
        return super().update(shards, targets)


class FirstBatch(StubStudent):
    """Trains batch 1 in every step."""

    first: Sequence[TrainBatch] = ()

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        self.first = self.first or shards
        return super().update(self.first, targets)


class Swapped(StubStudent):
    """Gives rank 0 the shard of rank 1."""

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        return super().update(shards[::-1], targets)


class Replaying(StubStudent):
    """Restarts in step 4 and replays step 3 on the weights that it has, instead of those of a checkpoint."""

    last: Sequence[TrainBatch] = ()

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        if shards[0].step == 4:
            super().update(self.last, targets)
            for rank in self.ranks:
                rank.begin()
        self.last = shards
        return super().update(shards, targets)


class OtherTokens(StubStudent):
    """Rank 1 reads one token of step 2 wrongly."""

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        if shards[1].step == 2:
            tokens = shards[1].token_ids.copy()
            tokens[0, 0] += 1
            shards = [shards[0], replace(shards[1], token_ids=tokens)]
        return super().update(shards, targets)


class AnothersTeacher(StubStudent):
    """Rank 1 trains the samples of step 2 towards what the teacher said of others."""

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        if shards[1].step == 2:
            columns = {name: column[::-1].copy() for name, column in shards[1].columns.items()}
            shards = [shards[0], replace(shards[1], columns=columns)]
        return super().update(shards, targets)


class FewerTargets(StubStudent):
    """Rank 0 leaves a target of step 2 out."""

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        if shards[0].step == 2:
            mask = shards[0].loss_mask.copy()
            mask[tuple(np.argwhere(mask)[0])] = False
            shards = [replace(shards[0], loss_mask=mask), shards[1]]
        return super().update(shards, targets)


class OneRankIdle(StubStudent):
    """Rank 1's optimizer is not stepped in step 3."""

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        loss = super().update(shards, targets)
        if shards[1].step == 3:
            self.ranks[1].updates -= 1
            self.ranks[1].begin()
        return loss


LIARS: list[tuple[type[StubStudent], int, list[str]]] = [
    (Idle, 1, ["rank 0 did not train samples", "rank 1 did not train samples", "has made 0 updates, and 1 were due"]),
    (Twice, 1, ["rank 0 trained its samples 2 times, and not 1", "rank 1's optimizer has made 2 updates, and 1 were due"]),
    (FirstBatch, 2, ["rank 0 trained samples", "of step 1, which it was not given"]),
    (Swapped, 1, ["rank 0 did not train samples", "rank 1 trained samples", "of step 1, which it was not given"]),
    (Replaying, 4, ["rank 0's optimizer has made 5 updates, and 4 were due", "rank 1's optimizer has made 5 updates"]),
    (OtherTokens, 2, ["rank 1 trained other tokens, targets or numbers of the teacher than those of the rollouts"]),
    (AnothersTeacher, 2, ["rank 1 trained other tokens, targets or numbers of the teacher than those of the rollouts"]),
    (FewerTargets, 2, ["rank 0 trained other tokens", "tokens, and its samples, without those left out, have"]),
    (OneRankIdle, 3, ["rank 1 did not train samples", "rank 1's optimizer has made 2 updates, and 3 were due"]),
]


def config_of(folder: Path, **sections: Any) -> Any:
    return stub_config(folder, training={"steps": STEPS}, **sections)


@pytest.mark.parametrize(("liar", "step", "said"), LIARS, ids=[liar.__name__ for liar, _, _ in LIARS])
def test_the_run_ends_in_the_step_with_the_rank_named(
    liar: type[StubStudent], step: int, said: list[str], tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    with pytest.raises(TrainingError, match=f"^step {step}: rank ") as raised:
        asyncio.run(drive(config, student_type=liar))
    found = [what for kind, what in verify(config.run_folder).problems if kind == "training"]
    for what in said:
        assert what in str(raised.value)
        assert any(what in each for each in found)
    assert {what.split(":")[0] for what in found} == {f"step {step}"}
    # Its weights were not published, and no later step was trained.
    assert len((config.run_folder / "ledger.jsonl").read_text().splitlines()) == step


@pytest.mark.parametrize(("liar", "step", "said"), LIARS, ids=[liar.__name__ for liar, _, _ in LIARS])
def test_verify_finds_it_without_the_drivers_help(
    liar: type[StubStudent], step: int, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distillation, "_difference", lambda *given: None)
    config = config_of(tmp_path)
    asyncio.run(drive(config, student_type=liar))
    proof = verify(config.run_folder)
    assert proof.state == "finished"
    found = [what for kind, what in proof.problems if kind == "training"]
    assert found[0].startswith(f"step {step}: rank ")
    for what in said:
        assert any(what in each and each.startswith(f"step {step}:") for each in found)


def test_an_honest_student_is_proved(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    asyncio.run(drive(config, student_type=Honest))
    proof = verify(config.run_folder)
    assert (proof.problems, proof.notes) == ([], [])
    assert ("ranks", f"2, whose own records were compared in {STEPS} of {STEPS} steps") in proof.facts
    lines = [json.loads(line) for line in (config.run_folder / "ledger.jsonl").read_text().splitlines()]
    assert [record["updates"] for line in lines for record in line["trained"]] == [n for n in range(1, STEPS + 1) for _ in "ab"]


def test_rank_records_can_be_checked_later_where_earlier_steps_have_none(tmp_path: Path) -> None:
    """A run of an earlier version that was resumed; but no later step may lack what an earlier one has."""
    config = config_of(tmp_path)
    asyncio.run(drive(config))
    ledger = config.run_folder / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]

    def without(*steps: int) -> Any:
        columns = ("dealt", "dealt_digests", "trained")
        kept = [{k: v for k, v in line.items() if line["step"] not in steps or k not in columns} for line in lines]
        ledger.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return verify(config.run_folder)

    assert without(1, 2).problems == []
    assert without(1, 2).notes[0].startswith("steps 1 to 2 were trained by an older version")
    assert without(*range(1, STEPS + 1)).notes[0].startswith("its steps were trained by an older version")
    assert without(4).problems == [("training", "step 4: no rank says what it trained")]

    def say_versions(resumed_step: int) -> None:
        told = config.run_folder / "events.jsonl"
        start = {"time": "2026-12-01T00:00:00+00:00", "kind": "start", "resumed_step": resumed_step or None, "versions": {}}
        told.write_text(json.dumps(start) + "\n" + told.read_text())

    # A driver that says its versions is of a version whose ranks say what they train.
    say_versions(resumed_step=2)
    assert without(1, 2).problems == []
    assert without(1, 2, 3).problems == [("training", "step 3: no rank says what it trained")]
    say_versions(resumed_step=0)
    assert len(without(*range(1, STEPS + 1)).problems) == STEPS


def test_a_scorer_that_the_config_does_not_have_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    asyncio.run(drive(config))
    ledger = config.run_folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"scored_by": "toy"', '"scored_by": "nobody"'))
    samples = STEPS * config.training.batch_size
    expected = f"{samples} samples were scored by 'nobody', which is no teacher of the config"
    assert verify(config.run_folder).problems == [("scored", expected)]


# ------------------------------------------------------------------------------------------------------------ columns


def batch_of(lengths: list[int], first: int = 40) -> TrainBatch:
    rng, width = np.random.default_rng(sum(lengths)), max(lengths)
    mask = np.arange(width) < np.array(lengths)[:, None]
    mask[:, 0] = False
    return TrainBatch(
        step=3,
        sample_ids=np.arange(first, first + len(lengths)),
        token_ids=rng.integers(2, 50, mask.shape).astype(np.int32) * (np.arange(width) < np.array(lengths)[:, None]),
        lengths=np.array(lengths, dtype=np.int32),
        loss_mask=mask,
        num_target_tokens=int(mask.sum()),
    )


def line_of(batch: TrainBatch, shards: list[TrainedShard]) -> dict[str, Any]:
    columns = training_columns(batch, shards)
    return {"sample_ids": batch.sample_ids.tolist(), "tokens": batch.loss_mask.sum(-1).tolist(), **columns}


def test_columns_are_short() -> None:
    batch = batch_of([9, 4, 7, 7, 3, 5])
    (shard,) = [replace(each, updates=3) for each in dealt_shards(batch, 1)]
    line = line_of(batch, [shard])
    assert line["dealt"] == 0
    assert line["trained"][0]["samples"] == [[0, 5]]
    line = line_of(batch, [replace(shard, sample_ids=(7, 8, 40, 41, 42, 45))])
    assert line["trained"][0]["samples"] == [-33, -32, [0, 2], 5]
    assert differences(line, 20, passes=1, updates=3) == [
        "rank 0 did not train samples 43, 44, which it was given",
        "rank 0 trained samples 7, 8 of step 1, which it was not given",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"trained": [1]},
        {"trained": [{}]},
        {"trained": []},
        {"dealt": 4},
        {"dealt": [0]},
        {"dealt_digests": ["none"]},
        {"dealt_digests": []},
        {"trained": [{"samples": "a", "digest": 1, "targets": 1, "updates": 3}]},
        {"trained": "abc"},
    ],
)
def test_columns_that_cannot_be_read_are_a_difference(change: dict[str, Any]) -> None:
    batch = batch_of([9, 4, 7, 7, 3, 5])
    line = line_of(batch, [replace(each, updates=3) for each in dealt_shards(batch, 1)])
    assert differences(line, 20, passes=1, updates=3) == []
    assert differences(line | change, 20, passes=1, updates=3)
