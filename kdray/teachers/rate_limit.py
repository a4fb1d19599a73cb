"""When the next request to a rate-limited endpoint may start: pure arithmetic on a clock that the caller reads."""

from __future__ import annotations

import math


class Pacing:
    """Starts at least 60 / per_minute seconds apart, and none in a pause that the endpoint asked for.

    Times are seconds of a clock that never goes back. Whoever is next in line asks for its `delay`, waits, asks again until it
    is 0, and says `start`: so a pause reaches those who wait already, and one who gives up takes nobody's place.
    """

    def __init__(self, per_minute: float | None) -> None:
        """Args: per_minute: most starts in a minute; None sets no limit."""
        self._gap_s = 0.0 if per_minute is None else 60.0 / per_minute
        self._earliest = -math.inf

    def delay(self, now: float) -> float:
        """Seconds until the next request may start; 0 if it may now."""
        return max(0.0, self._earliest - now)

    def start(self, now: float) -> None:
        """Note that a request starts."""
        self._earliest = max(self._earliest, now + self._gap_s)

    def pause(self, seconds: float, now: float) -> None:
        """Let nothing start for so long."""
        self._earliest = max(self._earliest, now + seconds)
