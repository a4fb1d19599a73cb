"""The distillation loop over fakes: staleness, overlap, exactly-once, failures, stopping, resuming."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdray.errors import EngineError, Interrupted, StorageError, TrainingError
from kdray.rollouts.columns import rollout_columns, value_of, with_columns
from kdray.rollouts.draw import draw_scored
from kdray.rollouts.seeds import sample_seed
from kdray.runs.metrics import METRICS
from kdray.types import Rollout, SampleRequest
from tests.support.fakes import FakeScorer, Rig, make_prompts, newest, oldest_allowed, turns


def shuffled_delay(request: SampleRequest) -> int:
    """Later samples often end first; one in nine is slower than several whole steps."""
    return 400 if request.sample_id % 9 == 2 else request.sample_id * 7 % 13


def with_scorer(rig: Rig, **scorer: Any) -> Rig:
    rig.sampler.scored = False
    rig.scorer = FakeScorer(rig.world, rig.history, **scorer)
    return rig


def trained_once_and_in_its_step(rig: Rig) -> None:
    size = rig.settings.batch_size
    wanted = range(rig.start_step * size, rig.settings.steps * size)
    assert [(sample_id, step) for sample_id, step, *_ in rig.student.trained] == [(i, i // size) for i in wanted]


@pytest.mark.parametrize("version", [newest, oldest_allowed])
@pytest.mark.parametrize("scored_by_sampler", [True, False])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_staleness_memory_and_exactly_once_under_any_order(
    tmp_path: Path, max_staleness: int, scored_by_sampler: bool, version: Any
) -> None:
    rig = Rig(tmp_path, max_staleness=max_staleness, steps=8)
    rig.sampler.delay, rig.sampler.version = shuffled_delay, version
    if not scored_by_sampler:
        with_scorer(rig, delay=lambda rollout: rollout.sample_id * 5 % 11)
    await rig.run()
    trained_once_and_in_its_step(rig)
    assert rig.ledger.check(8, rig.settings.batch_size) == (0, 0)
    for step, rollouts in rig.reporter.sampled.items():
        staleness = [step - 1 - rollout.oldest_version for rollout in rollouts]
        assert 0 <= min(staleness) <= max(staleness) <= max_staleness
        assert rig.reporter.metrics[step]["staleness_max"] == max(staleness)
    assert rig.history.most_outstanding == (max_staleness + 1) * rig.settings.batch_size
    if version is oldest_allowed:
        # The bound is reached, so it was the loop that kept it, not the replicas' speed.
        assert rig.reporter.metrics[8]["staleness_max"] == max_staleness


async def test_every_number_of_a_step_is_in_the_table_of_metrics(tmp_path: Path) -> None:
    rig = Rig(tmp_path, steps=2)
    await rig.run()
    written = rig.reporter.metrics[2]
    assert {name.rpartition("/")[2] for name in written} <= set(METRICS)
    assert written["queue_age_s"] > 0.0
    assert written["queue_age_s"] >= written["wait_rollout_s"] + written["wait_teacher_s"] - 0.001


async def test_max_staleness_0_never_overlaps(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_staleness=0)
    rig.sampler.delay = shuffled_delay
    await rig.run()
    size = rig.settings.batch_size
    for sample_id in range(size, rig.settings.steps * size):
        assert rig.history.at("publish", sample_id // size) < rig.history.at("draw", sample_id)
    for step in range(rig.settings.steps):
        drawn = max(rig.history.at("drawn", sample_id) for sample_id in range(step * size, (step + 1) * size))
        assert drawn < rig.history.at("train", step)
    assert all(metrics["staleness_max"] == 0 for metrics in rig.reporter.metrics.values())


async def test_max_staleness_1_samples_the_next_step_while_training_this_one(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_staleness=1)
    rig.student.turns_per_step = 50
    await rig.run()
    size = rig.settings.batch_size
    for step in range(rig.settings.steps - 1):
        following = range((step + 1) * size, (step + 2) * size)
        assert max(rig.history.at("draw", i) for i in following) < rig.history.at("trained", step)
        assert max(rig.history.at("drawn", i) for i in following) < rig.history.at("trained", step)
    for step in range(2, rig.settings.steps):
        assert rig.history.at("publish", step - 1) < rig.history.at("draw", step * size)


async def test_requests_follow_prompts_seeds_and_settings(tmp_path: Path) -> None:
    rig = Rig(tmp_path, steps=4, max_staleness=2)
    await rig.run()
    requests = [rig.history.requested[i] for i in range(16)]
    assert [r.seed for r in requests] == [sample_seed(3, "train", i) for i in range(16)]
    assert [r.min_version for r in requests] == [0] * 12 + [1] * 4
    assert {(r.alpha, r.max_new_tokens) for r in requests} == {(0.3, 6)}
    # Two samples a prompt; an epoch of 7 prompts has each of them once before any comes again.
    prompt_ids = [r.prompt_id for r in requests]
    assert prompt_ids[::2] == prompt_ids[1::2]
    assert Counter(prompt_ids[:14]) == {prompt.prompt_id: 2 for prompt in make_prompts()}


async def test_what_is_trained_is_what_was_drawn_and_recorded(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_staleness=0)
    await rig.run()
    for step, batch in enumerate(rig.student.batches):
        for row in range(rig.settings.batch_size):
            for at in np.flatnonzero(batch.loss_mask[row]):
                last, token = int(batch.token_ids[row, at - 1]), int(batch.token_ids[row, at])
                p, q = rig.world.teacher(last).exp()[token], rig.world.student(last, step).exp()[token]
                recorded = [batch.columns[f"{name}_logprobs"][row, at] for name in ("teacher", "student", "mixture")]
                assert recorded == pytest.approx([float(p.log()), float(q.log()), float((0.3 * p + 0.7 * q).log())], abs=1e-5)


async def test_totals_and_metrics_add_up(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.run(pool_metrics=lambda: {"teacher_replicas": 2.0})
    tokens = sum(len(response) for *_, response in rig.student.trained)
    totals = rig.totals
    assert (totals.tokens_generated, totals.tokens_scored, totals.trained_tokens) == (tokens, tokens, tokens)
    assert totals.prompts_consumed == 6 * 4 / 2
    assert list(rig.reporter.metrics) == [1, 2, 3, 4, 5, 6]
    for step, metrics in rig.reporter.metrics.items():
        lengths = [len(response) for _, trained_in, _, response in rig.student.trained if trained_in == step - 1]
        assert metrics["response_tokens"] == np.mean(lengths)
        assert metrics["teacher_replicas"] == 2.0
        assert metrics["tokens_per_s"] > 0


@pytest.mark.parametrize(("every", "saved"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (9, [6])])
async def test_checkpoint_cadence(tmp_path: Path, every: int, saved: list[int]) -> None:
    rig = Rig(tmp_path, checkpoint_every=every)
    await rig.run()
    assert rig.student.saved == saved
    assert rig.reporter.events == [("checkpoint", {"step": step}) for step in saved]


async def test_a_checkpoint_is_written_early_where_it_has_to_be(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_every=4)

    async def full() -> str | None:
        return "soon" if rig.student.steps_done in (1, 6) else None

    await rig.run(save_early=full)
    assert rig.student.saved == [1, 4, 6]


@pytest.mark.parametrize("every", [0, 2])
async def test_a_checkpoint_is_written_while_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """As before a node with ranks is taken away: neither for the slow rollout nor for the evaluation. One that is due anyway,
    and waits for the evaluation itself, is written once."""
    monkeypatch.setattr("kdray.loop.EARLY_S", 0.001)
    rig = Rig(tmp_path, evaluate_every=2, checkpoint_every=every)
    asked: list[int] = []

    released = asyncio.Event()

    async def one(request: SampleRequest, draw: Any = rig.sampler._one) -> Any:
        if request.sample_id == 9:  # of the third batch
            await released.wait()
        return await draw(request)

    monkeypatch.setattr(rig.sampler, "_one", one)

    async def leaving() -> str | None:
        waits = rig.student.steps_done == 2 and ("publish", 2) in rig.history.events and 2 in asked
        asked.append(rig.student.steps_done)
        return "now" if waits and not rig.student.saved else None

    async def evaluate(version: int) -> dict[str, float]:
        if version == 2:
            await asyncio.Event().wait()
        return {"reverse_kl": float(version)}

    async def release() -> None:
        while not rig.student.saved:
            await turns(1)
        released.set()

    releasing = asyncio.create_task(release())
    await asyncio.wait_for(rig.run(evaluate=evaluate, save_early=leaving), 20)
    await releasing
    assert rig.student.saved == ([2, 4, 6] if every else [2, 6])
    found = {step: metrics.get("heldout/reverse_kl") for step, metrics in rig.reporter.metrics.items()}
    assert found == {1: None, 2: None, 3: None, 4: 4.0, 5: None, 6: 6.0}
    assert ("evaluation_cut", {"step": 2}) in rig.reporter.events


@pytest.mark.parametrize("every", [0, 2, 3])
async def test_a_checkpoint_does_not_wait_for_the_evaluation_before_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """A notice comes once, while a step that has been trained waits for an evaluation that goes on for ever; a checkpoint of
    the evaluated version may be waiting for it as well, and the next may be due anyway."""
    monkeypatch.setattr("kdray.loop.EARLY_S", 0.001)
    rig = Rig(tmp_path, evaluate_every=2, checkpoint_every=every)
    notices = ["now"]

    async def leaving() -> str | None:
        return notices.pop() if notices and ("trained", 2) in rig.history.events else None

    async def evaluate(version: int) -> dict[str, float]:
        if version == 2:
            await asyncio.Event().wait()
        await turns(5)  # long enough to be cut
        return {"reverse_kl": float(version)}

    await asyncio.wait_for(rig.run(evaluate=evaluate, save_early=leaving), 20)
    assert rig.student.saved == {0: [3, 6], 2: [2, 3, 4, 6], 3: [3, 6]}[every]
    assert len([kind for kind, _ in rig.reporter.events if kind == "checkpoint"]) == len(rig.student.saved)
    assert ("evaluation_cut", {"step": 2}) in rig.reporter.events
    # Later ones are not cut.
    found = {step: metrics.get("heldout/reverse_kl") for step, metrics in rig.reporter.metrics.items()}
    assert (found[2], found[4], found[6]) == (None, 4.0, 6.0)


async def test_evaluation_cadence(tmp_path: Path) -> None:
    rig = Rig(tmp_path, evaluate_every=2)
    versions = []

    async def evaluate(version: int) -> dict[str, float]:
        assert rig.history.published == version
        versions.append(version)
        return {"reverse_kl": 10.0 * version}

    await rig.run(evaluate=evaluate)
    assert versions == [2, 4, 6]
    found = {step: metrics.get("heldout/reverse_kl") for step, metrics in rig.reporter.metrics.items()}
    assert found == {1: None, 2: 20.0, 3: None, 4: 40.0, 5: None, 6: 60.0}


async def test_a_step_is_trained_beside_an_evaluation_and_its_version_is_held_back(tmp_path: Path) -> None:
    rig = Rig(tmp_path, evaluate_every=2, max_staleness=1)
    seen: dict[int, set[int]] = {}

    async def evaluate(version: int) -> dict[str, float]:
        rig.history.add("evaluate", version)
        for _ in range(200):
            seen.setdefault(version, set()).add(rig.history.published)
            await turns(1)
        rig.history.add("evaluated", version)
        return {"reverse_kl": 10.0 * version}

    await rig.run(evaluate=evaluate)
    # No replica can have held other weights at any moment of it.
    assert seen == {2: {2}, 4: {4}, 6: {6}}
    for version in (2, 4):
        assert rig.history.at("evaluate", version) < rig.history.at("train", version)
        assert rig.history.at("trained", version) < rig.history.at("evaluated", version)
        assert rig.history.at("evaluated", version) < rig.history.at("publish", version + 1)
        assert rig.reporter.metrics[version + 1]["wait_evaluation_s"] > 0
    found = {step: metrics.get("heldout/reverse_kl") for step, metrics in rig.reporter.metrics.items()}
    assert found == {1: None, 2: 20.0, 3: None, 4: 40.0, 5: None, 6: 60.0}
    assert list(rig.reporter.sampled) == [1, 2, 3, 4, 5, 6]


async def test_a_checkpoint_is_completed_beside_the_next_steps(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_every=2, max_staleness=1)
    rig.student.turns_per_commit, rig.student.turns_per_step = 60, 10
    await rig.run()
    assert rig.student.saved == [2, 4, 6]
    assert rig.history.at("opened", 2) < rig.history.at("train", 2) < rig.history.at("trained", 2)
    assert rig.history.at("trained", 2) < rig.history.at("committed", 2), "training went on meanwhile"
    # One at a time.
    assert rig.history.at("committed", 2) < rig.history.at("opened", 4)
    assert [step for _, fields in rig.reporter.events for step in fields.values()] == [2, 4, 6]


async def test_the_files_of_a_checkpoint_have_its_evaluation_and_no_later_step(tmp_path: Path) -> None:
    """`FakeCheckpoint` looks at the lines while it is being completed."""
    rig = Rig(tmp_path, checkpoint_every=2, evaluate_every=2, max_staleness=1)
    rig.student.turns_per_file = 80

    async def evaluate(version: int) -> dict[str, float]:
        await turns(50)
        assert version not in rig.student.saved
        return {"reverse_kl": 1.0}

    await rig.run(evaluate=evaluate)
    assert rig.student.saved == [2, 4, 6]


# ------------------------------------------------------------------------------------------------------- failures


async def test_a_failure_does_not_take_an_open_checkpoint_with_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_every=2, evaluate_every=2)
    rig.student.turns_per_commit = 60
    error = TrainingError("step 3: loss is nan")
    rig.student.failures = {3: error}

    async def evaluate(version: int) -> dict[str, float]:
        await turns(50)
        return {"reverse_kl": 1.0}

    with pytest.raises(TrainingError) as caught:
        await rig.run(evaluate=evaluate)
    assert caught.value is error
    assert rig.student.saved == [2]
    assert list(rig.reporter.metrics) == [1, 2]


async def test_a_checkpoint_that_cannot_be_completed_ends_the_run(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_every=2)
    error = StorageError("the storage is away")
    rig.student.lost_commits = {4: error}
    with pytest.raises(StorageError) as caught:
        await rig.run()
    assert caught.value is error
    assert rig.student.saved == [2]
    assert rig.reporter.events == [("checkpoint", {"step": 2})]


async def test_cancelling_the_run_leaves_an_open_checkpoint_open(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_every=1)
    rig.student.turns_per_commit = 100_000
    run = asyncio.ensure_future(rig.run())
    while ("opened", 1) not in rig.history.events:
        await turns(1)
    await turns(5)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert rig.student.saved == []


class ReplicaDied(Exception):
    """What a pool may raise; of no kdray type, to see that it is passed on as it is."""


@pytest.mark.parametrize("with_a_scorer", [False, True])
@pytest.mark.parametrize("sample_id", [0, 9])
async def test_a_sampler_failure_rises_alone_and_ends_everything(tmp_path: Path, sample_id: int, with_a_scorer: bool) -> None:
    rig = Rig(tmp_path)
    if with_a_scorer:
        with_scorer(rig, delay=lambda rollout: 30)
    error = ReplicaDied("gone")
    rig.sampler.failures = {sample_id: error}
    # The others of its group are still being drawn when it fails.
    rig.sampler.delay = lambda request: 5 if request.sample_id == sample_id else 20
    with pytest.raises(ReplicaDied) as caught:
        await rig.run()
    assert caught.value is error
    assert len(rig.student.trained) <= sample_id
    assert rig.student.saved == []


@pytest.mark.parametrize("sample_id", [0, 9])
async def test_a_scorer_failure_rises_alone_and_ends_everything(tmp_path: Path, sample_id: int) -> None:
    rig = Rig(tmp_path)
    error = ReplicaDied("gone")
    with_scorer(rig, failures={sample_id: error}, delay=lambda rollout: 5 if rollout.sample_id == sample_id else 40)
    with pytest.raises(ReplicaDied) as caught:
        await rig.run()
    assert caught.value is error


@pytest.mark.parametrize("with_a_scorer", [False, True])
async def test_a_student_failure_rises_alone_and_ends_everything(tmp_path: Path, with_a_scorer: bool) -> None:
    rig = Rig(tmp_path, max_staleness=3)
    if with_a_scorer:
        with_scorer(rig, delay=lambda rollout: 500 if rollout.sample_id > 12 else 1)
    error = TrainingError("step 3: loss is nan")
    rig.student.failures = {3: error}
    rig.sampler.delay = lambda request: 500 if request.sample_id > 13 else 1
    with pytest.raises(TrainingError) as caught:
        await rig.run()
    assert caught.value is error
    assert rig.student.steps_done == 2
    assert list(rig.reporter.metrics) == [1, 2]
    assert rig.student.saved == []
    assert rig.ledger.check(2, 4) == (0, 0)


async def test_a_failed_evaluation_ends_the_run(tmp_path: Path) -> None:
    rig = Rig(tmp_path, evaluate_every=1)

    async def evaluate(version: int) -> dict[str, float]:
        raise EngineError("no full rows")

    with pytest.raises(EngineError, match="no full rows"):
        await rig.run(evaluate=evaluate)


async def test_a_sampler_that_breaks_the_staleness_bound_is_caught(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_staleness=0)
    draw = rig.world.draw
    rig.world.draw = lambda request, version, scored: draw(request, max(0, version - 1), scored)
    with pytest.raises(EngineError, match="drawn by student version 0, but needs 1"):
        await rig.run()
    assert rig.student.steps_done == 1


@pytest.mark.parametrize("with_a_scorer", [False, True])
async def test_cancelling_the_run_cancels_everything(tmp_path: Path, with_a_scorer: bool) -> None:
    rig = Rig(tmp_path)
    if with_a_scorer:
        with_scorer(rig, delay=lambda rollout: 10_000)
    rig.sampler.delay = lambda request: 10_000 if request.sample_id % 2 else 1
    run = asyncio.ensure_future(rig.run())
    await turns(40)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert rig.student.saved == []


# --------------------------------------------------------------------------------------------- stopping, resuming


async def run_and_stop(rig: Rig, kind: str, step: int) -> None:
    """Set `stop` a few turns after an event, and take the Interrupted."""

    async def watch() -> None:
        while (kind, step) not in rig.history.events:
            await turns(1)
        await turns(2)
        rig.stop.set()

    watcher = asyncio.create_task(watch())
    with pytest.raises(Interrupted) as caught:
        await rig.run()
    assert f"step {rig.student.steps_done} " in str(caught.value)
    await watcher


@pytest.mark.parametrize("with_a_scorer", [False, True])
async def test_a_stop_while_waiting_ends_at_once_with_a_checkpoint(tmp_path: Path, with_a_scorer: bool) -> None:
    rig = Rig(tmp_path, max_staleness=1)
    if with_a_scorer:
        with_scorer(rig, delay=lambda rollout: 10_000 if rollout.sample_id == 9 else 1)
    else:
        rig.sampler.delay = lambda request: 10_000 if request.sample_id == 9 else 1
    await run_and_stop(rig, "publish", 2)
    assert rig.student.saved == [2]
    assert rig.reporter.events == [("checkpoint", {"step": 2}), ("interrupted", {"step": 2})]
    assert rig.ledger.check(2, 4) == (0, 0)


async def test_a_stop_in_mid_step_finishes_the_step_first(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.student.turns_per_step = 30
    await run_and_stop(rig, "train", 2)
    assert rig.student.steps_done == 3
    assert rig.student.saved == [3]
    assert list(rig.reporter.metrics) == [1, 2, 3]
    assert rig.history.published == 3
    assert rig.reporter.events == [("checkpoint", {"step": 3}), ("interrupted", {"step": 3})]


async def test_a_stop_before_the_first_step_leaves_a_checkpoint_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.sampler.delay = lambda request: 10_000
    await run_and_stop(rig, "draw", 0)
    assert rig.student.saved == [0]
    assert rig.student.trained == []


async def test_a_stop_right_after_a_checkpoint_leaves_that_one(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_every=3)
    rig.student.turns_per_step = 30
    await run_and_stop(rig, "train", 2)
    assert set(rig.student.saved) == {3}
    assert rig.reporter.events[-1] == ("interrupted", {"step": 3})


async def test_a_stop_completes_an_open_checkpoint_and_its_evaluation_first(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_every=2, evaluate_every=2)
    rig.student.turns_per_commit, rig.student.turns_per_step = 60, 30

    async def evaluate(version: int) -> dict[str, float]:
        await turns(50)
        return {"reverse_kl": float(version)}

    async def watch() -> None:
        while ("train", 2) not in rig.history.events:
            await turns(1)
        rig.stop.set()

    watcher = asyncio.create_task(watch())
    with pytest.raises(Interrupted, match="step 3"):
        await rig.run(evaluate=evaluate)
    await watcher
    assert rig.student.saved == [2, 3]
    assert list(rig.reporter.metrics) == [1, 2, 3]
    assert rig.reporter.metrics[2]["heldout/reverse_kl"] == 2.0


async def test_a_stop_in_a_hurry_does_not_wait_for_an_evaluation(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_every=2, evaluate_every=2)
    rig.student.turns_per_step = 30

    async def evaluate(version: int) -> dict[str, float]:
        await asyncio.Event().wait()
        raise AssertionError

    async def watch() -> None:
        while ("train", 2) not in rig.history.events:
            await turns(1)
        rig.stop.set()
        rig.hurry.set()

    watcher = asyncio.create_task(watch())
    with pytest.raises(Interrupted, match="step 3"):
        await asyncio.wait_for(rig.run(evaluate=evaluate), 20)
    await watcher
    assert rig.student.saved == [2, 3]
    assert list(rig.reporter.metrics) == [1, 2, 3]
    assert "heldout/reverse_kl" not in rig.reporter.metrics[2]


async def test_a_stop_in_the_last_step_is_the_end_of_the_run(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    trained = rig.student.train_step

    async def train_step(batch: Any, text: Any = None, scheduled: Any = None) -> Any:
        if batch.step == rig.settings.steps:
            rig.stop.set()
        return await trained(batch)

    rig.student.train_step = train_step
    # By then every batch is there: what is finished is kept as finished, not as interrupted.
    await rig.run()
    assert rig.student.saved == [6]
    assert ("interrupted", {"step": 6}) not in rig.reporter.events


def fingerprints(*rigs: Rig) -> Counter:
    """Multiset of everything that was trained: sample id, step, prompt ids, response ids."""
    return Counter(entry for rig in rigs for entry in rig.student.trained)


@pytest.mark.parametrize(("max_staleness", "learns"), [(0, True), (1, False), (3, False)])
@pytest.mark.parametrize("kind", ["train", "publish"])
async def test_an_interrupted_and_resumed_run_trains_what_an_undisturbed_one_does(
    tmp_path: Path, max_staleness: int, learns: bool, kind: str
) -> None:
    # With staleness, which version draws a sample depends on time, and so would its tokens; a student that stays as it
    # is shows that nothing else does.
    options: dict[str, Any] = {"max_staleness": max_staleness, "learns": learns}
    whole = Rig(tmp_path / "whole", **options)
    (tmp_path / "whole").mkdir()
    await whole.run()

    first = Rig(tmp_path, **options)
    first.sampler.delay, first.student.turns_per_step = shuffled_delay, 20
    await run_and_stop(first, kind, 2)
    (at,) = first.student.saved
    assert 0 < at < first.settings.steps

    second = Rig(tmp_path, start_step=at, **options)
    second.sampler.delay = lambda request: request.sample_id * 3 % 7
    await second.run()
    trained_once_and_in_its_step(second)
    assert fingerprints(first, second) == fingerprints(whole)
    assert second.ledger.check(6, 4) == (0, 0)
    for sample_id, request in second.history.requested.items():
        before = whole.history.requested[sample_id]
        assert (request.seed, request.prompt_id) == (before.seed, before.prompt_id)
        assert sample_id >= at * 4


async def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, start_step=6)
    await rig.run()
    assert rig.student.trained == []
    assert rig.history.requested == {}


async def test_a_resume_from_an_older_checkpoint_redoes_the_steps_after_it(tmp_path: Path) -> None:
    """The run dies in step 4 with a checkpoint at 2: step 3 is trained again, the same, and counts once in the ledger."""
    first = Rig(tmp_path, checkpoint_every=2, max_staleness=0)
    first.student.failures = {4: TrainingError("dead")}
    with pytest.raises(TrainingError):
        await first.run()
    assert first.student.saved == [2]
    assert first.student.steps_done == 3
    second = Rig(tmp_path, start_step=2, max_staleness=0)
    second.ledger.truncate(2)
    await second.run()
    assert second.ledger.check(6, 4) == (0, 0)
    again = [entry for entry in first.student.trained if entry[1] == 2]
    assert again == [entry for entry in second.student.trained if entry[1] == 2]


# ------------------------------------------------------------------------------------------------------- scoring


async def test_waiting_for_the_scorer_is_counted_as_such(tmp_path: Path) -> None:
    rig = with_scorer(Rig(tmp_path, steps=2, max_staleness=0), seconds=0.3)
    await rig.run()
    for metrics in rig.reporter.metrics.values():
        assert metrics["wait_teacher_s"] > 0.25
        assert metrics["wait_rollout_s"] < 0.15
    alone = Rig(tmp_path, steps=2, max_staleness=0)
    await alone.run()
    assert all(metrics["wait_teacher_s"] < 0.15 for metrics in alone.reporter.metrics.values())


def requests_for(rig: Rig, number: int) -> list[SampleRequest]:
    prompts = make_prompts()
    return [SampleRequest(i, i, prompts[i].token_ids, 0.5, sample_seed(1, "train", i), 6) for i in range(number)]


async def collect(rig: Rig, requests: list[SampleRequest], **more: Any) -> list[Rollout]:
    async with aclosing(draw_scored(rig.sampler, rig.scorer, requests, **more)) as stream:
        return [rollout async for part in stream for rollout in part]


async def test_both_routes_give_every_rollout_once_and_scored_alike(tmp_path: Path) -> None:
    alone, apart = Rig(tmp_path), with_scorer(Rig(tmp_path))
    apart.sampler.delay = shuffled_delay
    sampled: list[int] = []

    async def on_sampled(sample_ids: list[int]) -> None:
        sampled.extend(sample_ids)

    co_sampled = await collect(alone, requests_for(alone, 7))
    prefilled = await collect(apart, requests_for(apart, 7), on_sampled=on_sampled)
    assert sorted(sampled) == list(range(7))
    by_id = [sorted(rollouts, key=lambda rollout: rollout.sample_id) for rollouts in (co_sampled, prefilled)]
    assert [rollout.sample_id for rollout in by_id[1]] == list(range(7))
    for left, right in zip(*by_id, strict=True):
        assert right.teacher == "toy"
        np.testing.assert_array_equal(left.token_ids, right.token_ids)
        np.testing.assert_array_equal(left.teacher_logprobs, right.teacher_logprobs)


async def test_a_slow_rollout_does_not_hold_back_the_scoring_of_others(tmp_path: Path) -> None:
    rig = with_scorer(Rig(tmp_path))
    rig.sampler.delay = lambda request: 500 if request.sample_id == 0 else 1
    rollouts = await collect(rig, requests_for(rig, 4))
    assert rollouts[-1].sample_id == 0
    scored_before: list[int] = []
    rig = with_scorer(Rig(tmp_path))
    rig.sampler.delay = lambda request: 500 if request.sample_id == 0 else 1
    async with aclosing(draw_scored(rig.sampler, rig.scorer, requests_for(rig, 4))) as stream:
        async for part in stream:
            if ("drawn", 0) in rig.history.events:
                break
            scored_before += [rollout.sample_id for rollout in part]
    assert sorted(scored_before) == [1, 2, 3]


async def test_a_scorer_that_leaves_rollouts_out_is_an_error_not_a_hang(tmp_path: Path) -> None:
    rig = with_scorer(Rig(tmp_path), silent=True)
    with pytest.raises(EngineError, match="4 rollouts missing"):
        await asyncio.wait_for(collect(rig, requests_for(rig, 4)), 5)


@pytest.mark.parametrize("with_a_scorer", [False, True])
async def test_a_reader_that_leaves_early_leaves_no_task(tmp_path: Path, with_a_scorer: bool) -> None:
    rig = with_scorer(Rig(tmp_path)) if with_a_scorer else Rig(tmp_path)
    rig.sampler.delay = lambda request: 10_000 if request.sample_id else 1
    before = asyncio.all_tasks()
    async with aclosing(draw_scored(rig.sampler, rig.scorer, requests_for(rig, 4))) as stream:
        async for _ in stream:
            break
    await turns(3)
    assert asyncio.all_tasks() == before
    assert not rig.history.running


async def test_tells_which_samples_training_waits_for(tmp_path: Path) -> None:
    """Every wait is told with samples of the step that is next, and its end."""
    rig = Rig(tmp_path, max_staleness=0)
    told: list[list[int]] = []
    await rig.run(on_wait=lambda ids: told.append(list(ids)))
    assert told[1::2] == [[]] * rig.settings.steps
    batch_size = rig.settings.batch_size
    for step, ids in enumerate(told[::2]):
        assert ids
        assert set(ids) <= set(range(step * batch_size, (step + 1) * batch_size))


class WithTurns:
    """A sampler whose rollouts have context of the environment after their first token, as tool turns will."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    async def sample(self, requests: Any) -> Any:
        async for part in self.sampler.sample(requests):
            yield [self._with_turn(rollout) for rollout in part]

    def _with_turn(self, rollout: Rollout) -> Rollout:
        columns = {}
        for column in rollout_columns():
            values = value_of(rollout, column.name)
            # Older than the buffer allows, and zeros, where a column of a real turn may hold anything.
            context = {"writer": 4, "student_versions": -7}.get(column.name, 0)
            columns[column.name] = None if values is None else np.insert(values, [1, 1], context)
        return with_columns(rollout, columns)


