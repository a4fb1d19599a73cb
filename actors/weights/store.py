"""Store of student weights: published once by rank 0, pulled by every replica that is behind.

The bytes lie in Ray's object store on rank 0's node, and move from there once to each node that has replicas; the store holds
references. It keeps only the newest complete version, and older ones while a replica is fetching them. A replica that starts
late or restarts holds an old version like any slow one, and catches up in the same way; nothing is pushed, so no list of
replicas is needed.

With `training.sync_full_every` a bucket is a whole one and the changes since (`actors.weights.deltas`): every replica applies
them to the whole one that its node has fetched before, and keeps nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import ObjectLostError

from actors.weights.deltas import Delta, Sent
from actors.weights.scratch import spacious_folder
from kdray.checks.parity import TrainedLogprobs, Verdict
from kdray.errors import EngineError

logger = logging.getLogger(__name__)

_LEASE_S = 900.0
"""Time after which a version is no longer kept for a replica that began to fetch it: the replica has died."""
_FETCH_S = 300.0
"""Time for one bucket. A fetch that takes longer, or finds the objects lost with rank 0, begins again."""
_LOST_S = 1.0


class WeightStore:
    """References to the newest published weights, bucket by bucket; an actor with async methods.

    A version is kept while it is being fetched (`lease`): a reference that the store dropped for a newer version, while the
    replica that it had been handed to was fetching, left that replica's get waiting forever, once in a few hundred updates
    (Ray 2.60).
    """

    def __init__(self) -> None:
        self._version = -1
        self._buckets: Sequence[Sequence[Any]] = ()
        """For each bucket a reference, and others to its changes, in a sequence: Ray would replace a bare one by its value."""
        self._sent: Sent | None = None
        self._lost = False
        """True if a replica could not fetch a version, and the publisher has not heard of it."""
        self._publisher = ""
        self._leases: dict[int, tuple[float, Sequence[Sequence[Any]]]] = {}
        """Start and buckets of each fetch."""
        self._leased = 0
        self._trained: TrainedLogprobs | None = None
        self._verdict: Verdict | None = None
        """Of the newest version that a replica has compared."""
        self._refusal: Verdict | None = None
        self._largest_gap: float | None = None
        self._published = asyncio.Condition()

    async def commit(
        self,
        version: int,
        buckets: Sequence[Sequence[Any]] = (),
        trained: TrainedLogprobs | None = None,
        publisher: str = "",
        sent: Sent | None = None,
    ) -> None:
        """Make `version` the newest; an older version (a replay) is dropped.

        Args: buckets: of each, a reference to safetensors bytes, uint8 [size], and to each `Delta` since; trained: the
              trainer's log q under this version, by which replicas check what they loaded (`kdray.checks.parity`), None if they
              cannot; publisher: the process that owns the buckets. Those of another one are gone with it, so its first version
              replaces any other; sent: what of it is new, if that is counted.
        """
        async with self._published:
            if version > self._version or publisher != self._publisher:
                self._version, self._publisher = version, publisher
                self._buckets, self._trained, self._sent = buckets, trained, sent
                self._published.notify_all()
            self._forget_the_dead()

    async def newest(self, at_least: int) -> tuple[int, int]:
        """Wait until the newest version is `at_least` this; return it and its number of buckets."""
        async with self._published:
            await self._published.wait_for(lambda: self._version >= at_least)
            return self._version, len(self._buckets)

    async def trained(self, version: int) -> TrainedLogprobs | None:
        """The trainer's log q under the newest version; None if `version` is no longer the newest, or has none."""
        return self._trained if version == self._version else None

    async def report(self, verdict: Verdict) -> None:
        """Report a replica's comparison of a version that it has loaded, after its last attempt."""
        async with self._published:
            if self._verdict is None or verdict.version > self._verdict.version:
                self._verdict = verdict
            if self._refusal is None and not verdict.accepted:
                self._refusal = verdict
            # So that nan, too, is the largest.
            if self._largest_gap is None or not verdict.gap <= self._largest_gap:
                self._largest_gap = verdict.gap
            self._published.notify_all()

    async def report_teacher(self, verdict: Verdict) -> None:
        """Report a comparison by a replica whose teacher these weights are; it says nothing of replicas that sample."""
        async with self._published:
            if self._refusal is None and not verdict.accepted:
                self._refusal = verdict
                self._published.notify_all()

    async def verdict(self, at_least: int) -> Verdict:
        """Wait for a comparison of a version that is `at_least` this, by any replica."""
        async with self._published:
            while self._verdict is None or self._verdict.version < at_least:
                await self._published.wait()
            return self._verdict

    async def refused(self) -> Verdict:
        """Wait until a replica has refused a version."""
        async with self._published:
            while self._refusal is None:
                await self._published.wait()
            return self._refusal

    async def largest_gap(self) -> float | None:
        """Largest gap of all comparisons since the last call, nats a token; None if there was none."""
        gap, self._largest_gap = self._largest_gap, None
        return gap

    async def sent(self) -> Sent | None:
        """What was new in the newest version; None if it was not counted."""
        return self._sent

    async def report_lost(self) -> None:
        """Report that some of the newest version could not be fetched."""
        self._lost = True

    async def take_lost(self) -> bool:
        """True if there was such a report since the last call."""
        lost, self._lost = self._lost, False
        return lost

    async def lease(self, at_least: int) -> tuple[int, int, Sequence[Sequence[Any]]]:
        """Wait until the newest version is `at_least` this, and keep it: (number to release it by, version, buckets)."""
        async with self._published:
            await self._published.wait_for(lambda: self._version >= at_least)
            self._forget_the_dead()
            self._leased += 1
            self._leases[self._leased] = (time.monotonic(), self._buckets)
            return self._leased, self._version, self._buckets

    async def release(self, lease: int) -> None:
        """Release a lease, which no longer keeps its version."""
        self._leases.pop(lease, None)

    def _forget_the_dead(self) -> None:
        now = time.monotonic()
        self._leases = {number: lease for number, lease in self._leases.items() if now - lease[0] < _LEASE_S}


