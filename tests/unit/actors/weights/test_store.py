"""Versions in the store: the newest is offered, one that is being fetched is kept, and one that was lost is waited for."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import OwnerDiedError

from actors.weights import store as module
from actors.weights.store import WeightStore, pull
from kdray.errors import EngineError
from tests.support.local_actors import Handle, ReportingStore, reference


class Slow:
    """A reference whose object does not come."""

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.sleep(60).__await__()


class Bucket:
    """Stands for a reference, and tells when nobody holds it any more."""


def held(*buckets: Any) -> list[list[Any]]:
    return [[bucket] for bucket in buckets]


def content(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def data(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


async def test_a_version_is_kept_while_it_is_fetched_and_no_longer() -> None:
    store, bucket = WeightStore(), Bucket()
    gone = weakref.ref(bucket)
    await store.commit(1, held(bucket))
    del bucket
    lease, version, buckets = await store.lease(0)
    assert (version, len(buckets)) == (1, 1)
    del buckets
    await store.commit(2, held(Bucket()))
    gc.collect()
    assert gone() is not None
    await store.release(lease)
    gc.collect()
    assert gone() is None


async def test_a_replica_that_died_while_fetching_keeps_a_version_for_some_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    store, bucket = WeightStore(), Bucket()
    gone = weakref.ref(bucket)
    await store.commit(1, held(bucket))
    del bucket
    await store.lease(0)
    await store.commit(2, held(Bucket()))
    gc.collect()
    assert gone() is not None
    monkeypatch.setattr(module, "_LEASE_S", 0.0)
    await store.commit(3, held(Bucket()))
    gc.collect()
    assert gone() is None


async def test_a_replay_of_the_same_process_is_dropped_and_its_successor_replaces_all() -> None:
    store = WeightStore()
    await store.commit(5, held(1, 2), publisher="first")
    await store.commit(4, held(3), publisher="first")
    assert await store.newest(0) == (5, 2)
    await store.commit(3, held(4), publisher="second")
    assert await store.newest(0) == (3, 1), "what the first process put is lost"
    waiting = asyncio.create_task(store.newest(5))
    await asyncio.sleep(0)
    assert not waiting.done()
    await store.commit(5, held(5), publisher="second")
    assert await asyncio.wait_for(waiting, 1) == (5, 1)


async def test_what_is_pulled_is_what_was_put() -> None:
    store = WeightStore()
    await store.commit(7, held(reference(data(b"one")), reference(data(b"two"))))
    version, folder, paths = await pull(Handle(store), 3)
    assert (version, content(paths)) == (7, [b"one", b"two"])
    shutil.rmtree(folder)
    await asyncio.sleep(0)
    assert not store._leases


async def test_the_folder_has_room_for_all_buckets_of_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An embedding is a large bucket by itself, and may come first or last."""
    asked: list[int] = []

    def folder(size: int) -> Path:
        asked.append(size)
        return tmp_path

    monkeypatch.setattr(module, "spacious_folder", folder)
    buckets = [data(bytes(size)) for size in (1000, 10, 30, 5)]
    store = WeightStore()
    await store.commit(1, held(*map(reference, buckets)))
    _, _, paths = await pull(Handle(store), 1)
    assert asked == [sum(path.stat().st_size for path in paths)] == [sum(each.nbytes for each in buckets)]


async def test_weights_that_were_lost_are_asked_for_until_they_are_published_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_S", 0.01)
    store = ReportingStore()
    lost = OwnerDiedError("00" * 28, None, "")
    await store.commit(2, held(reference(data(b"half")), reference(error=lost)), publisher="first")
    pulling = asyncio.create_task(pull(Handle(store), 2))
    await asyncio.wait_for(store.reported.wait(), 5)
    assert not pulling.done()
    await store.commit(1, held(reference(data(b"old"))), publisher="second")
    await store.commit(2, held(reference(data(b"new"))), publisher="second")
    version, folder, paths = await asyncio.wait_for(pulling, 5)
    assert (version, content(paths)) == (2, [b"new"])
    shutil.rmtree(folder)


async def test_a_bucket_that_does_not_come_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_S", 0.01)
    monkeypatch.setattr(module, "_FETCH_S", 0.05)
    store = WeightStore()
    await store.commit(1, held(Slow()))
    pulling = asyncio.create_task(pull(Handle(store), 0))
    await asyncio.sleep(0.1)
    await store.commit(2, held(reference(data(b"newer"))))
    version, folder, paths = await asyncio.wait_for(pulling, 5)
    assert (version, content(paths)) == (2, [b"newer"])
    shutil.rmtree(folder)


async def test_a_version_without_weights_is_an_error() -> None:
    store = WeightStore()
    await store.commit(1)
    with pytest.raises(EngineError, match="version 1 was published without weights"):
        await pull(Handle(store), 0)
