"""The trainer's own record of a step: what went through its backward passes and was applied, as the optimizer counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.student.trainer import StudentTrainer
from kdray.rollouts.training_digest import dealt_shards, times
from tests.unit.actors.student.test_backend_contract import BATCHES, models, phase_of, started, training_of

__all__ = ["models"]

pytestmark = pytest.mark.filterwarnings("ignore")


def trainer_of(model: Path, **settings: Any) -> StudentTrainer:
    return started(training_of({"type": "torch"}, **settings), phase_of(model))


@pytest.mark.parametrize(
    ("settings", "passes", "updates"),
    [({}, 1, 1), ({"mini_batch_size": 4}, 1, 2), ({"mini_batch_size": 4, "inner_epochs": 3}, 3, 6)],
)
def test_a_step_records_its_samples_and_updates(
    models: dict[str, Path], settings: dict[str, Any], passes: int, updates: int
) -> None:
    trainer = trainer_of(models["student"], **settings)
    for number, batch in enumerate(BATCHES[:3], start=1):
        report = trainer.train_step(batch)
        (found,), (given,) = report.shards, dealt_shards(batch, 1)
        assert found.sample_ids == given.sample_ids == tuple(sorted(batch.sample_ids.tolist()))
        assert found.digest == times(given.digest, passes)
        assert found.num_target_tokens == passes * given.num_target_tokens
        assert report.num_target_tokens == batch.num_target_tokens
        assert found.updates == number * updates


def test_an_optimizer_that_is_not_stepped_is_seen(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = trainer_of(models["student"])
    monkeypatch.setattr(trainer.backend._optimizer, "step", lambda: None)
    (shard,) = trainer.train_step(BATCHES[0]).shards
    assert shard.updates == 0


def test_a_batch_that_is_trained_twice_is_seen(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = trainer_of(models["student"])
    update = trainer._update
    monkeypatch.setattr(trainer, "_update", lambda *given: (update(*given), update(*given))[1])
    report = trainer.train_step(BATCHES[0])
    (shard,), (given,) = report.shards, dealt_shards(BATCHES[0], 1)
    assert shard.digest == times(given.digest, 2)
    assert (shard.num_target_tokens, shard.updates) == (2 * given.num_target_tokens, 2)
    assert report.num_target_tokens == 2 * BATCHES[0].num_target_tokens


def test_a_micro_batch_that_is_left_out_is_seen(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.student import trainer as module

    trainer = trainer_of(models["student"])
    parts = module.micro_batches
    monkeypatch.setattr(module, "micro_batches", lambda batch, size: list(parts(batch, size))[1:])
    (shard,) = trainer.train_step(BATCHES[0]).shards
    assert len(shard.sample_ids) == 4
    assert shard.digest != dealt_shards(BATCHES[0], 1)[0].digest
