"""Memory of nodes and GPUs that several parts of a run share: whether it suffices wherever Ray puts them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from cluster.planning.memory import GIB
from cluster.planning.placement import STUDENT, Node, Placed, engine_setting
from cluster.planning.roles import Role, weakest_gpu
from kdray.errors import CapacityError

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Share:
    """Bundles of a role on a node, each with a share of a GPU."""

    role: str
    share: float
    count: int
    memory: float
    """Bytes of the GPU that each takes."""


def check_node_memory(placed: Sequence[Placed], roles: Sequence[Role], nodes: Sequence[Node]) -> None:
    """Raises: CapacityError if the CPU roles of a node need more memory than Ray reports for it."""
    used: Counter[int] = Counter()
    for item, role in zip(placed, roles, strict=True):
        if role.bundle.resources.get("GPU"):
            continue
        for index, count in item.nodes.items():
            used[index] += math.ceil(count * role.memory_bytes)
    for index, needed in used.items():
        there = nodes[index].resources.get("memory")
        if there is not None and needed > there:
            raise CapacityError(
                f"node {nodes[index].name}: the parts planned for it need {needed / GIB:.1f} GiB of memory, and it has "
                f"{there / GIB:.1f}; lower kv_cache_gib or replicas, or spread them (max_replicas_per_node)"
            )


def check_gpu_memory(placed: Sequence[Placed], roles: Sequence[Role], nodes: Sequence[Node]) -> None:
    """Raises: CapacityError if the roles that may share a GPU need more memory than it has."""
    for index, node in enumerate(nodes):
        _, limit = weakest_gpu([node])
        shares = [
            Share(role.bundle.role, share, item.nodes[index], role.memory_bytes)
            for item, role in zip(placed, roles, strict=True)
            if index in item.nodes and 0 < (share := role.bundle.resources.get("GPU", 0.0)) < 1
        ]
        if limit is not None:
            check_sharing(node.name, limit, shares)


def check_sharing(node: str, gpu_bytes: float, shares: Sequence[Share]) -> None:
    """Check every set of bundles that Ray may put on one GPU, which looks at their shares alone.

    Args: gpu_bytes: memory of a GPU of the node. Raises: CapacityError naming the fullest set that does not fit.
    """
    fullest = max(_together(shares), key=lambda held: _bytes(shares, held), default=None)
    if fullest is None or sum(bool(count) for count in fullest) < 2:
        return
    needed = _bytes(shares, fullest)
    if needed <= gpu_bytes:
        return
    held = [(each, count) for each, count in zip(shares, fullest, strict=True) if count]
    parts = ", ".join(f"{count} x {each.role} ({each.memory / GIB:.1f} GiB, {each.share:g} of a GPU)" for each, count in held)
    engines = [(each, count) for each, count in held if each.role != STUDENT]
    largest, count = max(engines, key=lambda pair: pair[0].memory * pair[1])
    room = (gpu_bytes - needed + count * largest.memory) / gpu_bytes / count
    remedy = f"lower {engine_setting(largest.role)}.gpu_memory_utilization to {math.floor(100 * room) / 100:g}, or "
    raise CapacityError(
        f"node {node}: Ray may put {parts} on one GPU of {gpu_bytes / GIB:.1f} GiB, and they need {needed / GIB:.1f}; "
        f"{remedy if room > 0 else ''}make their shares of a GPU more than 1 together"
    )


def _together(shares: Sequence[Share]) -> Iterator[tuple[int, ...]]:
    """Numbers of bundles of each role that fit on one GPU by their shares."""
    most = (min(each.count, math.floor(1 / each.share + _ROUNDING)) for each in shares)
    for counts in product(*(range(number + 1) for number in most)):
        if sum(each.share * count for each, count in zip(shares, counts, strict=True)) <= 1 + _ROUNDING:
            yield counts


def _bytes(shares: Sequence[Share], counts: Sequence[int]) -> float:
    return sum(each.memory * count for each, count in zip(shares, counts, strict=True))
