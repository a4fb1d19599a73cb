"""Board on which autoscaling notes what its parts tell each other; an actor beside the driver.

The driver notes how long the trainer waits for each pool, which the replicas report to Ray Serve with their load; the policy in
Serve's controller notes the size that it asked for, which the driver tells as events.
"""

from __future__ import annotations

import time

from actors.serving.load_stats import TimeShare


class ScalingBoard:
    """Waits and sizes by pool; an actor with async methods."""

    def __init__(self) -> None:
        self._waits: dict[str, TimeShare] = {}
        self._targets: dict[str, tuple[int, str]] = {}

    async def note_waiting(self, pool: str, seconds: float | None) -> None:
        """The trainer has waited for answers of a pool for so long; None when it does not wait for it any more."""
        now = time.monotonic()
        self._waits.setdefault(pool, TimeShare(now)).switch(seconds is not None, now, seconds or 0.0)

    async def waiting(self, pool: str) -> float:
        """Seconds of the last `kdray.config.teachers.WAITING_WINDOW_S` in which the trainer waited for a pool."""
        return self._waits[pool].seconds(time.monotonic()) if pool in self._waits else 0.0

    async def note_target(self, pool: str, target: int, reason: str) -> None:
        """The size that a pool is to have from now on, and why."""
        self._targets[pool] = target, reason

    async def target(self, pool: str) -> tuple[int, str] | None:
        """The size that a pool is to have, and why; None before anybody decided."""
        return self._targets.get(pool)
