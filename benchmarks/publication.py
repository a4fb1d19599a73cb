"""Publication of a student's weights on a cluster of four nodes with two replicas each, all on this machine, without engines.

    python -m benchmarks.publication [--mib 256] [--versions 4] [--small 500]

Counts the bytes that leave every node for each version, times what training waits for and what follows in the background, and
then publishes many small versions to replicas of different speeds. Writes benchmarks/results/publication.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch

from actors.weights.copies import CopyBuffers
from tests.support.publication import NODES, REPLICAS, publication

_BUCKET = 2**22
"""Numbers of a bucket of 16 MiB."""


def bytes_and_times(mib: int, versions: int) -> dict[str, Any]:
    """Bytes between nodes for each version, and seconds."""
    with publication(count=mib // 16, size=_BUCKET, store_mib=3 * mib) as cluster:
        before = cluster.moved()
        waited, sent, loaded = [], [], []
        for version in range(versions):
            following = cluster.follow(version, version)
            begun = time.perf_counter()
            waited.append(ray.get(cluster.rank.publish.remote(version)))
            sent.append(ray.get(cluster.rank.flush.remote()))
            ray.get(following)
            loaded.append(time.perf_counter() - begun)
        after = cluster.moved()
        size = mib * 2**20 * versions
        return {
            "mib": mib,
            "versions": versions,
            "training_waits_s": median(waited),
            "background_s": median(sent),
            "all_replicas_have_it_after_s": median(loaded),
            "model_sizes_sent_by_the_drivers_node": (after.sent[0] - before.sent[0]) / size,
            "model_sizes_received_by_the_drivers_node": (after.received[0] - before.received[0]) / size,
            "model_sizes_sent_by_rank_0s_node": (after.sent[1] - before.sent[1]) / size,
            "model_sizes_received_by_the_other_nodes": [
                (there - here) / size for here, there in zip(before.received[2:], after.received[2:], strict=True)
            ],
        }


def copying(mib: int, repeats: int = 7) -> dict[str, Any]:
    """Seconds of a copy of the weights into memory that was just allocated, and into the buffers of the copy before."""
    torch.set_num_threads(1)
    tensors = [torch.zeros(_BUCKET) for _ in range(mib // 16)]
    buffers = CopyBuffers()
    times: dict[str, list[float]] = {"fresh_s": [], "reused_s": []}
    # One more, which allocates the buffers.
    for _ in range(repeats + 1):
        for name, copy in (("fresh_s", lambda tensor: tensor.to("cpu", copy=True)), ("reused_s", buffers.copy)):
            begun = time.perf_counter()
            copies = [copy(tensor) for tensor in tensors]
            times[name].append(time.perf_counter() - begun)
            del copies
    return {"mib": mib, "repeats": repeats} | {name: median(each[1:]) for name, each in times.items()}


def many(versions: int) -> dict[str, Any]:
    """Small versions in a row, to replicas of which some are slower than the rank."""
    with publication(count=3, size=40_000) as cluster:
        following = cluster.follow(0, versions - 1, (0.0, 0.02, 0.3))
        begun = time.perf_counter()
        for version in range(versions):
            ray.get(cluster.rank.publish.remote(version))
        ray.get(cluster.rank.flush.remote())
        loaded = ray.get(following, timeout=600)
        return {
            "versions": versions,
            "seconds": time.perf_counter() - begun,
            "loaded_by_each_replica": [len(each) for each in loaded],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--versions", type=int, default=4)
    parser.add_argument("--small", type=int, default=500)
    given = parser.parse_args()
    result = {
        "nodes": NODES,
        "replicas_of_a_node": REPLICAS,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__},
        "copy": copying(given.mib),
        "large": bytes_and_times(given.mib, given.versions),
        "small": many(given.small),
    }
    print(json.dumps(result, indent=2))
    (Path(__file__).parent / "results" / "publication.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
