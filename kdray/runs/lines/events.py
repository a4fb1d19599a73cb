"""Events of a run, read one line at a time: of kinds that come with single calls, the newest and their sums are kept."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdray.runs.lines.streams import stream

FREQUENT = ("hedge", "retry", "storage_retry", "endpoint_lost", "endpoint_back", "transfer_failed")
"""Kinds of which a long run may have hundreds of thousands."""
NEWEST = 1000
"""Events kept of each of them."""


@dataclass(frozen=True)
class Events:
    """Events of a run in their order, without the older ones of frequent kinds."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Number of all events, by kind."""
    rollouts: Counter[str] = field(default_factory=Counter)
    """Sum of their `rollouts`, by kind."""


def read_events(path: Path) -> Events:
    """Read events.jsonl; none if there is no file. Raises: DataError naming the line that cannot be read."""
    counts: Counter[str] = Counter()
    rollouts: Counter[str] = Counter()
    kept: list[tuple[int, dict[str, Any]]] = []
    newest: dict[str, deque[tuple[int, dict[str, Any]]]] = {kind: deque(maxlen=NEWEST) for kind in FREQUENT}
    for number, event in enumerate(each_event(path)):
        kind = str(event.get("kind"))
        counts[kind] += 1
        if type(count := event.get("rollouts")) is int:
            rollouts[kind] += count
        newest.get(kind, kept).append((number, event))
    # By number: two events are never compared.
    merged = sorted([*kept, *(each for events in newest.values() for each in events)], key=lambda pair: pair[0])
    return Events([event for _, event in merged], counts, rollouts)


def each_event(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events one by one; none if there is no file. Raises: as for `read_events`."""
    return (event for event, _ in stream(path, dict))
