"""How many replicas a pool should have: a pure function of what its replicas report, of the rules, and of the clock.

    the trainer starves, for a while            -> grow, as far as what was asked for before is placed
    the replicas were idle for a share of time  -> one less, after a while
    no work at all, for a while                 -> down to the minimum, or to none where that is 0
    work for a pool of none                     -> 1, at once
    what was asked for is not placed            -> stay

`actors.serving.serve_autoscaling` hands it to Ray Serve; the tests run it over whole traces. It imports the standard library
alone: it is shipped to a controller that may have no kdray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

CANNOT_BE_PLACED = "cannot be placed"
"""Reason of a decision to stay where replicas asked for have not come for `placement_timeout_s`."""


@dataclass(frozen=True)
class Load:
    """What all replicas of a pool together report; sums and means run over the window of `actors.serving.load_stats`."""

    running: int
    """Replicas that serve."""
    target: int
    """Replicas that were asked for last."""
    waiting_s: float = 0.0
    """Seconds of the last window in which the trainer waited for answers of this pool."""
    queue_age_s: float = 0.0
    """Age of the oldest request that no engine slot is free for; 0 without one."""
    ongoing: float = 0.0
    """Rollouts asked for and not yet answered, now."""
    idle_s: float = 0.0
    """Time since the pool last had work."""
    busy: float = 0.0
    """Replicas' worth of work: the share of the window with work, summed over replicas; at most `running`."""


@dataclass(frozen=True)
class ScalingRules:
    """When to grow and to shrink; `kdray.config.AutoscalingSettings` says what each number means."""

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
    """What one decision tells the next: since when a condition holds without a break, None where it does not hold."""

    starving_since: float | None = None
    calm_since: float | None = None
    """The opposite of starving: while replicas start, nothing of that kind; else so little work that one less would do."""
    pending_since: float | None = None
    """Replicas were asked for that do not serve yet."""

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> State:
        """The state in a mapping that may hold other things too."""
        return cls(**{name: values.get(name) for name in cls.__dataclass_fields__})


def decide(load: Load, rules: ScalingRules, state: State, now: float) -> tuple[int, State, str]:
    """The number of replicas to ask for, between the rules' bounds; the next call's state; and the reason in words.

    Args: now: seconds of any clock that does not go back, the same in all calls of a pool.
    """
    bounded = min(max(load.target, rules.min_replicas), rules.max_replicas)
    if bounded != load.target:
        return bounded, State(), "bounds of the settings"
    if load.target == 0:
        return (1, State(), "work for a pool without replicas") if load.ongoing else (0, State(), "no work")
    if load.running and load.idle_s >= rules.downscale_idle_s:
        # Ray Serve takes the last replica alone: to none only from 1.
        least = rules.min_replicas if load.target == 1 else max(rules.min_replicas, 1)
        return least, State(), f"no work for {load.idle_s:.0f} s"
    if load.target > load.running:
        return _while_pending(load, rules, replace(state, starving_since=None), now)
    if _starving(load, rules):
        since = now if state.starving_since is None else state.starving_since
        # Waiting for the last few rollouts of a batch is no reason: nobody else could work on those.
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
    """Replicas that were asked for do not serve yet: never ask for more on top; withdraw what nobody needs any more."""
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
    """Whether one replica less could do the work.

    Between half the threshold of growing and the threshold lies a band in which nothing happens, or a pool that needs two and
    a half replicas would swing between two and three.
    """
    quiet = load.waiting_s <= rules.upscale_wait_s / 2 and load.queue_age_s <= rules.upscale_queue_age_s / 2
    left = load.target - 1
    return quiet and left >= max(rules.min_replicas, 1) and load.busy <= rules.downscale_busy * left


class ScaleWatch:
    """Turns what a watcher sees of a pool into events: each change of the target, and each stall once."""

    def __init__(self, placement_timeout_s: float) -> None:
        self._timeout_s = placement_timeout_s
        self._target: int | None = None
        self._short_since: float | None = None
        self._told = False

    def see(self, serving: int, target: int, reason: str, now: float) -> list[tuple[str, dict[str, int | str]]]:
        """Events (kind, fields) due now. The first target seen is where the pool started, no change."""
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
