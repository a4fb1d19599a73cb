"""Choice of the replica of a pool that will finish a call soonest. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaLoad:
    """Load of one replica, as known to a router."""

    calls: int
    """Calls sent to it and not yet finished."""
    tokens_per_s: float | None
    """Measured rate; None before its first response, or if rates are not measured."""


@dataclass(frozen=True)
class CallRoute:
    """Routing information of a call; read by the router, not by replicas."""

    ticket: str
    """Name of the call."""
    instead_of: str | None = None
    """Ticket of the running call that this one duplicates: its replica is slow, and another is to be chosen."""


def soonest(replicas: Sequence[ReplicaLoad]) -> list[int]:
    """Indices of the replicas by increasing expected time for one more call; ties keep their order.

    The expected time is (calls + 1) / rate: calls are of similar size, and a busy replica shares its rate among them. A replica
    without a rate counts with the mean of those that have one, so that it is tried and measured.
    """
    known = [replica.tokens_per_s for replica in replicas if replica.tokens_per_s]
    mean = sum(known) / len(known) if known else 1.0
    return sorted(range(len(replicas)), key=lambda index: (replicas[index].calls + 1) / (replicas[index].tokens_per_s or mean))
