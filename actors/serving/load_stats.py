"""Load statistics of a pool: the work of its replicas, and the time that the trainer waits for it.

Pure counters on a monotonic clock that the caller reads (seconds). Replicas and driver report them;
`actors.serving.autoscaling` and `actors.serving.replica_choice` decide by them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kdray.config.teachers import WAITING_WINDOW_S

_RATE_MEMORY_S = 60.0
"""Working time after which a response's weight in the measured rate decays to 1/e: long compared with a rollout, otherwise the
rate would jump at the end of each."""


class TimeShare:
    """Time that something was on within the last window."""

    def __init__(self, now: float, window_s: float = WAITING_WINDOW_S) -> None:
        self._born = now
        self._window_s = window_s
        self._since: float | None = None
        self._ended: deque[tuple[float, float]] = deque()

    def switch(self, on: bool, now: float, already_s: float = 0.0) -> None:
        """Record the state from now on; `already_s`: it has already been on for this long."""
        if on and self._since is None:
            self._since = now - already_s
        elif not on and self._since is not None:
            self._ended.append((self._since, now))
            self._since = None
            # Here, too: of a pool that is not autoscaled nobody asks.
            self._forget(now - self._window_s)

    def seconds(self, now: float) -> float:
        """Seconds of the window before `now` during which it was on."""
        start = now - self._window_s
        self._forget(start)
        ended = sum(end - max(begin, start) for begin, end in self._ended)
        return ended + (0.0 if self._since is None else now - max(self._since, start))

    def _forget(self, start: float) -> None:
        while self._ended and self._ended[0][1] <= start:
            self._ended.popleft()

    def share(self, now: float) -> float:
        """Share of the window in which it was on, or of the time since the start if that is shorter."""
        length = min(self._window_s, now - self._born)
        return min(1.0, self.seconds(now) / length) if length > 0 else 0.0


@dataclass
class _Call:
    began: float
    remaining: int


class Workload:
    """Calls that a replica is working on."""

    def __init__(self, slots: int, now: float) -> None:
        """Args: slots: sequences that the engine processes at once; the excess queues."""
        self._slots = slots
        self._calls: dict[int, _Call] = {}
        self._next = 0
        self._busy = TimeShare(now)
        self._idle_since = now
        self._clock = now
        # Tokens returned and seconds worked, both decaying with the seconds worked; their quotient is the rate.
        self._tokens = 0.0
        self._worked_s = 0.0

    def begin(self, rollouts: int, now: float) -> int:
        """Register a call of this many rollouts; returns its number."""
        self._advance(now)
        self._busy.switch(True, now)
        self._next += 1
        self._calls[self._next] = _Call(now, rollouts)
        return self._next

    def done(self, call: int, rollouts: int, tokens: int, now: float) -> None:
        """Register finished rollouts of a call."""
        self._advance(now)
        self._calls[call].remaining -= rollouts
        self._tokens += tokens

    def end(self, call: int, now: float) -> None:
        """Register the end of a call: finished, failed or abandoned."""
        self._advance(now)
        del self._calls[call]
        if not self._calls:
            self._busy.switch(False, now)
            self._idle_since = now

    def stats(self, now: float) -> dict[str, float]:
        """queue_age_s, ongoing (rollouts), idle_s, busy (share of the window with work)."""
        return {
            "queue_age_s": self._queue_age(now),
            "ongoing": float(sum(call.remaining for call in self._calls.values())),
            "idle_s": 0.0 if self._calls else now - self._idle_since,
            "busy": self._busy.share(now),
        }

    def tokens_per_s(self, now: float) -> float | None:
        """Tokens returned per second of work; None before the first response."""
        self._advance(now)
        return self._tokens / self._worked_s if self._tokens and self._worked_s else None

    def _advance(self, now: float) -> None:
        if self._calls:
            elapsed = now - self._clock
            fade = math.exp(-elapsed / _RATE_MEMORY_S)
            self._tokens *= fade
            # The seconds just worked decay continuously, otherwise a steady rate would depend on how often the clock is read.
            self._worked_s = self._worked_s * fade + _RATE_MEMORY_S * (1.0 - fade)
        self._clock = now

    def _queue_age(self, now: float) -> float:
        """Age of the oldest call with a rollout beyond the engine's slots, which are filled in order of arrival."""
        ahead = 0
        for call in self._calls.values():
            ahead += call.remaining
            if ahead > self._slots:
                return now - call.began
        return 0.0


class Awaited:
    """Time that the trainer waits for responses of one pool: for missing samples that were requested from this pool."""

    def __init__(self, on_change: Callable[[bool], None] = lambda waits: None) -> None:
        """Args: on_change: called at the start and end of each wait."""
        self._on_change = on_change
        self._missed: frozenset[int] = frozenset()
        # Counted: a sample may be requested twice at once, for training and for a measurement.
        self._asked: Counter[int] = Counter()
        self._since: float | None = None
        self._waited_s = 0.0

    def misses(self, ids: Iterable[int], now: float) -> None:
        """Set the samples that the trainer waits for from now on, from any pool; none when it continues."""
        self._missed = frozenset(ids)
        self._update(now)

    def asked(self, ids: Iterable[int], now: float) -> None:
        """Register samples requested from the pool."""
        self._asked.update(ids)
        self._update(now)

    def answered(self, ids: Iterable[int], now: float) -> None:
        """Register samples that the pool returned, or no longer has to return."""
        for sample_id in ids:
            self._asked[sample_id] -= 1
            if not self._asked[sample_id]:
                del self._asked[sample_id]
        self._update(now)

    @property
    def owes(self) -> bool:
        """Check for samples that were requested and not yet returned."""
        return bool(self._asked)

    def take_s(self, now: float) -> float:
        """Seconds waited since the last call of this method, a running wait included."""
        waited = self._waited_s
        if self._since is not None:
            waited += now - self._since
            self._since = now
        self._waited_s = 0.0
        return waited

    def _update(self, now: float) -> None:
        waits = any(sample_id in self._asked for sample_id in self._missed)
        if waits == (self._since is not None):
            return
        if self._since is not None:
            self._waited_s += now - self._since
        self._since = now if waits else None
        self._on_change(waits)
