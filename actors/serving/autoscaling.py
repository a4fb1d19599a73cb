"""Autoscaling decision of a pool: a pure function of its replicas' reports, the rules, and the clock.

    the trainer starves for a while             -> grow, once all replicas requested before are placed
    the replicas idle for a share of the time   -> one replica less, after a while
    no work at all for a while                  -> down to the minimum, or to zero if that is 0
    work for a pool scaled to zero              -> 1, at once
    requested replicas are not placed           -> stay

`actors.serving.serve_autoscaling` plugs it into Ray Serve; the tests run it over whole traces. It imports only the standard
library: it is shipped to a controller that may not have kdray installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

CANNOT_BE_PLACED = "cannot be placed"
"""Reason for keeping the size when requested replicas have not been placed within `placement_timeout_s`."""


@dataclass(frozen=True)
class Load:
    """Combined report of a pool's replicas; sums and means run over the window of `actors.serving.load_stats`."""

    running: int
    """Replicas that serve."""
    target: int
    """Replicas requested last."""
    waiting_s: float = 0.0
    """Seconds of the last window in which the trainer waited for responses of this pool."""
    queue_age_s: float = 0.0
    """Age of the oldest request without a free engine slot; 0 without one."""
    ongoing: float = 0.0
    """Rollouts requested and not yet returned, now."""
    idle_s: float = 0.0
    """Time since the pool last had work."""
    busy: float = 0.0
    """Replicas' worth of work: the share of the window with work, summed over replicas; at most `running`."""


@dataclass(frozen=True)
class ScalingRules:
    """Thresholds for growing and shrinking; `kdray.config.AutoscalingSettings` documents each."""

    min_replicas: int
    max_replicas: int
    upscale_wait_s: float
    upscale_queue_age_s: float
    upscale_delay_s: float
    upscale_factor: float
    upscale_ongoing: float
    downscale_idle_s: float
    downscale_busy: float
    downscale_delay_s: float
    placement_timeout_s: float


@dataclass(frozen=True)
class State:
    """State passed from one decision to the next: the time since which a condition has held continuously, None if it does
    not."""

    starving_since: float | None = None
    calm_since: float | None = None
    """The opposite of starving: no starvation while replicas start; otherwise so little work that one replica less would do."""
    pending_since: float | None = None
    """Requested replicas do not serve yet."""

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> State:
        """The state from a mapping that may have other keys too."""
        return cls(**{name: values.get(name) for name in cls.__dataclass_fields__})


def decide(load: Load, rules: ScalingRules, state: State, now: float) -> tuple[int, State, str]:
    """Number of replicas to request, within the rules' bounds; the state for the next call; and the reason as text.

    Args: now: seconds of any monotonic clock, the same in all calls for a pool.
    """
    bounded = min(max(load.target, rules.min_replicas), rules.max_replicas)
    if bounded != load.target:
        return bounded, State(), "bounds of the settings"
    if load.target == 0:
        return (1, State(), "work for a pool without replicas") if load.ongoing else (0, State(), "no work")
    if load.running and load.idle_s >= rules.downscale_idle_s:
        # Ray Serve removes the last replica only by itself: zero is reached only from 1.
        least = rules.min_replicas if load.target == 1 else max(rules.min_replicas, 1)
        return least, State(), f"no work for {load.idle_s:.0f} s"
    if load.target > load.running:
        return _while_pending(load, rules, replace(state, starving_since=None), now)
    if _starving(load, rules):
        since = now if state.starving_since is None else state.starving_since
        # Waiting for the last few rollouts of a batch is no reason: other replicas could not work on those.
        enough = load.ongoing >= rules.upscale_ongoing * load.running
        if enough and load.target < rules.max_replicas and now - since >= rules.upscale_delay_s:
            grown = max(load.target + 1, math.floor(load.target * rules.upscale_factor))
            return min(grown, rules.max_replicas), State(), _complaint(load, rules)
        return load.target, State(starving_since=since), _complaint(load, rules)
    if _spare(load, rules):
        since = now if state.calm_since is None else state.calm_since
        if now - since >= rules.downscale_delay_s:
            return load.target - 1, State(), f"work for {load.busy:.1f} of {load.target} replicas"
        return load.target, State(calm_since=since), "one less would do"
    return load.target, State(), "enough"


def _while_pending(load: Load, rules: ScalingRules, state: State, now: float) -> tuple[int, State, str]:
    """Decision while requested replicas do not serve yet: never request more on top; withdraw requests no longer needed."""
    pending = now if state.pending_since is None else state.pending_since
    calm = None if _starving(load, rules) else now if state.calm_since is None else state.calm_since
    if load.running and calm is not None and now - calm >= rules.downscale_delay_s:
        return max(load.running, rules.min_replicas), State(), "replicas that did not come are not needed any more"
    reason = CANNOT_BE_PLACED if now - pending >= rules.placement_timeout_s else "starting"
    return load.target, State(calm_since=calm, pending_since=pending), reason


def _starving(load: Load, rules: ScalingRules) -> bool:
    return load.waiting_s >= rules.upscale_wait_s or load.queue_age_s >= rules.upscale_queue_age_s


def _complaint(load: Load, rules: ScalingRules) -> str:
    if load.waiting_s >= rules.upscale_wait_s:
        return f"the trainer waited {load.waiting_s:.1f} s of the last window"
    return f"a request has queued for {load.queue_age_s:.0f} s"


def _spare(load: Load, rules: ScalingRules) -> bool:
    """Check that the work would fit into one replica less.

    Nothing happens in the band between half the growth threshold and the threshold; otherwise a pool that needs two and a half
    replicas would oscillate between two and three.
    """
    quiet = load.waiting_s <= rules.upscale_wait_s / 2 and load.queue_age_s <= rules.upscale_queue_age_s / 2
    left = load.target - 1
    return quiet and left >= max(rules.min_replicas, 1) and load.busy <= rules.downscale_busy * left


class ScaleWatch:
    """Converts observations of a pool to events: each change of the target size, and each stall once."""

    def __init__(self, placement_timeout_s: float) -> None:
        self._timeout_s = placement_timeout_s
        self._target: int | None = None
        self._short_since: float | None = None
        self._told = False

    def see(self, serving: int, target: int, reason: str, now: float) -> list[tuple[str, dict[str, int | str]]]:
        """Events (kind, fields) due now. The first target seen is the initial size, not a change."""
        events: list[tuple[str, dict[str, int | str]]] = []
        if self._target is not None and target != self._target:
            events.append(("scale", {"before": self._target, "now": target, "reason": reason}))
        if target != self._target or serving >= target:
            self._short_since, self._told = None, False
        self._target = target
        if serving < target:
            self._short_since = now if self._short_since is None else self._short_since
            if now - self._short_since >= self._timeout_s and not self._told:
                self._told = True
                events.append(("scale_stuck", {"wanted": target, "now": serving}))
        return events
