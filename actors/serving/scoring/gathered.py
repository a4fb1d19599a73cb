"""Scoring of responses that an engine drew from the student alone, gathered into few passes of the teacher.

A step of the engine that scores one sequence runs the teacher on the tokens of every request in it. So finished draws wait for
each other: until they fill a pass; until those of the oldest training step in the engine have all been drawn, since that step
waits for nothing else; or until one has waited for half of the time that it took to draw, which bounds what the wait can add to
any response.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple

from kdray.rollouts.race import first_of
from kdray.types import Rollout

PATIENCE = 0.5
"""Longest wait of a draw, as a share of the time that it took."""

Score = Callable[[Sequence[Rollout]], AsyncGenerator[list[tuple[int, Rollout]]]]
"""Scores rollouts, and streams each with its index when it is done."""


class _Waiting(NamedTuple):
    rollout: Rollout
    min_version: int
    """Oldest student version that its request allowed, which is the same for all samples of a training step."""
    scored: asyncio.Future[Rollout]


class GatheredScoring:
    """Draws that wait to be scored, of all calls to one engine."""

    def __init__(self, score: Score, pass_tokens: int) -> None:
        """Args: pass_tokens: tokens that the engine processes in one pass."""
        self._score = score
        self._pass_tokens = pass_tokens
        self._drawing: Counter[int] = Counter()
        """Number of draws in progress, by their requests' oldest student version."""
        self._waiting: list[_Waiting] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._running: dict[asyncio.Task[None], list[_Waiting]] = {}

    async def complete(
        self, drawn: AsyncGenerator[list[Rollout]], total: int, unscored: Mapping[int, int]
    ) -> AsyncGenerator[list[Rollout]]:
        """Pass on the rollouts of a stream, those without the teacher's columns once they have been scored.

        Args: total: number of rollouts in the stream; unscored: sample ids of those that will have to be scored, with the
              oldest student version that each one's request allows.
        Raises: the exception of the stream, or of the scoring.
        """
        ended: asyncio.Queue[list[Rollout]] = asyncio.Queue()
        work = asyncio.ensure_future(self._follow(drawn, unscored, ended))
        given = 0
        try:
            while given < total:
                part = await first_of(ended.get(), work)
                while not ended.empty():
                    part = part + ended.get_nowait()
                given += len(part)
                yield part
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await self._end_given_up()

    async def _end_given_up(self) -> None:
        """Stop scoring where nobody waits for the result any more."""
        given_up = [
            task
            for task, waiting in self._running.items()
            if all(each.scored.done() for each in waiting) and any(each.scored.cancelled() for each in waiting)
        ]
        for task in given_up:
            task.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)

    async def _follow(
        self, drawn: AsyncGenerator[list[Rollout]], unscored: Mapping[int, int], ended: asyncio.Queue[list[Rollout]]
    ) -> None:
        async def pass_on(scored: asyncio.Future[Rollout]) -> None:
            ended.put_nowait([await scored])

        began = time.monotonic()
        left = Counter(unscored.values())
        self._drawing += left
        try:
            async with asyncio.TaskGroup() as tasks, aclosing(drawn):
                async for part in drawn:
                    took = time.monotonic() - began
                    if scored := [rollout for rollout in part if rollout.teacher_logprobs is not None]:
                        ended.put_nowait(scored)
                    for rollout in part:
                        if rollout.teacher_logprobs is None:
                            version = unscored[rollout.sample_id]
                            tasks.create_task(pass_on(self._add(rollout, version, took)))
                            left[version] -= 1
                            self._drawing[version] -= 1
                    self._flush_if_due()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            # Those that a failure or the reader cut off; others may have waited for them.
            self._drawing -= left
            self._flush_if_due()

    def _add(self, rollout: Rollout, min_version: int, took: float) -> asyncio.Future[Rollout]:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rollout, min_version, loop.create_future())
        self._waiting.append(waiting)
        due = loop.time() + PATIENCE * took
        if self._deadline is None or due < self._deadline.when():
            self._disarm()
            self._deadline = loop.call_at(due, self._flush)
        return waiting.scored

    def _flush_if_due(self) -> None:
        if not self._waiting:
            return
        tokens = sum(len(each.rollout.prompt_ids) + len(each.rollout.token_ids) for each in self._waiting)
        oldest = min(each.min_version for each in self._waiting)
        if tokens >= self._pass_tokens or not any(count for version, count in self._drawing.items() if version <= oldest):
            self._flush()

    def _flush(self) -> None:
        self._disarm()
        # The calls of some may have been given up.
        waiting, self._waiting = [each for each in self._waiting if not each.scored.done()], []
        if waiting:
            task = asyncio.ensure_future(self._run(waiting))
            self._running[task] = waiting
            task.add_done_callback(self._running.pop)

    async def _run(self, waiting: list[_Waiting]) -> None:
        try:
            async with aclosing(self._score([each.rollout for each in waiting])) as parts:
                async for part in parts:
                    for index, rollout in part:
                        if not waiting[index].scored.done():
                            waiting[index].scored.set_result(rollout)
        except Exception as error:
            for each in waiting:
                if not each.scored.done():
                    each.scored.set_exception(error)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
