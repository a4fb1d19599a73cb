"""`actors.serving.autoscaling.decide` as Ray Serve's autoscaling policy: it runs in Serve's controller, ten times a second.

The controller knows only what a pool's replicas report (`TeacherReplica.record_autoscaling_stats`), every `report_every_s`.
Serve offers the reports averaged over its look-back window, which costs a merge per number and replica on every call; the
newest point of each is fresher and free, and the numbers already cover a window of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ray import cloudpickle

import actors.serving.autoscaling
from actors.serving.autoscaling import Load, ScalingRules, State, decide
from kdray.config import AutoscalingSettings

_DECIDE_EVERY_S = 1.0
# Serve polls a replica five times per look-back window, and sends once per metrics interval; this makes both equal.
_POINTS = 5


class PoolPolicy:
    """Policy of one pool; Serve instantiates and calls it."""

    def __init__(self, pool: str, rules: dict[str, Any], board: str | None) -> None:
        """Args: board: the ScalingBoard's handle, pickled, in hexadecimal; it receives every change of the target."""
        self._pool = pool
        self._rules = ScalingRules(**rules)
        self._board = cloudpickle.loads(bytes.fromhex(board)) if board is not None else None
        self._told: int | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's signature: an AutoscalingContext in, the target and the state of the next call out."""
        now: float = context.current_time
        before: dict[str, Any] = dict(context.policy_state)
        if now < before.get("next_s", 0.0):
            return context.target_num_replicas, before
        load = summarise(
            context.raw_metrics or {},
            [str(replica) for replica in context.running_replicas],
            context.target_num_replicas,
            context.total_queued_requests or 0.0,
        )
        target, state, reason = decide(load, self._rules, State.from_dict(before), now)
        if target != self._told and self._board is not None:
            # Serve itself starts a pool scaled to zero on a request, before it calls a policy.
            if target == load.target and self._told == 0:
                reason = "work for a pool without replicas"
            self._board.note_target.remote(self._pool, target, reason)
        self._told = target
        return target, {**state.to_dict(), "next_s": now + _DECIDE_EVERY_S}


def summarise(metrics: Mapping[str, Mapping[Any, Any]], running: list[str], target: int, queued: float) -> Load:
    """Load of one pool from the newest report of each serving replica.

    Args: metrics: by name and replica, the points (timestamp, value) reported, oldest first; queued: calls not yet taken by a
    replica. Until a new replica has reported, the pool counts as fully busy, so that it does not shrink.
    """
    newest = {
        name: {str(replica): points[-1].value for replica, points in series.items() if points}
        for name, series in metrics.items()
    }

    def values(name: str) -> list[float]:
        reported = newest.get(name, {})
        return [reported[replica] for replica in running if replica in reported]

    complete = bool(running) and len(values("busy")) == len(running)
    return Load(
        running=len(running),
        target=target,
        waiting_s=max(values("waiting_s"), default=0.0),
        queue_age_s=max(values("queue_age_s"), default=0.0),
        ongoing=sum(values("ongoing")) + queued,
        idle_s=min(values("idle_s")) if complete and not queued else 0.0,
        busy=sum(values("busy")) if complete else float(len(running)),
    )


def scaling_rules(settings: AutoscalingSettings) -> ScalingRules:
    """Settings that the decision reads, as plain values: the decision is shipped without pydantic."""
    return ScalingRules(**{rule.name: getattr(settings, rule.name) for rule in fields(ScalingRules)})


def serve_config(pool: str, settings: AutoscalingSettings, board: Any | None) -> Any:
    """Ray Serve's AutoscalingConfig with the policy; Serve's own delays are 0, since the policy has its own.

    Args: board: the ScalingBoard's handle, None without one.
    """
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    arguments = {
        "pool": pool,
        "rules": asdict(scaling_rules(settings)),
        "board": None if board is None else cloudpickle.dumps(board).hex(),
    }
    # The controller belongs to whoever started Serve in the cluster, and may not have kdray: ship what the policy needs.
    cloudpickle.register_pickle_by_value(actors.serving.autoscaling)
    try:
        policy = AutoscalingPolicy(policy_function=PoolPolicy, policy_kwargs=arguments)
    finally:
        cloudpickle.unregister_pickle_by_value(actors.serving.autoscaling)
    with warnings.catch_warnings():
        # The interval's announced replacement, an environment variable, is not read by this version of Serve.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            initial_replicas=settings.starting_replicas,
            metrics_interval_s=settings.report_every_s,
            look_back_period_s=_POINTS * settings.report_every_s,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=policy,
        )
