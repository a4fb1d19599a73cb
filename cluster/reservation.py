"""Waiting for room on a cluster that others use, or that grows: a placement group asks for all of a run's parts at once.

Ray sees to it that the group gets everything or nothing, and a group that waits is what Ray's autoscaler reads as demand, with
its labels. It only reserves: once there is room, the group is let go and the parts are started where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from cluster.placement import Bundle, Node, check_capacity
from kdray.config import ClusterSettings
from kdray.errors import CapacityError

_TELL_EVERY_S = 15.0


def live_nodes() -> list[Node]:
    """Every living node with what it has in all."""
    return [Node.of_ray(node) for node in ray.nodes() if node["Alive"]]


def free_nodes() -> list[Node]:
    """Every living node with what nobody holds."""
    from ray._private.state import available_resources_per_node

    # The one number that Ray shows nowhere else.
    free = available_resources_per_node()
    alive = (node for node in ray.nodes() if node["Alive"])
    return [Node.of_ray({**node, "Resources": free.get(node["NodeID"], {})}) for node in alive]


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
    each = [bundle for bundle in wanted for _ in range(bundle.count)]
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
                break
            missing = _missing(wanted)
            if left <= 0:
                raise CapacityError(f"cluster.wait_s={settings.wait_s:g}: no room for the run in that time: {missing}")
            tell(f"waiting for room ({waited:.0f} of {settings.wait_s:g} s): {missing}")
        yield reservation
    finally:
        reservation.release()


def _missing(wanted: Sequence[Bundle]) -> str:
    """What is missing at the moment, and on which nodes."""
    nodes = free_nodes()
    try:
        check_capacity(wanted, nodes)
    except CapacityError as error:
        return f"of what is free now, {error}"
    return "Ray has not placed it yet"
