"""Choice of the replica of a pool that answers a call soonest. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaLoad:
    """Facts that a router knows of one replica."""

    calls: int
    """Calls sent to it and not yet ended."""
    tokens_per_s: float | None
    """Its measured rate; None before it answered anything, or where nobody measures."""


@dataclass(frozen=True)
class CallRoute:
    """Facts that a call tells the router of itself; replicas do not read them."""

    ticket: str
    """Name of the call."""
    instead_of: str | None = None
    """Ticket of a running call of which this is a copy: its replica is slow, and another is to be asked."""


def soonest(replicas: Sequence[ReplicaLoad]) -> list[int]:
    """Indices of the replicas, the one with the least expected time for one more call first; ties keep their order.

    The expected time is (calls + 1) / rate: calls are of like size, and a busy replica shares its rate among them. A replica
    without a rate counts with the mean of those that have one, so that it is tried and measured.
    """
    known = [replica.tokens_per_s for replica in replicas if replica.tokens_per_s]
    mean = sum(known) / len(known) if known else 1.0
    return sorted(range(len(replicas)), key=lambda index: (replicas[index].calls + 1) / (replicas[index].tokens_per_s or mean))
