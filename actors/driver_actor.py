"""Actors pinned to the driver's node: they hold the run's shared state, and end with the run."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_driver_node(actor: type[Any], **options: Any) -> Any:
    """Ray actor class pinned to the driver's node, so that it survives the loss of any other node.

    Its calls are not listed in Ray's state API: there are dozens per step, and Ray's GCS kept a record of each, 40 KB per step,
    up to its limit of 100,000 records.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here, enable_task_events=False, **options)
