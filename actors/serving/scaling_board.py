"""Board through which the parts of autoscaling communicate; an actor on the driver's node.

The driver records how long the trainer waits for each pool, which the replicas report to Ray Serve with their load; the policy
in Serve's controller records the target size, for which the driver writes events.
"""

from __future__ import annotations

import time

from actors.serving.load_stats import TimeShare


class ScalingBoard:
    """Waiting times and target sizes by pool; an actor with async methods."""

    def __init__(self) -> None:
        self._waits: dict[str, TimeShare] = {}
        self._targets: dict[str, tuple[int, str]] = {}

    async def note_waiting(self, pool: str, seconds: float | None) -> None:
        """Record how long the trainer has waited for responses of a pool; None when it no longer waits for it."""
        now = time.monotonic()
        self._waits.setdefault(pool, TimeShare(now)).switch(seconds is not None, now, seconds or 0.0)

    async def waiting(self, pool: str) -> float:
        """Seconds of the last `kdray.config.teachers.WAITING_WINDOW_S` during which the trainer waited for a pool."""
        return self._waits[pool].seconds(time.monotonic()) if pool in self._waits else 0.0

    async def note_target(self, pool: str, target: int, reason: str) -> None:
        """Record the target size of a pool from now on, and the reason."""
        self._targets[pool] = target, reason

    async def target(self, pool: str) -> tuple[int, str] | None:
        """Target size of a pool, and the reason; None before the first decision."""
        return self._targets.get(pool)
