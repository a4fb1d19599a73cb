"""Student weights on their way to the replicas: published once by rank 0, pulled by every replica that is behind.

The store keeps only the newest complete version. A replica that starts late or again holds an old version like any slow
one, and catches up the same way; nothing is pushed, so nobody has to know who listens.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray


class WeightStore:
    """Newest published weights, as object references that this actor owns; an actor with async methods."""

    def __init__(self) -> None:
        self._pending: dict[int, dict[int, ray.ObjectRef]] = {}
        self._version = -1
        self._buckets: list[ray.ObjectRef] = []
        self._published = asyncio.Condition()

    async def put_bucket(self, version: int, index: int, data: bytes) -> None:
        """Take one bucket (safetensors bytes). The store puts it itself, so that it outlives the rank that sent it."""
        self._pending.setdefault(version, {})[index] = ray.put(np.frombuffer(data, dtype=np.uint8))

    async def commit(self, version: int, num_buckets: int) -> None:
        """Make `version` the newest, once all its buckets are here; a version already passed (a replay) is dropped.

        Raises: ValueError naming the buckets that are missing.
        """
        buckets = self._pending.pop(version, {})
        missing = sorted(set(range(num_buckets)) - set(buckets))
        if missing:
            raise ValueError(f"student version {version}: buckets {missing} of {num_buckets} never arrived")
        async with self._published:
            if version > self._version:
                self._version = version
                self._buckets = [buckets[index] for index in range(num_buckets)]
                self._published.notify_all()

    async def newest(self, at_least: int) -> tuple[int, list[ray.ObjectRef]]:
        """The newest version and its buckets, once that is `at_least` this."""
        async with self._published:
            await self._published.wait_for(lambda: self._version >= at_least)
            return self._version, list(self._buckets)


async def pull(store: Any, at_least: int) -> tuple[int, Path, list[Path]]:
    """Fetch the newest weights into files: (version, folder to delete afterwards, safetensors files).

    The engine that loads them is another process and no part of Ray, so weights reach it by path, in shared memory where
    that has room for them twice.
    """
    version, refs = await store.newest.remote(at_least)
    buckets: Sequence[np.ndarray] = await asyncio.gather(*refs)
    size = sum(bucket.nbytes for bucket in buckets)
    folder = await asyncio.to_thread(_spacious_folder, size)
    paths = [folder / f"bucket-{index:05d}.safetensors" for index in range(len(buckets))]
    for path, bucket in zip(paths, buckets, strict=True):
        await asyncio.to_thread(path.write_bytes, bucket.data)
    return version, folder, paths


def _spacious_folder(size: int) -> Path:
    """A new folder in shared memory where that has room for `size` bytes twice, else in the temporary folder."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 2 * size
    return Path(tempfile.mkdtemp(prefix="kdray-weights-", dir=shared if roomy else None))