async def pull(store: Any, at_least: int) -> tuple[int, Path, list[Path]]:
    """Fetch the newest weights into files: (version, folder to delete afterwards, safetensors files).

    The engine that loads them is a separate process outside Ray, so it gets the weights by path, in shared memory if that has
    room for them twice. Weights whose owner has died are waited for: the ranks start again, and publish them once more.
    """
    while True:
        lease, version, buckets = await store.lease.remote(at_least)
        folder: Path | None = None
        paths: list[Path] = []
        try:
            fetched = [await asyncio.wait_for(asyncio.gather(*map(_value, bucket)), _FETCH_S) for bucket in buckets]
            if fetched:
                # The first bucket says nothing of the others: an embedding is one by itself.
                folder = await asyncio.to_thread(spacious_folder, sum(whole.nbytes for whole, *_ in fetched))
            for index, (bucket, *deltas) in enumerate(fetched):
                assert folder is not None
                paths.append(folder / f"bucket-{index:05d}.safetensors")
                await asyncio.to_thread(_write, paths[-1], bucket, deltas)
        except BaseException as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, ObjectLostError | TimeoutError):
                raise
            logger.warning("student version %d could not be fetched, and is asked for again: %r", version, error)
            await store.report_lost.remote()
            await asyncio.sleep(_LOST_S)
            continue
        finally:
            store.release.remote(lease)
        if folder is not None:
            return version, folder, paths
        raise EngineError(f"student version {version} was published without weights")


async def _value(reference: Any) -> Any:
    return await reference


def _write(path: Path, whole: np.ndarray, deltas: Sequence[Delta]) -> None:
    path.write_bytes(whole.data)
    if deltas:
        data = np.memmap(path, dtype=np.uint8, mode="r+")
        for delta in deltas:
            delta.apply(data)
