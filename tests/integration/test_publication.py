"""Publication of weights on a cluster of four nodes with two replicas each, without engines."""

from __future__ import annotations

import time

import pytest
import ray

from tests.support.publication import NODES, publication

MIB = 2**20


@pytest.mark.full
@pytest.mark.timeout(300)
def test_bytes_reach_every_node_once_and_pass_by_the_driver() -> None:
    """Eight replicas load three versions each; a rank that starts again replaces what was lost with the one before."""
    count, size = 3, 4 * MIB // 4
    with publication(count, size) as cluster:
        before = cluster.moved()
        for version in range(3):
            ray.get(cluster.rank.publish.remote(version))
            assert ray.get(cluster.follow(version, version), timeout=60) == [[version]] * len(cluster.replicas)
        after = cluster.moved()
        model = 3 * count * size * 4
        received = [there - here for here, there in zip(before.received, after.received, strict=True)]
        sent = [there - here for here, there in zip(before.sent, after.sent, strict=True)]
        assert sent[0] + received[0] < MIB, "weights passed the driver's node"
        assert received[1] < MIB, "rank 0's node has them already"
        assert all(1.0 <= each / model < 1.05 for each in received[2:]), f"not once a node: {received}"
        assert sum(sent) / model < 1.05 * (NODES - 1)

        # Objects are lost with the process that put them: replicas that ask meanwhile wait for its successor.
        ray.get(cluster.rank.publish.remote(3))
        ray.get(cluster.rank.flush.remote())
        ray.kill(cluster.rank)
        time.sleep(2.0)
        waiting = cluster.follow(3, 3)
        successor = cluster.start_rank()
        ray.get(successor.publish.remote(2))
        ray.get(successor.flush.remote())
        assert ray.get(cluster.store.newest.remote(0)) == (2, count), "the lost version is still offered"
        ray.get(successor.publish.remote(3))
        assert ray.get(waiting, timeout=60) == [[3]] * len(waiting)
