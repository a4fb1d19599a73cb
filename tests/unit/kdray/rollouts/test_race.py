"""A race between work and what may end it: who wins, what is cancelled, and who is waited for."""

from __future__ import annotations

import asyncio

import pytest

from kdray.rollouts.race import Stopped, all_of, both, first_of
from tests.support.fakes import turns


async def after(number: int, result: str = "done") -> str:
    await turns(number)
    return result


class Work:
    """Work without an end, which takes some turns to clean up."""

    def __init__(self, clean_up: int = 0) -> None:
        self.clean_up = clean_up
        self.begun = self.ended = False

    async def run(self) -> None:
        self.begun = True
        try:
            await asyncio.Event().wait()
        finally:
            await turns(self.clean_up)
            self.ended = True


async def test_work_that_ends_gives_its_result_and_the_stop_is_cancelled() -> None:
    stop = Work()
    assert await first_of(after(3), stop.run()) == "done"
    await turns(1)
    assert stop.ended


async def test_a_result_of_none_is_no_stop() -> None:
    assert await first_of(asyncio.sleep(0), asyncio.Event().wait()) is None


async def test_a_stop_that_ends_first_cancels_the_work() -> None:
    work = Work()
    with pytest.raises(Stopped):
        await first_of(work.run(), after(3))
    await turns(1)
    assert work.begun
    assert work.ended


async def test_work_that_ends_at_the_same_time_counts() -> None:
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    over.set_result(None)
    assert await first_of(after(0), over) == "done"


async def test_failures_of_both_rise() -> None:
    async def fail(error: Exception) -> None:
        await turns(2)
        raise error

    with pytest.raises(ValueError, match="work"):
        await first_of(fail(ValueError("work")), asyncio.Event().wait())
    work = Work()
    with pytest.raises(KeyError, match="stop"):
        await first_of(work.run(), fail(KeyError("stop")))
    await turns(1)
    assert work.ended


async def test_work_that_is_given_up_is_waited_for_within_its_time() -> None:
    quick, slow = Work(clean_up=20), Work(clean_up=10**9)
    with pytest.raises(Stopped):
        await first_of(quick.run(), after(3), clean_up_s=30.0)
    assert quick.ended
    task = asyncio.ensure_future(slow.run())
    with pytest.raises(Stopped):
        await first_of(task, after(3), clean_up_s=0.01)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_caller_that_is_cancelled_ends_the_work() -> None:
    work, stop = Work(clean_up=5), Work()
    race = asyncio.ensure_future(first_of(work.run(), stop.run(), clean_up_s=30.0))
    await turns(3)
    race.cancel()
    with pytest.raises(asyncio.CancelledError):
        await race
    assert work.ended
    assert stop.ended


async def test_a_future_given_as_stop_is_raced_again() -> None:
    stop = asyncio.ensure_future(Work().run())
    for _ in range(3):
        assert await first_of(after(1), stop) == "done"
    assert not stop.done()
    stop.cancel()
    await asyncio.gather(stop, return_exceptions=True)


async def test_the_first_failure_of_several_rises_and_the_others_run_on() -> None:
    async def fail() -> None:
        await turns(2)
        raise ValueError("one")

    others = [asyncio.ensure_future(after(50)), asyncio.ensure_future(Work().run())]
    with pytest.raises(ValueError, match="one"):
        await all_of([*others, asyncio.ensure_future(fail())])
    assert not any(task.done() for task in others)
    others[1].cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await all_of([asyncio.ensure_future(after(number)) for number in (3, 1)])
    await all_of([])


async def test_both_give_their_results_side_by_side() -> None:
    met = asyncio.Barrier(2)

    async def one(value: int) -> int:
        await asyncio.wait_for(met.wait(), 5)
        return value

    assert await both(one(1), one(2)) == (1, 2)


async def test_the_first_failure_of_both_rises_alone_and_cancels_the_other() -> None:
    cancelled: list[bool] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("the reason")

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(ValueError, match="the reason"):
        await both(waits(), fails())
    assert cancelled == [True]
