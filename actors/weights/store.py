"""Store of student weights: published once by rank 0, pulled by every replica that is behind.

The store keeps only the newest complete version. A replica that starts late or restarts holds an old version like any slow one,
and catches up in the same way; nothing is pushed, so no list of replicas is needed.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kdray.checks.parity import Verdict


class WeightStore:
    """Newest published weights, bucket by bucket; an actor with async methods.

    Buckets are returned as results of calls, not as references to stored objects: a reference handed out by the store, and
    dropped by it for a new version, left a replica's get waiting forever, once in a few hundred updates (Ray 2.60).
    """

    def __init__(self) -> None:
        self._pending: dict[int, dict[int, np.ndarray]] = {}
        self._version = -1
        self._buckets: list[np.ndarray] = []
        self._trained: np.ndarray | None = None
        self._verdict: Verdict | None = None
        """Of the newest version that a replica has compared."""
        self._refusal: Verdict | None = None
        self._largest_gap: float | None = None
        self._published = asyncio.Condition()

    async def put_bucket(self, version: int, index: int, data: np.ndarray) -> None:
        """Add a bucket: safetensors bytes as uint8 [size], which stay in the object store while the array is referenced."""
        self._pending.setdefault(version, {})[index] = data

    async def commit(self, version: int, num_buckets: int, trained: np.ndarray | None = None) -> None:
        """Make `version` the newest, once all its buckets are here; an older version (a replay) is dropped.

        Args: trained: the trainer's log q under this version, by which replicas check what they loaded
              (`kdray.checks.parity`); None if they cannot.
        Raises: ValueError naming the missing buckets.
        """
        buckets = self._pending.pop(version, {})
        missing = sorted(set(range(num_buckets)) - set(buckets))
        if missing:
            raise ValueError(f"student version {version}: buckets {missing} of {num_buckets} never arrived")
        async with self._published:
            if version > self._version:
                self._version = version
                self._buckets = [buckets[index] for index in range(num_buckets)]
                self._trained = trained
                self._published.notify_all()

    async def newest(self, at_least: int) -> tuple[int, int]:
        """Wait until the newest version is `at_least` this; return it and its number of buckets."""
        async with self._published:
            await self._published.wait_for(lambda: self._version >= at_least)
            return self._version, len(self._buckets)

    async def trained(self, version: int) -> np.ndarray | None:
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

    async def bucket(self, version: int, index: int) -> np.ndarray | None:
        """A bucket of the newest version; None if `version` is no longer the newest."""
        return self._buckets[index] if version == self._version else None


async def pull(store: Any, at_least: int) -> tuple[int, Path, list[Path]]:
    """Fetch the newest weights into files: (version, folder to delete afterwards, safetensors files).

    The engine that loads them is a separate process outside Ray, so it gets the weights by path, in shared memory if that has
    room for them twice. If a newer version appears during the fetch, the fetch restarts with it.
    """
    while True:
        version, num_buckets = await store.newest.remote(at_least)
        folder: Path | None = None
        paths: list[Path] = []
        try:
            for index in range(num_buckets):
                bucket = await store.bucket.remote(version, index)
                if bucket is None:
                    break
                if folder is None:
                    folder = await asyncio.to_thread(_spacious_folder, bucket.nbytes * num_buckets)
                paths.append(folder / f"bucket-{index:05d}.safetensors")
                await asyncio.to_thread(paths[-1].write_bytes, bucket.data)
        except BaseException:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if folder is not None and len(paths) == num_buckets:
            return version, folder, paths
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder)


def _spacious_folder(size: int) -> Path:
    """Create a folder in shared memory if that has room for `size` bytes twice, else in the temporary folder."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 2 * size
    return Path(tempfile.mkdtemp(prefix="kdray-weights-", dir=shared if roomy else None))
