"""Rate limiting of requests to an endpoint: pure arithmetic on a clock that the caller reads."""

from __future__ import annotations

import math


class RateLimiter:
    """Spaces starts at least 60 / per_minute seconds apart, and allows none during a delay that the endpoint asked for.

    Times are seconds of a monotonic clock. The next caller in line queries `delay`, sleeps, repeats until it is 0, and calls
    `start`: so a delay also applies to callers already waiting, and one that is cancelled takes no slot.
    """

    def __init__(self, per_minute: float | None) -> None:
        """Args: per_minute: maximum starts per minute; None sets no limit."""
        self._gap_s = 0.0 if per_minute is None else 60.0 / per_minute
        self._earliest = -math.inf

    def delay(self, now: float) -> float:
        """Seconds until the next request may start; 0 if it may now."""
        return max(0.0, self._earliest - now)

    def start(self, now: float) -> None:
        """Record that a request starts."""
        self._earliest = max(self._earliest, now + self._gap_s)

    def pause(self, seconds: float, now: float) -> None:
        """Allow no start for `seconds`."""
        self._earliest = max(self._earliest, now + seconds)
