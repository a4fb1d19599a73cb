"""Draws that wait to be scored together, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from actors.serving.scoring import gathered
from actors.serving.scoring.gathered import GatheredScoring
from kdray.errors import EngineError
from kdray.types import Rollout
from tests.support.fakes import turns


def drawn(sample_id: int, scored: bool = False, length: int = 3) -> Rollout:
    tokens, versions = np.full(length, sample_id, np.int32), np.zeros(length, np.int32)
    values = np.zeros(length, np.float32)
    scores = np.full(length, -1.0, np.float32) if scored else None
    return Rollout(
        sample_id, sample_id, np.array([1], np.int32), tokens, values, values, versions, 0.0, "stop", teacher_logprobs=scores
    )


class Scorer:
    """Scores the last of a batch first, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.error: Exception | None = None

    async def __call__(self, rollouts: Sequence[Rollout]) -> AsyncGenerator[list[tuple[int, Rollout]]]:
        self.batches.append([rollout.sample_id for rollout in rollouts])
        for index, rollout in reversed(list(enumerate(rollouts))):
            await turns(2)
            if self.error is not None:
                raise self.error
            yield [(index, replace(rollout, teacher_logprobs=-rollout.token_ids.astype(np.float32)))]


async def stream(parts: Sequence[list[Rollout] | Exception], each: int = 3) -> AsyncGenerator[list[Rollout]]:
    for part in parts:
        await turns(each)
        if isinstance(part, Exception):
            raise part
        yield part


async def read(
    found: GatheredScoring, parts: Sequence[list[Rollout] | Exception], total: int, *unscored: int, step: int = 0
) -> list[Rollout]:
    """Args: unscored: sample ids without scores; step: oldest student version of all of their requests."""
    rollouts = found.complete(stream(parts), total, dict.fromkeys(unscored, step))
    return [rollout async for part in rollouts for rollout in part]


@pytest.fixture(autouse=True)
def _no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "PATIENCE", 1e9)


async def test_draws_are_scored_together_once_none_is_being_drawn() -> None:
    """Those of two calls, and each answer goes to the call that drew it; what has scores is passed on at once."""
    scorer = Scorer()
    found = GatheredScoring(scorer, 1000)
    first = read(found, [[drawn(1), drawn(2, scored=True)], [drawn(3)]], 3, 1, 3)
    second = read(found, [[drawn(1)], [], [], [], [drawn(5)]], 2, 1, 5)
    one, other = await asyncio.gather(first, second)
    assert scorer.batches == [[1, 1, 3, 5]]
    assert [rollout.sample_id for rollout in one] == [2, 3, 1]
    assert sorted(rollout.sample_id for rollout in other) == [1, 5]
    for rollout in (*one, *other):
        assert rollout.teacher_logprobs is not None
        assert (rollout.teacher_logprobs == (-1.0 if rollout.sample_id == 2 else -rollout.sample_id)).all()


async def test_draws_that_fill_a_pass_are_scored_while_others_are_drawn() -> None:
    scorer = Scorer()
    parts: list[list[Rollout] | Exception] = [[drawn(index)] for index in range(5)]
    await read(GatheredScoring(scorer, 8), parts, 5, *range(5))
    assert scorer.batches == [[0, 1], [2, 3], [4]]


async def test_a_training_step_does_not_wait_for_the_next_ones_draws() -> None:
    """What of the next step waits beside it is scored with it; the older step's first draws wait for its last."""
    scorer = Scorer()
    found = GatheredScoring(scorer, 1000)
    older = read(found, [[drawn(1)], [], [drawn(2)]], 2, 1, 2, step=3)
    newer = read(found, [[drawn(11)], *([[]] * 10), [drawn(12)]], 2, 11, 12, step=4)
    await asyncio.gather(older, newer)
    assert [sorted(batch) for batch in scorer.batches] == [[1, 2, 11], [12]]


async def test_a_step_that_is_drawn_first_waits_for_the_older_one() -> None:
    scorer = Scorer()
    found = GatheredScoring(scorer, 1000)
    older = read(found, [[], [], [], [], [drawn(1)]], 1, 1, step=3)
    newer = read(found, [[drawn(11)]], 1, 11, step=4)
    await asyncio.gather(older, newer)
    assert [sorted(batch) for batch in scorer.batches] == [[1, 11]]


async def test_no_draw_waits_longer_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "PATIENCE", 0.5)
    scorer = Scorer()
    release = asyncio.Event()

    async def slow() -> AsyncGenerator[list[Rollout]]:
        yield [drawn(1)]
        await release.wait()
        yield [drawn(2)]

    stream = GatheredScoring(scorer, 1000).complete(slow(), 2, {1: 0, 2: 0})
    assert [rollout.sample_id for rollout in await asyncio.wait_for(anext(stream), 5.0)] == [1]
    release.set()
    assert [rollout.sample_id async for part in stream for rollout in part] == [2]
    assert scorer.batches == [[1], [2]]


async def test_a_failed_draw_fails_its_call_and_frees_those_that_waited_for_it() -> None:
    scorer = Scorer()
    found = GatheredScoring(scorer, 1000)
    healthy = asyncio.ensure_future(read(found, [[drawn(1)]], 1, 1))
    with pytest.raises(EngineError, match="dead"):
        await read(found, [[drawn(2)], [], [], EngineError("dead")], 2, 2, 3)
    (rollout,) = await asyncio.wait_for(healthy, 5.0)
    assert rollout.sample_id == 1
    assert scorer.batches == [[1]], "what the failed call drew is scored for nobody"


async def test_failed_scoring_fails_every_call_that_waits_for_it() -> None:
    scorer = Scorer()
    scorer.error = EngineError("dead")
    found = GatheredScoring(scorer, 1000)
    calls = [read(found, [[drawn(index)]], 1, index) for index in range(2)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["dead", "dead"]
    scorer.error = None
    assert len(await read(found, [[drawn(3)]], 1, 3)) == 1


async def test_a_reader_that_leaves_leaves_nothing_behind() -> None:
    scorer = Scorer()
    found = GatheredScoring(scorer, 1000)
    left = found.complete(stream([[drawn(1, scored=True)], [], [], [drawn(2)]]), 2, {2: 0})
    await anext(left)
    await left.aclose()
    assert len(await asyncio.wait_for(read(found, [[drawn(3)]], 1, 3), 5.0)) == 1
    assert scorer.batches == [[3]]


async def test_scoring_that_nobody_waits_for_ends_with_its_last_reader() -> None:
    """Of two calls that are scored together, the engine goes on for the one that is left."""
    open_scores: list[list[int]] = []

    async def hangs(rollouts: Sequence[Rollout]) -> AsyncGenerator[list[tuple[int, Rollout]]]:
        ids = [rollout.sample_id for rollout in rollouts]
        open_scores.append(ids)
        try:
            await asyncio.Event().wait()
            yield []
        finally:
            open_scores.remove(ids)

    found = GatheredScoring(hangs, 1000)
    readers = [asyncio.ensure_future(read(found, [[drawn(sample_id)]], 1, sample_id)) for sample_id in (1, 2)]
    await turns(20)
    assert open_scores == [[1, 2]]
    for reader, left in zip(readers, ([[1, 2]], []), strict=True):
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert open_scores == left
    assert not found._running
