"""When a call counts as slow, so that another replica is asked too: hedged requests. Pure.

Source: Dean & Barroso 2013, The Tail at Scale (Communications of the ACM 56, 2). Their threshold is a percentile of all
requests; here calls are few and differ in size, so it is the slowest of the last ones, and a call has to be overtaken besides.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_REMEMBERED = 32
_ENOUGH = 8
"""Calls that have to be known before one can be called slow."""

AT_LEAST_S = 2.0
"""Below this no call is slow: pauses of a moment, such as a replica's that takes new weights, are nothing to act on."""


@dataclass(frozen=True)
class _Call:
    size: int
    began: float


class CallTimes:
    """The calls of one kind to one pool: those that run, and how long the last ones took. The caller reads the clock, in s."""

    def __init__(self, factor: float) -> None:
        """Args: factor: a call is slow when it takes so many times as long as the slowest of the last ones."""
        self._factor = factor
        self._running: dict[str, _Call] = {}
        self._took: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self._newest_answered = float("-inf")

    def begin(self, call: str, size: int, now: float) -> None:
        """A call was sent. Args: size: tokens that it may take to draw, or has to score."""
        self._running[call] = _Call(size, now)

    def end(self, call: str, answered: bool, now: float) -> None:
        """It is over. Args: answered: whole, by the replica that it was sent to first."""
        ended = self._running.pop(call)
        if answered:
            self._took.append((ended.size, now - ended.began))
            self._newest_answered = max(self._newest_answered, ended.began)

    def is_slow(self, call: str, now: float) -> bool:
        """Whether a running call takes much longer than it should, and one that was sent no earlier has been answered.

        Where no other call overtook it, the whole pool is behind, and to ask twice would only add to its work. A call is given
        in proportion more time than a smaller one took, and no less than a larger one.
        """
        if len(self._took) < _ENOUGH:
            return False
        asked = self._running[call]
        slowest = max(took * max(1.0, asked.size / size) for size, took in self._took)
        late = now - asked.began > max(AT_LEAST_S, self._factor * slowest)
        return late and self._newest_answered >= asked.began
