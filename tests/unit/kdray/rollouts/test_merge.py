"""Merged streams: every item once, failures at once, nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from kdray.rollouts.merge import Merged
from tests.support.fakes import turns


class Source:
    """A stream of numbers with so many turns before each; knows whether it was closed."""

    def __init__(self, items: list[int], pause: int = 1, failure: Exception | None = None) -> None:
        self.items, self.pause, self.failure = items, pause, failure
        self.closed = False

    async def stream(self) -> AsyncGenerator[int]:
        try:
            for item in self.items:
                await turns(self.pause)
                yield item
            if self.failure is not None:
                raise self.failure
        finally:
            self.closed = True


async def test_every_item_comes_once_with_its_tag_and_a_slow_stream_holds_up_none() -> None:
    fast, slow = Source([1, 2, 3]), Source([10, 20], pause=50)
    async with Merged[str, int]() as merged:
        merged.add("slow", slow.stream())
        merged.add("fast", fast.stream())
        seen = [pair async for pair in merged]
    assert seen == [("fast", 1), ("fast", 2), ("fast", 3), ("slow", 10), ("slow", 20)]


async def test_a_stream_may_be_added_by_what_another_gave() -> None:
    async with Merged[str, int]() as merged:
        merged.add("first", Source([1, 2]).stream())
        seen = []
        async for tag, item in merged:
            seen.append(item)
            if tag == "first":
                merged.add("second", Source([10 * item]).stream())
    assert sorted(seen) == [1, 2, 10, 20]


async def test_no_streams_is_the_end() -> None:
    async with Merged[str, int]() as merged:
        assert [pair async for pair in merged] == []


async def test_a_failure_is_raised_and_the_others_are_closed() -> None:
    other = Source([1] * 100, pause=10)
    async with Merged[str, int]() as merged:
        merged.add("bad", Source([5], failure=ValueError("broken")).stream())
        merged.add("good", other.stream())
        with pytest.raises(ValueError, match="broken"):
            [item async for _, item in merged]
    assert other.closed


async def test_leaving_early_closes_the_streams() -> None:
    source = Source([1, 2, 3])
    async with Merged[str, int]() as merged:
        merged.add("one", source.stream())
        async for _ in merged:
            break
    assert source.closed


async def test_watched_work_ends_the_merge_by_its_failure_alone() -> None:
    async def fine() -> None:
        await turns(1)

    async def never() -> None:
        await asyncio.Event().wait()

    async def bad() -> None:
        await turns(20)
        raise ValueError("gone")

    async with Merged[str, int]() as merged:
        merged.add("one", Source([1, 2]).stream())
        merged.watch(fine())
        merged.watch(never())
        assert [item async for _, item in merged] == [1, 2]
    source = Source([1, 2, 3], pause=15)
    seen = []
    async with Merged[str, int]() as merged:
        merged.add("one", source.stream())
        merged.watch(bad())
        seen.append((await anext(merged))[1])
        with pytest.raises(ValueError, match="gone"):
            await anext(merged)
    assert seen == [1]
    assert source.closed
