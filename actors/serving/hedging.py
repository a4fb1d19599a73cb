"""Hedged requests: detection of slow calls, which are then also sent to a second replica; and of calls that are lost. Pure.

Source: Dean & Barroso 2013, The Tail at Scale (Communications of the ACM 56, 2). Their threshold is a percentile of all
requests; here calls are few and differ in size, so the threshold is the slowest of the last calls, and a call must also have
been overtaken, or the whole pool must have stopped answering.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_REMEMBERED = 32
_ENOUGH = 8
"""Finished calls needed before any call can be considered slow."""

AT_LEAST_S = 2.0
"""Duration below which no call is slow: brief pauses, such as a replica's weight update, need no hedge."""

_STALLED = 3.0
"""Multiple of the time allowed, after which a call is slow although none overtook it, if no other has been answered either."""


_LOST = 10.0
"""Multiple of the slowest of the last calls for as long as which a call is silent before it counts as lost."""


class Patience:
    """Longest silence of a call of one kind, from the calls that one pool has answered. The caller reads the clock, in s."""

    def __init__(self, at_least_s: float) -> None:
        """Args: at_least_s: shortest of these silences: before the first answer, a replica may compile or wait for weights."""
        self._at_least_s = at_least_s
        self._took: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)

    def answered(self, size: int, took_s: float) -> None:
        """Register a complete answer. Args: size: as for `CallTimes.begin`."""
        self._took.append((max(1, size), took_s))

    def silence_s(self, size: int) -> float:
        """Longest silence of a call of this size. The time of the slowest grows in proportion to the size."""
        slowest = max((took_s * max(1.0, size / answered) for answered, took_s in self._took), default=0.0)
        return max(self._at_least_s, _LOST * slowest)


@dataclass(frozen=True)
class _Call:
    size: int
    began: float


class CallTimes:
    """Running calls of one kind to one pool, and the durations of the last ones. The caller reads the clock, in s."""

    def __init__(self, factor: float) -> None:
        """Args: factor: a call is slow if it takes this many times as long as the slowest of the last ones."""
        self._factor = factor
        self._running: dict[str, _Call] = {}
        self._took: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self._newest_answered = float("-inf")
        """Time at which the newest of the answered calls was sent."""
        self._answered_at = float("-inf")

    def begin(self, call: str, size: int, now: float) -> None:
        """Register a call that was sent. Args: size: maximum number of tokens to sample, or number of tokens to score."""
        self._running[call] = _Call(size, now)

    def end(self, call: str, answered: bool, now: float) -> None:
        """Register the end of a call. Args: answered: completely, by the replica that it was first sent to."""
        ended = self._running.pop(call)
        if answered:
            self._took.append((ended.size, now - ended.began))
            self._newest_answered = max(self._newest_answered, ended.began)
            self._answered_at = max(self._answered_at, now)

    def is_slow(self, call: str, now: float) -> bool:
        """Check for a running call that takes much longer than expected, while a call sent no earlier has already finished.

        If no other call overtook it, the whole pool is slow, and a second request would only add load; unless no call at all
        has been answered for long: all of them may have been sent to the one replica that stands still. The time allowed grows
        in proportion to size compared with smaller calls, and is no less than that of larger ones.
        """
        if len(self._took) < _ENOUGH:
            return False
        asked = self._running[call]
        slowest = max(took * max(1.0, asked.size / size) for size, took in self._took)
        allowed = max(AT_LEAST_S, self._factor * slowest)
        if self._newest_answered >= asked.began:
            return now - asked.began > allowed
        return now - max(asked.began, self._answered_at) > _STALLED * allowed
