"""Reservation of capacity on a shared or autoscaled cluster: one placement group requests all parts of a run at once.

Ray grants the group everything or nothing, and Ray's autoscaler reads a pending group as demand, including its labels. The
group only reserves: once it is placed, it is removed, and the parts are started on the freed resources.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ray

from actors.background_call import in_daemon_thread
from cluster.planning.placement import Bundle, Node, check_capacity
from kdray.config import ClusterSettings
from kdray.errors import CapacityError

_TELL_EVERY_S = 15.0
_LOOK_EVERY_S = 1.0
_START_S = 60.0
"""Time that a process may take to start after its resources were reserved; meanwhile its own resources look unavailable."""


def live_nodes() -> list[Node]:
    """Every living node with its total resources."""
    return [Node.of_ray(node) for node in ray.nodes() if node["Alive"]]


def driver_node() -> Node:
    """The node that this process, the driver, is on, with its total resources."""
    here = ray.get_runtime_context().get_node_id()
    return next(Node.of_ray(node) for node in ray.nodes() if node["NodeID"] == here)


def free_nodes(held: Mapping[str, Mapping[str, float]] = MappingProxyType({})) -> list[Node]:
    """Every living node with its free resources. Args: held: resources reserved by this run, by node id."""
    from ray._private.state import available_resources_per_node

    # Ray exposes this number nowhere else.
    free = available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            mine = held.get(node["NodeID"], {})
            resources = {name: amount + mine.get(name, 0.0) for name, amount in free.get(node["NodeID"], {}).items()}
            found.append(Node.of_ray({**node, "Resources": {**mine, **resources}}))
    return found


class Reservation:
    """Reserved capacity for all parts of a run. `release` it when the first of them starts."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def release(self) -> None:
        """Release the capacity; only the first call has an effect."""
        group, self._group = self._group, None
        if group is not None:
            ray.util.remove_placement_group(group)


@contextlib.contextmanager
def reserved(wanted: Sequence[Bundle], settings: ClusterSettings, tell: Callable[[str], None]) -> Iterator[Reservation]:
    """Check that the cluster can hold the bundles, and wait until they are reserved.

    Args: tell: called with a line every few seconds while capacity is missing.
    Raises: CapacityError at once for what the cluster can never provide (unless `cluster.may_grow`), and after `cluster.wait_s`
    with what is missing and on which nodes.
    """
    started = time.monotonic()
    if not settings.may_grow:
        check_capacity(wanted, live_nodes())
    each = [bundle for bundle in wanted for _ in range(bundle.count) if bundle.resources]
    if not each:
        yield Reservation(None)
        return
    group = ray.util.placement_group(
        [dict(bundle.resources) for bundle in each],
        strategy="PACK",
        bundle_label_selector=[dict(bundle.labels) for bundle in each] if any(bundle.labels for bundle in each) else None,
    )
    reservation = Reservation(group)
    try:
        while True:
            waited = time.monotonic() - started
            left = settings.wait_s - waited
            # Even with no waiting time set, Ray needs a moment to answer.
            if group.wait(max(2.0, min(_TELL_EVERY_S, left))):
                # A placement group cannot express a single node for all ranks, or a limit of replicas per node.
                missing = _missing(wanted, _held(group))
                if missing is None:
                    break
                time.sleep(max(0.0, min(_TELL_EVERY_S, left)))
            else:
                missing = _missing(wanted) or "Ray has not placed it yet"
            if left <= 0:
                raise CapacityError(f"cluster.wait_s={settings.wait_s:g}: no room for the run in that time: {missing}")
            tell(f"waiting for room ({waited:.0f} of {settings.wait_s:g} s): {missing}")
        yield reservation
    finally:
        reservation.release()


def living_actors() -> list[dict[str, Any]]:
    """Ray's entries of all actors that have a process on a node."""
    # The public state API would require a dashboard.
    from ray._private.state import actors

    return [actor for actor in actors().values() if actor["State"] == "ALIVE"]


async def await_placed(
    unplaced: Callable[[], Sequence[Bundle]], settings: ClusterSettings, on_event: Callable[..., None]
) -> None:
    """Wait until every started part is placed: others may have taken the capacity since the reservation was released.

    Args: unplaced: asks Ray which bundles are not placed yet; blocks. on_event: called every few seconds with what is missing.
    Raises: CapacityError after `cluster.wait_s` (at least a minute) with what is missing and on which nodes.
    """
    started = told = time.monotonic()
    while waiting := await in_daemon_thread(unplaced):
        missing = await in_daemon_thread(_missing, waiting)
        waited = time.monotonic() - started
        if missing is not None and waited >= max(settings.wait_s, _START_S):
            raise CapacityError(
                f"cluster.wait_s={settings.wait_s:g}: {waited:.0f} s after its parts began to start, others have the room of "
                f"some: {missing}; start again once there is room (a run with --resume)"
            )
        if missing is not None and time.monotonic() - told >= _TELL_EVERY_S:
            told = time.monotonic()
            on_event("waiting_for_room", waited_s=round(waited), missing=missing)
        await asyncio.sleep(_LOOK_EVERY_S)


def _held(group: Any) -> dict[str, Counter[str]]:
    """Resources held by a placed group, by node id."""
    table = ray.util.placement_group_table(group)
    held: dict[str, Counter[str]] = {}
    for bundle, node_id in table["bundles_to_node_id"].items():
        held.setdefault(node_id, Counter()).update(table["bundles"][bundle])
    return held


def _missing(wanted: Sequence[Bundle], held: Mapping[str, Mapping[str, float]] = MappingProxyType({})) -> str | None:
    """Describe the missing resources and their nodes; None if everything fits. Args: held: what is reserved already."""
    try:
        check_capacity(wanted, free_nodes(held))
    except CapacityError as error:
        return f"of what is free now, {error}"
    return None
