"""Versions published by their changes are those published whole, bit for bit, whichever of them a replica meets or misses."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ObjectLostError
from safetensors.torch import save

from actors.weights import publisher as publisher_module
from actors.weights import store as store_module
from actors.weights.deltas import CHANGES, Chain, Delta, Sent
from actors.weights.publisher import Publisher
from actors.weights.store import pull
from tests.support.local_actors import Handle, ReportingStore

Bucket = dict[str, torch.Tensor]


class Object:
    """An object of Ray's store and the reference to it in one."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.lost = False

    def __await__(self) -> Any:
        return self._get().__await__()

    async def _get(self) -> Any:
        if self.lost:
            raise ObjectLostError("00" * 28, None, "")
        return self.value


class Rank:
    """Rank 0's publisher in front of a store of this process."""

    def __init__(self, patch: pytest.MonkeyPatch, full_every: int) -> None:
        self.store = ReportingStore()
        self.reported = self.store.reported
        self.put: list[Object] = []
        loop = asyncio.get_running_loop()

        def put(value: Any) -> Object:
            self.put.append(Object(value))
            return self.put[-1]

        def get(call: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(call, loop).result(5)

        patch.setattr(publisher_module, "ray", SimpleNamespace(put=put, get=get))
        patch.setattr(store_module, "_LOST_S", 0.01)
        handle: Any = SimpleNamespace(
            **{name: SimpleNamespace(remote=getattr(self.store, name)) for name in ("commit", "take_lost")}
        )
        self._publisher = Publisher(handle, ThreadPoolExecutor(1), full_every)

    async def publish(self, version: int, buckets: list[Bucket], fixed: list[Bucket] | None = None) -> Sent | None:
        """Publish copies; returns what was new, if that is counted."""
        self.put.clear()
        copies = [{name: tensor.clone() for name, tensor in bucket.items()} for bucket in buckets]
        await asyncio.to_thread(self._publisher.publish, version, copies, None, fixed)
        await asyncio.to_thread(self._publisher.flush)
        return await self.store.sent()

    async def lost(self) -> bool:
        """The publisher's question before a version."""
        return await asyncio.to_thread(self._publisher.lost)

    async def size(self, version: int, buckets: list[Bucket]) -> int:
        """Publish copies; returns bytes that were new."""
        sent = await self.publish(version, buckets)
        assert sent is not None
        return sent.nbytes

    async def load(self, at_least: int = 0) -> tuple[int, list[bytes]]:
        """A replica's fetch, which holds nothing beforehand."""
        version, folder, paths = await asyncio.wait_for(pull(Handle(self.store), at_least), 5)
        contents = [path.read_bytes() for path in paths]
        shutil.rmtree(folder)
        return version, contents


def model(seed: int = 0) -> list[Bucket]:
    """Three buckets: bfloat16 weights with a norm beside them, float32 ones, and buffers of an odd size."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(40, 50, generator=generator).bfloat16() * 0.02, "norm": torch.ones(50, dtype=torch.bfloat16)},
        {"head": torch.randn(30, 20, generator=generator)},
        {"mask": torch.zeros(3, dtype=torch.bool)},
    ]


def move(buckets: list[Bucket], generator: torch.Generator, share: float) -> None:
    """Change a share of the weights by less than a percent, and now and then a sign or a NaN."""
    for tensor in (tensor for bucket in buckets for tensor in bucket.values() if tensor.is_floating_point()):
        chosen = torch.rand(tensor.shape, generator=generator) < share
        factor = 1 + 0.01 * torch.randn(tensor.shape, generator=generator)
        tensor.copy_(torch.where(chosen, (tensor.float() * factor).to(tensor.dtype), tensor))
        flat = tensor.view(-1)
        flat[0] = -flat[0] if share < 0.03 else float("nan")


async def test_replicas_that_follow_skip_or_come_late_load_what_was_published_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, buckets, generator = Rank(monkeypatch, full_every=6), model(), torch.Generator().manual_seed(1)
    whole = sum(len(save(bucket)) for bucket in buckets)
    sizes = []
    for version in range(40):
        sizes.append(await rank.size(version, buckets) / whole)
        # Every loading begins with nothing: it is a new replica's, and one's that missed all versions before.
        if version % 7 != 3:
            assert await rank.load(version) == (version, [save(bucket) for bucket in buckets]), version
        # Often few, sometimes most.
        move(buckets, generator, share=(0.01, 0.02, 0.05, 0.9)[version % 4])
    assert sizes[0] == 1.0
    assert min(sizes[1:]) < 0.1
    assert max(sizes[1:]) > 0.9, "most weights changed"


async def test_a_version_comes_whole_when_its_turn_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, buckets, generator = Rank(monkeypatch, full_every=4), model()[:1], torch.Generator().manual_seed(1)
    whole = len(save(buckets[0]))
    sizes = []
    for version in range(9):
        sizes.append(await rank.size(version, buckets))
        move(buckets, generator, share=0.02)
    assert [size == whole for size in sizes] == [True, False, False, False] * 2 + [True]
    assert all(size < 0.2 * whole for size in sizes if size != whole)


async def test_what_did_not_change_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen weights of a student with an adapter, in buckets of their own."""
    rank, buckets = Rank(monkeypatch, full_every=2), model()[:2]
    await rank.publish(0, buckets)
    for version in range(1, 6):
        buckets[0]["w"][0, 0] += 1
        sent = await rank.publish(version, buckets)
        assert len(rank.put) == 1, "the second bucket is still there"
        assert sent is not None
        assert sent.changed == 1
        assert await rank.load(version) == (version, [save(bucket) for bucket in buckets])


@pytest.mark.parametrize("full_every", [1, 3])
async def test_fixed_weights_are_put_once_and_are_part_of_every_version(
    full_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that starts late, or missed versions, has all of them; others bring a version's own weights alone."""
    rank, (moved, *fixed), generator = Rank(monkeypatch, full_every), model(), torch.Generator().manual_seed(1)
    everything = [save(bucket) for bucket in fixed]
    sizes = []
    for version in range(8):
        sent = await rank.publish(version, [moved], fixed if version == 0 else None)
        assert sent is not None
        sizes.append(sent.nbytes)
        assert len(rank.put) == (3 if version == 0 else 1)
        if version != 3:
            assert await rank.load(version) == (version, [*everything, save(moved)])
        move([moved], generator, share=0.02)
    own = len(save(moved))
    assert sizes[0] == own + sum(map(len, everything))
    assert [size == own for size in sizes[1:]] == [version % full_every == 0 for version in range(1, 8)]
    assert max(sizes[1:]) == own


async def test_lost_fixed_weights_are_told_and_replaced_by_those_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, (moved, *fixed) = Rank(monkeypatch, full_every=100), model()
    await rank.publish(0, [moved], fixed)
    assert not await rank.lost()
    rank.put[1].lost = True
    loading = asyncio.create_task(rank.load(0))
    await asyncio.wait_for(rank.reported.wait(), 5)
    moved["w"][0, 0] += 1
    assert await rank.lost()
    assert await rank.publish(1, [moved], fixed) == Sent(sum(len(save(bucket)) for bucket in (moved, *fixed)))
    assert await loading == (1, [*map(save, fixed), save(moved)]), "the changes begin with a whole bucket, too"
    other = [{"v": torch.ones(7)}]
    await rank.publish(2, [moved], other)
    assert await rank.load(2) == (2, [save(other[0]), save(moved)]), "of another phase"
    assert await rank.publish(3, [moved], []) is not None
    assert await rank.load(3) == (3, [save(moved)])


@pytest.mark.parametrize("lost", ["whole", "changes"])
async def test_after_a_loss_the_next_version_is_whole(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every version until the next whole one would contain what was lost."""
    rank, buckets, generator = Rank(monkeypatch, full_every=100), model()[:1], torch.Generator().manual_seed(1)
    await rank.publish(0, buckets)
    objects = list(rank.put)
    move(buckets, generator, share=0.02)
    await rank.publish(1, buckets)
    objects += rank.put
    objects[0 if lost == "whole" else 1].lost = True
    loading = asyncio.create_task(rank.load(1))
    await asyncio.wait_for(rank.reported.wait(), 5)
    assert not loading.done()
    move(buckets, generator, share=0.02)
    assert await rank.size(2, buckets) == len(save(buckets[0]))
    assert await loading == (2, [save(buckets[0])])
    # Reports that came while it was being published cost one more whole version, and no others.
    sizes = []
    for version in range(3, 6):
        move(buckets, generator, share=0.02)
        sizes.append(await rank.size(version, buckets))
    assert max(sizes[1:]) < 0.2 * len(save(buckets[0]))


async def test_another_model_or_another_number_of_buckets_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, buckets = Rank(monkeypatch, full_every=100), model()
    await rank.publish(0, buckets)
    other = [{"v": torch.randn(9, 9).bfloat16()}, *model(seed=3), {"more": torch.zeros(2)}]
    for version, each in enumerate((other, other[:2], buckets), start=1):
        await rank.publish(version, each)
        assert await rank.load(version) == (version, [save(bucket) for bucket in each])


async def test_every_version_is_whole_and_not_counted_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, buckets = Rank(monkeypatch, full_every=1), model()[:1]
    for version in range(3):
        assert await rank.publish(version, buckets) is None
        assert len(rank.put) == 1
        assert isinstance(rank.put[0].value, np.ndarray)
        assert await rank.load(version) == (version, [save(buckets[0])])


def _fails(value: Any) -> Any:
    raise MemoryError(value)


def test_a_version_that_could_not_be_put_is_not_what_the_next_is_compared_with() -> None:
    put: Callable[[Any], Any] = lambda value: value  # noqa: E731
    chain = Chain(100, lambda value: put(value))
    files = np.zeros((4, 3000), dtype=np.uint8)
    files[1, 0], files[2, 10], files[3] = 1, 1, np.arange(3000) % 7
    chain.add(files[0])
    for failing in (files[1], files[3]):
        put = _fails
        with pytest.raises(MemoryError):
            chain.add(failing)
        put = lambda value: value  # noqa: E731
    (whole, *deltas), sent = chain.add(files[2])
    assert sent.changed == 1
    data = whole.copy()
    for delta in deltas:
        delta.apply(data)
    assert np.array_equal(data, files[2])


@given(st.data())
def test_changes_lead_from_one_file_to_any_other(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 1200))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    before = rng.integers(0, 2**16, count).astype(np.uint16)
    differs = rng.random(count) < data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    after = np.where(differs, before ^ rng.integers(1, 2**16, count).astype(np.uint16), before)
    delta = Delta.of(before != after, after)
    assert Delta.size(int(differs.sum()), count) == delta.counts.nbytes + delta.places.nbytes + delta.values.nbytes
    file = before.copy().view(np.uint8)
    delta.apply(file)
    assert file.tobytes() == after.tobytes()


def test_changes_of_another_file_are_refused() -> None:
    words = np.ones(600, dtype=np.uint16)
    with pytest.raises(ValueError, match="changes of 3 blocks do not belong to a file of 400 bytes"):
        Delta.of(words != 0, words).apply(np.zeros(400, dtype=np.uint8))


def test_changes_since_a_whole_bucket_stay_below_half_of_it() -> None:
    rng = np.random.default_rng(0)
    chain, words = Chain(10**6, lambda value: value), rng.integers(0, 2**16, 5000).astype(np.uint16)
    held = []
    for _ in range(60):
        references, _ = chain.add(words.copy().view(np.uint8))
        held.append(sum(each.counts.nbytes + each.places.nbytes + each.values.nbytes for each in references[1:]))
        words[rng.random(5000) < 0.05] += 1
    assert 0.4 * words.nbytes < max(held) <= CHANGES * words.nbytes
    assert held.count(0) > 3


def test_numbers_of_a_version(tmp_path: Path) -> None:
    assert Sent(10).metrics() == {"update_bytes": 10.0}
    assert (Sent(10) + Sent(4, 8, 2)).metrics() == {"update_bytes": 14.0, "update_changed": 0.25}