async def test_context_of_the_environment_is_trained_and_counted_nowhere(tmp_path: Path) -> None:
    """Two runs that draw the same, one with turns: the same targets, metrics, ledger and totals."""
    plain, turned = (Rig(tmp_path / name, max_staleness=1) for name in ("plain", "turned"))
    for rig in (plain, turned):
        rig.ledger._path.parent.mkdir()
    turned.sampler = WithTurns(turned.sampler)  # type: ignore[assignment]
    await plain.run()
    await turned.run()
    for one, other in zip(plain.student.trained, turned.student.trained, strict=True):
        assert other[0] == one[0]
        assert other[3] == one[3], "the targets"
        assert other[2] == (*one[2], 0, 0), "the turn is context, as the prompt is"
    assert turned.totals == plain.totals
    clock = {"tokens_per_s", "queue_age_s"} | {name for name in METRICS if name.startswith("wait_")}
    for step, metrics in plain.reporter.metrics.items():
        found = turned.reporter.metrics[step]
        assert 1.0 <= found.pop("turns") <= found.pop("environment_tokens") == 2.0
        assert {name: found[name] for name in found.keys() - clock} == {name: metrics[name] for name in metrics.keys() - clock}
    lines = [[json.loads(line) for line in rig.ledger._path.read_text().splitlines()] for rig in (plain, turned)]
    for one, other in zip(*lines, strict=True):
        # The responses are others: they hold the turns.
        assert one.pop("responses_sha256") != other.pop("responses_sha256")
        assert one == other
