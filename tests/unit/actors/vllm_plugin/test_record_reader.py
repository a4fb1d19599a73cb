"""Calls by which the records of finished requests are read."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from actors.vllm_plugin import record_reader
from actors.vllm_plugin.record_reader import RecordReader, Wanted
from actors.vllm_plugin.record_table import FLOATS, INTS, Passes, Slab, write_records
from actors.vllm_plugin.row_statistics import measured_columns


def slab(key: str, length: int) -> Slab:
    """Records of a request, in which every token id is its key's."""
    names = INTS.names
    floats = np.zeros((length, len(FLOATS.names)), np.float32)
    ints = np.zeros((length, len(names)), np.int32)
    ints[:, names.index("token_ids")] = int(key)
    return Slab(floats, ints, np.zeros((length, 0), np.float16))


class Worker:
    """A worker that answers calls, each after a turn of the loop, unless it lacks a record."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.dropped: set[str] = set()

    async def __call__(self, method: str, *args: Any) -> list[Any]:
        await asyncio.sleep(0)
        if method == "kdray_drop":
            self.dropped |= set(args[0])
            return [None, None]
        wanted: list[Wanted] = args[0]
        self.calls.append([key for key, _ in wanted])
        if lost := self.dropped & set(self.calls[-1]):
            raise KeyError(*lost)
        columns = measured_columns(teacher=True, student=True, hidden=False)
        return [write_records([slab(*each) for each in wanted], columns, Passes(len(self.calls), 0)), None]


async def test_requests_that_end_close_to_each_other_share_a_call() -> None:
    worker = Worker()
    reader = RecordReader(worker)

    async def one(number: int) -> None:
        await asyncio.sleep(number * record_reader.EVERY_S / 20)
        (record,) = await reader.read([(str(number), 3)])
        assert record["token_ids"].tolist() == [number] * 3

    await asyncio.gather(*map(one, range(20)))
    assert sorted(key for call in worker.calls for key in call) == sorted(map(str, range(20))), "each of them once"
    assert worker.calls[0] == ["0"], "the first one waits for nothing"
    assert len(worker.calls) < 10
    assert reader.passes.steps == len(worker.calls)


async def test_a_reader_that_gives_up_takes_no_record_from_the_others() -> None:
    worker = Worker()
    reader = RecordReader(worker)
    await reader.read([("1", 1)])
    gone, stays = (asyncio.create_task(reader.read([(key, 2)])) for key in ("2", "3"))
    await asyncio.sleep(0)
    gone.cancel()
    await reader.drop(["2"])
    (record,) = await stays
    assert record["token_ids"].tolist() == [3, 3]
    assert worker.calls == [["1"], ["3"]]


async def test_an_error_reaches_every_request_of_its_call_and_no_other() -> None:
    worker = Worker()
    reader = RecordReader(worker)
    worker.dropped = {"1"}
    with pytest.raises(KeyError, match="1"):
        await reader.read([("1", 1), ("2", 1)])
    (record,) = await reader.read([("4", 1)])
    assert record["token_ids"].tolist() == [4]
