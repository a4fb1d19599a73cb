"""Actors pinned to the driver's node: they hold what belongs to the run, and end with it."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_driver_node(actor: type[Any], **options: Any) -> Any:
    """The class as a Ray actor class on the driver's own node, where no other node's end can take it along.

    Its calls are not listed in Ray's state API: there are dozens a step, and Ray's GCS kept a record of each, 40 KB a step, up
    to its bound of 100,000 of them.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here, enable_task_events=False, **options)
