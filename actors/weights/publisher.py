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

from actors.weights.deltas import Chain, Sent
from kdray.checks.parity import TrainedLogprobs


class Publisher:
    """Publication of versions in order, one at a time, from a thread of this process.

    The objects belong to this process, so they are lost with it: its successor publishes again, under a name of its own.
    """

    def __init__(self, store: Any, thread: ThreadPoolExecutor, full_every: int = 1) -> None:
        """Args: store: handle of a `WeightStore`; thread: a single worker; publishers that share it keep their order;
        full_every: versions after which a bucket is published whole, with its changes alone in between; 1 keeps no copies.
        """
        self._store = store
        self._full_every = full_every
        self._chains: list[Chain] = []
        """Of the buckets in their order; used by the thread alone."""
        self._fixed: list[list[Any]] = []
        """Buckets of weights that no version changes; every version refers to them again."""
        self._lost: bool | None = None
        """True if a replica could not fetch the version before; None if that was not asked."""
        self._name = uuid.uuid4().hex
        self._thread = thread
        self._sending: Future[None] | None = None

    def lost(self) -> bool:
        """True if a replica could not fetch the version before; the next one has to bring everything again.

        Raises: the error of that version, if it did not arrive.
        """
        self.flush()
        self._lost = ray.get(self._store.take_lost.remote())
        return self._lost

    def publish(
        self,
        version: int,
        buckets: Iterable[dict[str, torch.Tensor]],
        trained: TrainedLogprobs | None = None,
        fixed: Iterable[dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """Copy the weights, which may change as soon as this returns, and send them in the background.

        Args: buckets: copies in main memory, which stay as they are until the next version is published; trained: as for
        `WeightStore.commit`; fixed: the version's other weights, which are part of every version until some are given again;
        None if they were.
        Raises: the error of the version before, if that did not arrive.
        """
        self.flush()
        lost, self._lost = self._lost, None
        begun = self._thread.submit(self._begin, lost)
        # Each is put while the next one is gathered.
        held = None if fixed is None else [self._thread.submit(self._put_fixed, bucket) for bucket in fixed]
        puts = [self._thread.submit(self._put, number, bucket) for number, bucket in enumerate(buckets)]
        self._sending = self._thread.submit(self._commit, version, begun, puts, trained, held)

    def flush(self) -> None:
        """Return once everything is published. Raises: the error of the last version, if it did not arrive."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()

    def _begin(self, lost: bool | None) -> None:
        if self._full_every > 1 and (ray.get(self._store.take_lost.remote()) if lost is None else lost):
            # Every version would contain what a replica could not fetch, until the next whole one.
            self._chains = []

    def _put(self, number: int, bucket: dict[str, torch.Tensor]) -> tuple[list[Any], Sent]:
        if number == len(self._chains):
            self._chains.append(Chain(self._full_every, ray.put))
        # Safetensors bytes: replicas write them to a file unchanged.
        return self._chains[number].add(np.frombuffer(save(bucket), dtype=np.uint8))

    def _put_fixed(self, bucket: dict[str, torch.Tensor]) -> tuple[list[Any], Sent]:
        # Nothing will be compared with it.
        return Chain(1, ray.put).add(np.frombuffer(save(bucket), dtype=np.uint8))

    def _commit(
        self,
        version: int,
        begun: Future[None],
        puts: list[Future[tuple[list[Any], Sent]]],
        trained: TrainedLogprobs | None,
        held: list[Future[tuple[list[Any], Sent]]] | None,
    ) -> None:
        begun.result()
        # In lists, since Ray replaces references that are arguments themselves by their values.
        fixed = None if held is None else [put.result() for put in held]
        buckets = [put.result() for put in puts]
        if fixed is not None:
            self._fixed = [each for each, _ in fixed]
        new = [each for _, each in (*(fixed or ()), *buckets)]
        sent = sum(new, Sent(0)) if self._full_every > 1 or self._fixed else None
        references = [*self._fixed, *(each for each, _ in buckets)]
        ray.get(self._store.commit.remote(version, references, trained, self._name, sent))
