"""Publication on a cluster of several nodes: a rank, replicas that load its versions, and the bytes that every node moved."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from actors.weights.copies import CopyBuffers
from actors.weights.publisher import Publisher
from actors.weights.store import WeightStore, pull

NODES, REPLICAS = 4, 2
_REPORTED_MS = 1000
_MOVED = re.compile(r'^ray_object_manager_bytes\{.*Type="(PushedFromLocalPlasma|Received)".*\} (\S+)$', re.MULTILINE)


def model_tensor(size: int, version: int, stride: int) -> torch.Tensor:
    """A tensor of a version: every `stride`-th number is the version, the others are 0."""
    tensor = torch.zeros(size)
    tensor[::stride] = float(version)
    return tensor


class Rank:
    """Rank 0 as a publisher: version v is `count` tensors of `size` numbers, of which every `stride`-th is v, the others 0."""

    def __init__(self, store: Any, count: int, size: int, stride: int = 1, full_every: int = 1) -> None:
        self._publisher = Publisher(store, ThreadPoolExecutor(1), full_every)
        self._model = [torch.zeros(size) for _ in range(count)]
        self._stride = stride
        self._copies = CopyBuffers()

    def publish(self, version: int) -> float:
        """Returns: seconds that training would have waited."""
        for tensor in self._model:
            tensor[:: self._stride] = float(version)
        begun = time.perf_counter()
        buckets = ({str(index): self._copies.copy(tensor)} for index, tensor in enumerate(self._model))
        self._publisher.publish(version, buckets)
        return time.perf_counter() - begun

    def flush(self) -> float:
        """Returns: seconds until everything was published."""
        begun = time.perf_counter()
        self._publisher.flush()
        return time.perf_counter() - begun


class Replica:
    """A replica's fetching of weights, without an engine."""

    def __init__(self, store: Any, stride: int = 1) -> None:
        self._store, self._stride = store, stride

    async def follow(self, first: int, last: int, pause_s: float) -> list[int]:
        """Load every version that it meets from `first` to `last`; returns them. Raises: ValueError for mixed weights."""
        versions: list[int] = []
        while not versions or versions[-1] < last:
            version, folder, paths = await pull(self._store, versions[-1] + 1 if versions else first)
            tensors = [tensor for path in paths for tensor in load_file(path).values()]
            if not all(torch.equal(tensor, model_tensor(len(tensor), version, self._stride)) for tensor in tensors):
                raise ValueError(f"version {version} holds other weights")
            shutil.rmtree(folder)
            versions.append(version)
            await asyncio.sleep(pause_s)
        return versions


@dataclass(frozen=True)
class Moved:
    """Bytes between nodes, by node: the driver's, then the nodes in their order; the rank is on the first of these."""

    sent: list[float]
    received: list[float]


@dataclass(frozen=True)
class Publication:
    """The actors of a cluster."""

    store: Any
    rank: Any
    replicas: list[Any]
    start_rank: Callable[[], Any]
    """Starts another rank 0 in place of one that has died."""

    def moved(self) -> Moved:
        """Bytes that every node has sent and received so far."""
        # The nodes report after the fact.
        time.sleep(3 * _REPORTED_MS / 1000)
        found = {}
        for node in ray.nodes():
            name = next((name for name in node["Resources"] if name.startswith("at-")), "at-0")
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(address, timeout=10) as page:
                found[name] = {kind: float(value) for kind, value in _MOVED.findall(page.read().decode())}
        in_order = [found[f"at-{number}"] for number in range(len(found))]
        return Moved([each["PushedFromLocalPlasma"] for each in in_order], [each["Received"] for each in in_order])

    def follow(self, first: int, last: int, pauses_s: Sequence[float] = (0.0,)) -> list[Any]:
        """Start following in every replica, with these pauses in turn."""
        return [
            replica.follow.remote(first, last, pauses_s[index % len(pauses_s)]) for index, replica in enumerate(self.replicas)
        ]


@contextmanager
def publication(count: int, size: int, store_mib: int = 256, stride: int = 1, full_every: int = 1) -> Iterator[Publication]:
    """A driver's node and `NODES` others, each with `REPLICAS` replicas, on this machine.

    Args: count, size: tensors of the model, and float32 numbers in each; store_mib: object store of a node, MiB;
    stride: of the numbers that change from version to version; full_every: as for `Publisher`.
    """
    options = {"object_store_memory": store_mib * 2**20, "num_cpus": 1}
    system = {"metrics_report_interval_ms": _REPORTED_MS}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "_system_config": system})
    try:
        for number in range(1, NODES + 1):
            cluster.add_node(**options, resources={f"at-{number}": 100})
        ray.init(address=cluster.address, log_to_driver=False)
        store = ray.remote(WeightStore).options(num_cpus=0, max_concurrency=100).remote()
        places: list[dict[str, float]] = [{f"at-{number}": 1} for number in range(1, NODES + 1)]

        def actor(kind: type[Any], place: dict[str, float]) -> Any:
            return ray.remote(kind).options(num_cpus=0, max_concurrency=4, resources=place)

        def start_rank() -> Any:
            return actor(Rank, places[0]).remote(store, count, size, stride, full_every)

        replicas = [actor(Replica, place).remote(store, stride) for place in places for _ in range(REPLICAS)]
        yield Publication(store, start_rank(), replicas, start_rank)
    finally:
        ray.shutdown()
        cluster.shutdown()
