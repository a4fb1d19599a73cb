"""Ray Serve request router for pools of several replicas: `actors.serving.replica_choice.soonest`, run in the caller's
process."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from actors.serving.replica_choice import ReplicaLoad, soonest

SLOW_FOR_S = 60.0
"""Time for which a slow replica gets calls only if no other is available. Then it is tried again."""


class ThroughputRouter(RequestRouter):
    """Sends each call to the replica that is expected to finish it soonest.

    Rates are reported by the replicas if they may differ (`RatedReplica.record_routing_stats`); calls in flight are counted
    here, from the choice on: the replicas for a burst are chosen before any call is sent, and otherwise the whole burst would
    go to one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._assigned: dict[str, ReplicaID] = {}
        self._choosing: dict[str, asyncio.Future[Any]] = {}
        self._requests: dict[str, str] = {}
        """Request by ticket."""
        self._tickets: dict[str, str] = {}
        """Ticket by request: the inverse mapping, since calls end often."""
        self._slow_until: dict[ReplicaID, float] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica, and the others as second choice in case Serve finds the best one full.

        Slow replicas are left out while there are others, and so is the one whose call is duplicated.
        """
        for request in [request for request, future in self._choosing.items() if future.cancelled()]:
            self._forget(request)
        route = pending_request.kwargs.get("route") if pending_request is not None else None
        now = time.monotonic()
        slow = {replica for replica, until in self._slow_until.items() if until > now}
        first = None if route is None or route.instead_of is None else self._replica_of(route.instead_of)
        if first is not None:
            slow.add(first)
            self._slow_until[first] = now + SLOW_FOR_S
        # If all are slow: all except the one whose call is duplicated; if that is the only one, that one.
        left_out: tuple[set[ReplicaID | None], ...] = (slow, {first}, set())
        candidates = next(
            (found for out in left_out if (found := [each for each in candidate_replicas if each.replica_id not in out])), []
        )
        calls = Counter(self._assigned.values())
        loads = [ReplicaLoad(calls[each.replica_id], each.routing_stats.get("tokens_per_s")) for each in candidates]
        ranked = [candidates[index] for index in soonest(loads)]
        if pending_request is not None and ranked:
            request = pending_request.metadata.internal_request_id
            self._assigned[request] = ranked[0].replica_id
            self._choosing[request] = pending_request.future
            if route is not None:
                self._requests[route.ticket] = request
                self._tickets[request] = route.ticket
            # If all are full, Serve should sleep before the next choice.
            pending_request.routing_context.should_backoff = True
        return [ranked[:1], ranked[1:]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request = pending_request.metadata.internal_request_id
        self._choosing.pop(request, None)
        # A short call may have ended before Serve reports it here.
        if request in self._assigned:
            self._assigned[request] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._forget(internal_request_id)

    def _replica_of(self, ticket: str) -> ReplicaID | None:
        """Replica that works on a call; None if the call has ended, or waits for a replica."""
        request = self._requests.get(ticket, "")
        return None if request in self._choosing else self._assigned.get(request)

    def _forget(self, request: str) -> None:
        self._choosing.pop(request, None)
        self._assigned.pop(request, None)
        self._requests.pop(self._tickets.pop(request, ""), None)
