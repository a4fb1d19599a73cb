"""Waiting for room on a cluster that others use, or that grows: a placement group asks for all of a run's parts at once.

Ray sees to it that the group gets everything or nothing, and a group that waits is what Ray's autoscaler reads as demand, with
its labels. It only reserves: once there is room, the group is let go and the parts are started where it was.
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

from cluster.planning.placement import Bundle, Node, check_capacity
from kdray.config import ClusterSettings
from kdray.errors import CapacityError

_TELL_EVERY_S = 15.0
_LOOK_EVERY_S = 1.0
_START_S = 60.0
"""Time that a process may take to start where it was given room; what it has taken looks like what is missing meanwhile."""


def live_nodes() -> list[Node]:
    """Every living node with what it has in all."""
    return [Node.of_ray(node) for node in ray.nodes() if node["Alive"]]


def free_nodes(held: Mapping[str, Mapping[str, float]] = MappingProxyType({})) -> list[Node]:
    """Every living node with what nobody else holds. Args: held: what this run has reserved, by node id."""
    from ray._private.state import available_resources_per_node

    # The one number that Ray shows nowhere else.
    free = available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            mine = held.get(node["NodeID"], {})
            resources = {name: amount + mine.get(name, 0.0) for name, amount in free.get(node["NodeID"], {}).items()}
            found.append(Node.of_ray({**node, "Resources": {**mine, **resources}}))
    return found


class Reservation:
    """Room for all parts of a run. `release` it when the first of them starts."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def release(self) -> None:
        """Let the room go; only the first call does something."""
        group, self._group = self._group, None
        if group is not None:
            ray.util.remove_placement_group(group)


@contextlib.contextmanager
def reserved(wanted: Sequence[Bundle], settings: ClusterSettings, tell: Callable[[str], None]) -> Iterator[Reservation]:
    """Check that the cluster can hold the bundles, and wait until it does.

    Args: tell: called with a line every few seconds while there is not enough room.
    Raises: CapacityError at once for what it can never give (unless `cluster.may_grow`), and after `cluster.wait_s` with what
    is missing and on which nodes.
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
            # Even without patience, Ray needs a moment to answer.
            if group.wait(max(2.0, min(_TELL_EVERY_S, left))):
                # The group knows nothing of one node for all ranks, or of so many replicas a node.
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
    """Ray's entry for every actor that has a process on some node."""
    # The state API would want a dashboard.
    from ray._private.state import actors

    return [actor for actor in actors().values() if actor["State"] == "ALIVE"]


async def await_placed(
    unplaced: Callable[[], Sequence[Bundle]], settings: ClusterSettings, on_event: Callable[..., None]
) -> None:
    """Wait until every part that was started has its place: since the reservation was let go, others may have taken it.

    Args: unplaced: asks Ray which bundles no node has taken yet; blocks. on_event: told every few seconds what is missing.
    Raises: CapacityError after `cluster.wait_s` (and not before a minute) with what is missing and on which nodes.
    """
    started = told = time.monotonic()
    while waiting := await asyncio.to_thread(unplaced):
        missing = await asyncio.to_thread(_missing, waiting)
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
    """What a placed group holds, by node id."""
    table = ray.util.placement_group_table(group)
    held: dict[str, Counter[str]] = {}
    for bundle, node_id in table["bundles_to_node_id"].items():
        held.setdefault(node_id, Counter()).update(table["bundles"][bundle])
    return held


def _missing(wanted: Sequence[Bundle], held: Mapping[str, Mapping[str, float]] = MappingProxyType({})) -> str | None:
    """What is missing at the moment, and on which nodes; None where all have room. Args: held: what is reserved already."""
    try:
        check_capacity(wanted, free_nodes(held))
    except CapacityError as error:
        return f"of what is free now, {error}"
    return None
