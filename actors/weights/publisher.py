"""Rank 0's publication through the object store: weights are copied at once, and sent while the next step trains."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import save

from kdray.checks.parity import TrainedLogprobs


class Publisher:
    """Publication of versions in order, one at a time, from a thread of this process.

    The objects belong to this process, so they are lost with it: its successor publishes again, under a name of its own.
    """

    def __init__(self, store: Any, thread: ThreadPoolExecutor) -> None:
        """Args: store: handle of a `WeightStore`; thread: a single worker; publishers that share it keep their order."""
        self._store = store
        self._name = uuid.uuid4().hex
        self._thread = thread
        self._sending: Future[None] | None = None

    def publish(self, version: int, buckets: Iterable[dict[str, torch.Tensor]], trained: TrainedLogprobs | None = None) -> None:
        """Copy the weights, which may change as soon as this returns, and send them in the background.

        Args: buckets: copies in main memory, which belong to the publisher from now on; trained: as for `WeightStore.commit`.
        Raises: the error of the version before, if that did not arrive.
        """
        self.flush()
        # Each is put while the next one is gathered.
        puts = [self._thread.submit(self._put, bucket) for bucket in buckets]
        self._sending = self._thread.submit(self._commit, version, puts, trained)

    def flush(self) -> None:
        """Return once everything is published. Raises: the error of the last version, if it did not arrive."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()

    def _put(self, bucket: dict[str, torch.Tensor]) -> Any:
        # Safetensors bytes: replicas write them to a file unchanged.
        return ray.put(np.frombuffer(save(bucket), dtype=np.uint8))

    def _commit(self, version: int, puts: list[Future[Any]], trained: TrainedLogprobs | None) -> None:
        # In lists, since Ray replaces references that are arguments themselves by their values.
        references = [[put.result()] for put in puts]
        ray.get(self._store.commit.remote(version, references, trained, self._name))
