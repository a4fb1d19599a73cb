"""The rollout buffer: who is admitted when, what is refused, what a batch is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from kdray.errors import EngineError
from kdray.rollouts import buffer as buffer_module
from kdray.rollouts.buffer import RolloutBuffer
from kdray.types import Rollout


def rollout(sample_id: int, versions: Sequence[int] = (0, 0)) -> Rollout:
    zeros = np.zeros(len(versions), np.float32)
    ids = np.arange(len(versions), dtype=np.int32)
    return Rollout(sample_id, 0, ids, ids, zeros, zeros, np.array(versions, np.int32), alpha=0.0, finish_reason="stop")


async def blocks(coroutine) -> bool:
    """Whether it is still waiting after everybody had their turn."""
    task = asyncio.ensure_future(coroutine)
    for _ in range(10):
        await asyncio.sleep(0)
    waiting = not task.done()
    task.cancel()
    return waiting


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_admits_max_staleness_batches_ahead_of_the_published_version(max_staleness: int) -> None:
    buffer = RolloutBuffer(batch_size=4, max_staleness=max_staleness, steps=6)
    assert await buffer.admit() == range(4 * (max_staleness + 1))
    assert await blocks(buffer.admit())
    await buffer.published(1)
    assert await buffer.admit() == range(4 * (max_staleness + 1), 4 * (max_staleness + 2))
    assert await blocks(buffer.admit())


async def test_publishing_wakes_who_waits_for_admission() -> None:
    buffer = RolloutBuffer(batch_size=2, max_staleness=0, steps=2)
    await buffer.admit()
    waiting = asyncio.ensure_future(buffer.admit())
    await asyncio.sleep(0)
    await buffer.published(1)
    assert await asyncio.wait_for(waiting, 1) == range(2, 4)


async def test_admission_ends_with_the_last_step() -> None:
    buffer = RolloutBuffer(batch_size=2, max_staleness=5, steps=3)
    assert await buffer.admit() == range(6)
    assert not await buffer.admit()
    assert not await buffer.admit()


async def test_starts_at_the_step_of_a_resume() -> None:
    buffer = RolloutBuffer(batch_size=3, max_staleness=1, steps=9, start_step=4)
    assert await buffer.admit() == range(12, 18)
    with pytest.raises(EngineError, match=r"sample 11 .*not asked for"):
        await buffer.put([rollout(11, [4])])


def test_min_version_counts_back_from_the_step_of_the_sample() -> None:
    buffer = RolloutBuffer(batch_size=4, max_staleness=2, steps=9)
    assert [buffer.min_version(sample_id) for sample_id in (0, 11, 12, 15, 16, 35)] == [0, 0, 1, 1, 2, 6]


async def test_a_batch_is_in_admission_order_whatever_the_order_of_arrival() -> None:
    buffer = RolloutBuffer(batch_size=3, max_staleness=1, steps=2)
    await buffer.admit()
    await buffer.put([rollout(5), rollout(3), rollout(4), rollout(2), rollout(0)])
    assert await blocks(buffer.batch(0))
    assert len(buffer) == 5
    waiting = asyncio.ensure_future(buffer.batch(0))
    await asyncio.sleep(0)
    await buffer.put([rollout(1)])
    ready = await asyncio.wait_for(waiting, 1)
    assert [r.sample_id for r in ready.rollouts] == [0, 1, 2]
    assert len(buffer) == 3
    assert [r.sample_id for r in (await buffer.batch(1)).rollouts] == [3, 4, 5]
    assert len(buffer) == 0


async def test_tells_whom_it_waits_for_and_when_it_stops() -> None:
    buffer = RolloutBuffer(batch_size=3, max_staleness=1, steps=2)
    await buffer.admit()
    await buffer.put([rollout(1), rollout(4)])
    told: list[list[int]] = []
    waiting = asyncio.ensure_future(buffer.batch(0, lambda ids: told.append(list(ids))))
    await asyncio.sleep(0)
    await buffer.put([rollout(0)])
    assert told == [[0, 2]]
    await buffer.put([rollout(2), rollout(3), rollout(5)])
    await waiting
    assert told == [[0, 2], []]
    await buffer.batch(1, lambda ids: told.append(list(ids)))
    assert told == [[0, 2], []], "nothing was missing"


async def test_a_wait_that_is_given_up_ends_for_everybody() -> None:
    buffer = RolloutBuffer(batch_size=1, max_staleness=0, steps=2)
    told: list[list[int]] = []
    assert await blocks(buffer.batch(0, lambda ids: told.append(list(ids))))
    await asyncio.sleep(0)
    assert told == [[0], []]


async def test_refuses_what_was_not_asked_for() -> None:
    buffer = RolloutBuffer(batch_size=2, max_staleness=0, steps=3)
    with pytest.raises(EngineError, match="sample 0 "):
        await buffer.put([rollout(0)])
    await buffer.admit()
    with pytest.raises(EngineError, match="sample 2 "):
        await buffer.put([rollout(2)])


async def test_refuses_what_came_before_even_after_it_was_trained() -> None:
    buffer = RolloutBuffer(batch_size=2, max_staleness=0, steps=3)
    await buffer.admit()
    await buffer.put([rollout(0)])
    with pytest.raises(EngineError, match=r"sample 0 .*twice"):
        await buffer.put([rollout(0)])
    with pytest.raises(EngineError, match=r"sample 1 .*twice"):
        await buffer.put([rollout(1), rollout(1)])
    await buffer.batch(0)
    with pytest.raises(EngineError, match=r"sample 1 .*twice"):
        await buffer.put([rollout(1)])


async def test_refuses_a_rollout_whose_oldest_token_is_too_stale() -> None:
    buffer = RolloutBuffer(batch_size=1, max_staleness=1, steps=5, start_step=3)
    await buffer.admit()
    await buffer.put([rollout(3, [2, 3])])  # one version behind is allowed
    with pytest.raises(EngineError, match="sample 4 was drawn by student version 2, but needs 3 or newer"):
        await buffer.put([rollout(4, [3, 2, 3])])


async def test_waits_are_split_into_drawing_and_scoring() -> None:
    buffer = RolloutBuffer(batch_size=2, max_staleness=0, steps=1)
    await buffer.admit()
    waiting = asyncio.ensure_future(buffer.batch(0))
    await asyncio.sleep(0.02)
    await buffer.sampled([0, 1])
    await asyncio.sleep(0.05)
    await buffer.put([rollout(0), rollout(1)])
    ready = await waiting
    assert 0.015 < ready.wait_rollout_s < 0.045
    assert 0.045 < ready.wait_teacher_s < 0.2


async def test_without_a_scorer_all_waiting_is_for_drawing() -> None:
    buffer = RolloutBuffer(batch_size=1, max_staleness=0, steps=1)
    await buffer.admit()
    waiting = asyncio.ensure_future(buffer.batch(0))
    await asyncio.sleep(0.02)
    await buffer.put([rollout(0)])
    ready = await waiting
    assert ready.wait_rollout_s > 0.015
    assert ready.wait_teacher_s < 0.01


async def test_what_was_ready_before_is_not_waited_for() -> None:
    buffer = RolloutBuffer(batch_size=1, max_staleness=0, steps=1)
    await buffer.admit()
    await buffer.sampled([0])
    await asyncio.sleep(0.02)
    await buffer.put([rollout(0)])
    ready = await buffer.batch(0)
    assert 0 <= ready.wait_rollout_s < 0.01
    assert 0 <= ready.wait_teacher_s < 0.01


async def test_an_answer_without_tokens_is_no_older_than_any_other() -> None:
    """A black-box teacher may answer with nothing: no version drew it."""
    buffer = RolloutBuffer(batch_size=1, max_staleness=0, steps=3, start_step=2)
    (sample_id,) = await buffer.admit()
    empty = np.empty(0, np.int32)
    await buffer.put([replace(rollout(sample_id), token_ids=empty, student_versions=empty)])
    assert len((await buffer.batch(2)).rollouts) == 1


async def test_only_what_was_drawn_has_an_age() -> None:
    """Context of the environment has no version, alone or between tokens that were drawn."""
    buffer = RolloutBuffer(batch_size=2, max_staleness=0, steps=2, start_step=1)
    await buffer.admit()
    turns = replace(rollout(2, (1, -1, 1)), writer=np.array([1, 4, 1], np.int8))
    context = replace(rollout(3, (-1,)), writer=np.array([4], np.int8))
    await buffer.put([turns, context])
    assert [one.sample_id for one in (await buffer.batch(1)).rollouts] == [2, 3]


async def test_the_queues_age_counts_from_the_admission_of_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(buffer_module.time, "perf_counter", lambda: now)
    buffer = RolloutBuffer(batch_size=2, max_staleness=1, steps=3)
    await buffer.admit()
    now = 103.0
    await buffer.put([rollout(each) for each in range(4)])
    now = 105.0
    assert (await buffer.batch(0)).queue_age_s == 5.0
    await buffer.published(1)
    await buffer.admit()
    now = 107.0
    assert (await buffer.batch(1)).queue_age_s == 7.0, "waiting in the buffer counts"
    await buffer.put([rollout(each, [1, 1]) for each in (4, 5)])
    assert (await buffer.batch(2)).queue_age_s == 2.0
