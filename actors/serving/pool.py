"""Pool of replicas on Ray Serve: splits a call over replicas, streams the results, and resends what a dead replica lost."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from tenacity import AsyncRetrying, RetryError, retry_if_not_exception_type

from actors.background_call import in_daemon_thread
from actors.serving.autoscaling import ScaleWatch
from actors.serving.deployment import DEPLOYING, actor_options, applications
from actors.serving.hedging import CallTimes, Patience
from actors.serving.load_stats import Awaited
from actors.serving.replica import RatedReplica, TeacherReplica
from actors.serving.replica_choice import CallRoute
from actors.serving.serve_autoscaling import serve_config
from actors.serving.spec import EngineSpec, RunHandles
from actors.serving.start_failure import StartFailure
from actors.vllm_plugin.record_table import Passes
from kdray.config import ClusterSettings, EngineSettings
from kdray.errors import EngineError, RequestRefused
from kdray.interfaces import Availability
from kdray.rollouts.arrow import requests_to_table, rollouts_to_table, table_to_rollouts
from kdray.rollouts.race import Stopped, all_of, first_of
from kdray.types import Rollout, SampleRequest

logger = logging.getLogger(__name__)

# Maximum rollouts per call: large enough for negligible call overhead, small enough to spread over replicas.
_MAX_PER_CALL = 256
# Calls that a replica holds if replicas come and go or differ in speed. The others wait at the caller, and the next free
# replica takes them: a call once sent to a replica stays there. Enough for a scorer's small calls to fill an engine's step.
_CALLS_PER_REPLICA = 8
_ROUTING_STATS_PERIOD_S = 2.0
_LOOK_FOR_SLOW_EVERY_S = 0.5
_FIRST_PAUSE_S = 0.5
_MISSING_AFTER_S = 120.0
_LONGEST_PAUSE_S = 30.0


@dataclass(eq=False)
class _Part:
    """Samples of one call."""

    kind: str
    call: Callable[[list[int], CallRoute], Any]
    """Sends the samples to a replica; returns Serve's stream of results."""
    arrived: asyncio.Queue[list[Rollout]]
    missing: dict[int, int]
    """Samples, and the number of tokens that each may take to sample or has to score."""
    sent: float
    """Time of the call; calls sent together share one time, so that each may overtake the others."""
    count: Callable[[Passes], None]
    """Called with the engine's forward passes that an answer reports."""
    heard: float = 0.0
    """Time of the latest rollout, or since when any could be expected."""
    failures: int = 0
    """Attempts that failed since the last one that brought anything, that one included."""

    async def ask(self, route: CallRoute) -> None:
        """Send the call to one replica; pass on the rollouts that are still missing, and remove them here."""
        response = self.call(list(self.missing), route)
        try:
            async for table in response:
                found = _table(table)
                self.count(Passes.of(found.schema))
                rollouts = [rollout for rollout in table_to_rollouts(found) if rollout.sample_id in self.missing]
                self.heard = time.monotonic()
                for rollout in rollouts:
                    del self.missing[rollout.sample_id]
                if rollouts:
                    self.arrived.put_nowait(rollouts)
        except asyncio.CancelledError:
            # Nobody waits for the results any more: the replica may stop sampling.
            response.cancel()
            raise


class ReplicaPool:
    """A Ray Serve deployment of engines, as a Sampler and a Scorer (`kdray.interfaces`)."""

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        settings: EngineSettings,
        cluster: ClusterSettings,
        run: RunHandles,
        retries: int,
        missing_after_s: float | None = None,
        on_event: Callable[..., None] = lambda kind, **fields: None,
    ) -> None:
        """Args: run: the actors that this pool's replicas talk to; missing_after_s: time without a replica until an outage
        begins; None: long enough for another to start."""
        self.name = name
        self.spec = spec
        self.retried = 0
        self.hedged = 0
        """Rollouts that were also sent to a second replica, because the first was slow."""
        self.availability = Availability()
        self.replicas_serving = 0
        self.answered_at = 0.0
        """Time of the latest answer, by `time.monotonic`."""
        self._passes = Passes()
        self.ended = False
        """Set by `delete`: nothing of the pool may start any more."""
        self._application_id = uuid.uuid4().hex[:12]
        self._settings = settings
        self._cluster = cluster
        self._run = run
        self._retries = retries
        self._on_event = on_event
        self._missing_after_s = missing_after_s
        self._longest_start_s = 0.0
        self._refusals = 0
        self._failures = 0
        self._served_at = time.monotonic()
        self._handle: Any = None
        self._awaited = Awaited(self._note_waiting)
        self._times: dict[str, CallTimes] = {}
        if cluster.hedge_after is not None and self._several and not settings.mixed_hardware:
            self._times = {kind: CallTimes(cluster.hedge_after) for kind in ("sample", "score")}
        self._patience = {kind: Patience(cluster.request_silence_s) for kind in ("sample", "score")}
        self._parts: set[_Part] = set()
        """Calls that are not answered yet."""
        self._scale = None if settings.autoscaling is None else ScaleWatch(settings.autoscaling.placement_timeout_s)

    @property
    def application(self) -> str:
        """Unique in the cluster: another run's pool of the same name is another application."""
        return f"kdray-{self._application_id}-{self.name}"

    @property
    def dtype(self) -> str:
        """Dtype of the engines' arithmetic; `auto` is float32 on CPUs, and remains `auto` (the checkpoint's own) on GPUs."""
        return "float32" if self.spec.dtype == "auto" and not self._settings.num_gpus else self.spec.dtype

    def target(self) -> Any:
        """The application for Ray Serve to run."""
        from ray import serve

        settings = self._settings
        replica: type[TeacherReplica] = TeacherReplica
        options: dict[str, Any] = {
            "name": self.name,
            "max_ongoing_requests": _CALLS_PER_REPLICA if self._uneven else 1000,
            "health_check_period_s": self._cluster.health_check_period_s,
            "health_check_timeout_s": max(30.0, 3 * self._cluster.health_check_period_s),
            "graceful_shutdown_timeout_s": 5.0,
            "ray_actor_options": actor_options(settings),
            # Serve's own would have a line of every request.
            "logging_config": {"log_level": "WARNING"},
        }
        if settings.max_replicas_per_node is not None:
            options["max_replicas_per_node"] = settings.max_replicas_per_node
        if settings.autoscaling is None:
            options["num_replicas"] = settings.replicas
        else:
            options["autoscaling_config"] = serve_config(self.name, settings.autoscaling, self._run.board)
            options["graceful_shutdown_timeout_s"] = settings.autoscaling.drain_s
        if settings.mixed_hardware:
            replica = RatedReplica
        if self._several:
            from ray.serve.config import RequestRouterConfig

            from actors.serving.serve_router import ThroughputRouter

            options["request_router_config"] = RequestRouterConfig(
                request_router_class=ThroughputRouter, request_routing_stats_period_s=_ROUTING_STATS_PERIOD_S
            )
        deployment = serve.deployment(replica).options(**options)
        application = deployment.bind(self.spec, self._run)
        return serve.RunTarget(application, name=self.application, route_prefix=None)

    def connect(self, handle: Any) -> None:
        """Store Serve's handle of the deployment, which serves from now on."""
        self._handle = handle

    @property
    def _several(self) -> bool:
        """True if there may be more than one replica."""
        scaling = self._settings.autoscaling
        return (self._settings.replicas if scaling is None else scaling.max_replicas) > 1

    @property
    def _uneven(self) -> bool:
        """True if replicas come and go, or differ in speed: calls are then small, and wait for a free replica."""
        return self._settings.autoscaling is not None or self._settings.mixed_hardware

    def awaited(self, sample_ids: Sequence[int]) -> None:
        """Set the samples that the trainer waits for from now on, from any pool; none when it continues."""
        self._awaited.misses(sample_ids, time.monotonic())

    def take_waited_s(self) -> float:
        """Seconds that the trainer waited for this pool since the last call of this method."""
        return self._awaited.take_s(time.monotonic())

    def take_teacher_share(self) -> float | None:
        """Share of the replicas' forward passes that ran the teacher, from the answers since the last call of this method; None
        if they report no pass."""
        passes, self._passes = self._passes, Passes()
        return passes.teacher_steps / passes.steps if passes.steps else None

    def _count_passes(self, passes: Passes) -> None:
        self._passes = Passes(self._passes.steps + passes.steps, self._passes.teacher_steps + passes.teacher_steps)

    def _note_waiting(self, waits: bool) -> None:
        # The board counts the seconds: it needs only the start and end of a wait.
        if self._scale is not None and self._run.board is not None:
            self._run.board.note_waiting.remote(self.name, 0.0 if waits else None)

    def delete(self) -> None:
        """Delete the replicas, waiting until they are gone."""
        from ray import serve

        self.ended = True
        # A deployment in progress either sees the flag, or exists and can be deleted.
        with DEPLOYING:
            if self._handle is not None:
                # Its router would continue reporting to Serve, and start a new Ray once this one has shut down.
                self._handle.shutdown()
                self._handle = None
            serve.delete(self.application)

    async def watch_replicas(self, period_s: float = 2.0) -> None:
        """Keep `replicas_serving` current, and write an event when it or the target size changes; never returns."""
        while True:
            try:
                await self._watch()
            except Exception as error:
                # Serve's controller may be unreachable for a moment; if the watcher ended, outages and recoveries would go
                # unnoticed.
                logger.warning("%s: its replicas could not be watched: %r", self.name, error)
                self._on_event("watch_failed", pool=self.name, reason=repr(error)[:500])
            await asyncio.sleep(period_s)

    def start_failures(self) -> list[StartFailure]:
        """Failed starts of this pool's engines so far, oldest first; blocks."""
        import ray

        return [] if self._run.registry is None else ray.get(self._run.registry.failures.remote(self.name))

    async def _watch(self) -> None:
        serving = await in_daemon_thread(self._count_replicas)
        if serving != self.replicas_serving:
            self._on_event("replicas", pool=self.name, before=self.replicas_serving, now=serving)
            self.replicas_serving = serving
        await self._watch_target(serving)
        await self.watch_starts()
        if self.spec.role != "student":
            await self._watch_availability(serving)

    async def watch_starts(self) -> int:
        """Write an event for every engine that did not start, as one that replaces a lost replica; returns their number so
        far."""
        failures = [] if self._run.registry is None else await self._run.registry.failures.remote(self.name)
        for failure in failures[self._failures :]:
            self._on_event("engine_failed", pool=self.name, reason=failure.cause, log=failure.place)
        self._failures = len(failures)
        return self._failures

    async def _watch_target(self, serving: int) -> None:
        """Write an event when the target size changes (`scale`), and when it is not reached (`scale_stuck`)."""
        if self._scale is None or self._run.board is None:
            return
        found = await self._run.board.target.remote(self.name)
        if found is not None:
            target, reason = found
            for kind, fields in self._scale.see(serving, target, reason, time.monotonic()):
                self._on_event(kind, pool=self.name, **fields)

    @property
    def _patience_s(self) -> float:
        """Time without a replica until an outage begins; a pool that grows from zero also gets the time to place one."""
        autoscaling, given = self._settings.autoscaling, self._missing_after_s
        placing_s = 0.0 if autoscaling is None else autoscaling.placement_timeout_s
        # Twice: Serve has to notice the loss, and another engine has to load.
        return max(max(_MISSING_AFTER_S, 2 * self._longest_start_s) if given is None else given, placing_s)

    async def _watch_availability(self, serving: int) -> None:
        """Begin an outage if no replica has served for long, or all were rejected; end it when one serves."""
        registry = self._run.registry
        refused = [] if registry is None else await registry.refused.remote(self.name)
        for reason in refused[self._refusals :]:
            self._on_event("teacher_refused", teacher=self.name, reason=reason)
        turned_away, self._refusals = refused[self._refusals :], len(refused)
        now = time.monotonic()
        if serving or not self._awaited.owes:
            # A pool scaled to zero without work is not missing.
            self._served_at = now
        if serving:
            if self.availability.reason is not None:
                self.availability.restore()
                self._on_event("teacher_back", teacher=self.name)
            return
        if registry is not None:
            self._longest_start_s = await registry.longest_start_s.remote(self.name)
        reason = None
        if turned_away:
            reason = f"teacher {self.name} has no replica left; the new one was turned away: {turned_away[-1]}"
        elif self.availability.reason is None and now - self._served_at > self._patience_s:
            reason = f"teacher {self.name} has had no replica for {now - self._served_at:.0f} s"
        if reason is not None and reason != self.availability.reason:
            self.availability.lose(reason, final=bool(turned_away))
            self._on_event("teacher_missing", teacher=self.name, reason=reason)

    def _count_replicas(self) -> int:
        application = applications().get(self.application)
        if application is None:
            return 0
        return int(application.deployments[self.name].replica_states.get("RUNNING", 0))

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`. A resent request samples the same tokens under the same weights."""
        by_id = {request.sample_id: request for request in requests}

        def call(missing: list[int], route: CallRoute) -> Any:
            table = requests_to_table([by_id[sample_id] for sample_id in missing])
            return self._handle.options(stream=True).sample.remote(table, route=route)

        tokens = {request.sample_id: request.max_new_tokens for request in requests}
        async with aclosing(self._stream(tokens, "sample", call)) as stream:
            async for rollouts in stream:
                yield rollouts

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`. Exact KLs are computed under the newest version that sampled, or a newer one."""
        by_id = {rollout.sample_id: rollout for rollout in rollouts}
        min_version = max(int(rollout.student_versions.max()) for rollout in rollouts)

        def call(missing: list[int], route: CallRoute) -> Any:
            table = rollouts_to_table([by_id[sample_id] for sample_id in missing])
            return self._handle.options(stream=True).score.remote(table, min_version, top_k, route=route)

        tokens = {each: len(rollout.prompt_ids) + len(rollout.token_ids) for each, rollout in by_id.items()}
        async with aclosing(self._stream(tokens, "score", call)) as stream:
            async for scored in stream:
                yield scored

    async def _stream(
        self, tokens: dict[int, int], kind: str, call: Callable[[list[int], CallRoute], Any]
    ) -> AsyncGenerator[list[Rollout]]:
        """Split samples over concurrent calls, and yield the results as they arrive; each sample exactly once.

        Args: tokens: by sample, the number that it may take to sample, or has to score.
        """
        ids = list(tokens)
        if self._uneven:
            # Two calls fill an engine, and a new or faster replica soon takes the next one.
            size = max(1, self._settings.max_num_seqs // 2)
        else:
            size = min(_MAX_PER_CALL, -(-len(ids) // self._settings.replicas))
        unanswered = set(ids)
        now = time.monotonic()
        self._awaited.asked(unanswered, now)
        arrived: asyncio.Queue[list[Rollout]] = asyncio.Queue()
        parts = [
            _Part(kind, call, arrived, {each: tokens[each] for each in ids[start : start + size]}, now, self._count_passes)
            for start in range(0, len(ids), size)
        ]
        tasks = [asyncio.create_task(self._persist(part)) for part in parts]
        remaining = len(ids)
        over = asyncio.ensure_future(first_of(all_of(tasks), self.availability.lost(only_final=True)))
        try:
            while remaining:
                rollouts = await first_of(arrived.get(), over)
                remaining -= len(rollouts)
                answered = [rollout.sample_id for rollout in rollouts]
                unanswered.difference_update(answered)
                self.answered_at = time.monotonic()
                self._awaited.answered(answered, self.answered_at)
                yield rollouts
        except Stopped:
            raise EngineError(f"`{self.name}` ended its answer with {remaining} rollouts missing") from None
        finally:
            self._awaited.answered(unanswered, time.monotonic())
            for future in (over, *tasks):
                future.cancel()
            await asyncio.gather(over, *tasks, return_exceptions=True)

    async def _persist(self, part: _Part) -> None:
        """Send a call, and resend what is missing while replicas die; with bounded retries and backoff.

        An attempt that brings anything makes the earlier ones forgotten: a long call outlives many replicas.
        """
        attempts = AsyncRetrying(
            stop=lambda state: part.failures > self._retries,
            wait=lambda state: min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (part.failures - 1)),
            retry=retry_if_not_exception_type((RequestRefused, asyncio.CancelledError)),
            before_sleep=lambda state: self._note_retry(state, part),
        )
        try:
            async for attempt in attempts:
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        part.sent = time.monotonic()
                    missing = len(part.missing)
                    try:
                        await self._once(part)
                    except Exception:
                        part.failures = part.failures + 1 if len(part.missing) == missing else 1
                        raise
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise EngineError(
                f"`{self.name}` could not serve {len(part.missing)} rollouts in {part.failures} attempts: {cause}"
            ) from cause

    async def _once(self, part: _Part) -> None:
        """Send what is missing to one replica, and also to a second if that is slow; the first result counts.

        The same for one that is lost: no answer for too long. Raises: EngineError if the second is lost, too, or there is none.
        """
        ticket, times, size = uuid.uuid4().hex, self._times.get(part.kind), sum(part.missing.values())
        if times is not None:
            times.begin(ticket, size, part.sent)
        part.heard = time.monotonic()
        first = asyncio.create_task(part.ask(CallRoute(ticket)))
        asked = {first}
        self._parts.add(part)
        try:
            while part.missing and (running := {task for task in asked if not task.done()}):
                watched = times if len(asked) == 1 else None
                await asyncio.wait(running, timeout=_LOOK_FOR_SLOW_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                late = watched is not None and not first.done() and watched.is_slow(ticket, time.monotonic())
                hedged = late and part.missing and self.replicas_serving > 1
                if hedged:
                    self._note_hedge(part)
                if hedged or self._is_lost(part, size, last=len(asked) > 1):
                    # While the first runs: the router leaves out the replica that has it.
                    asked.add(asyncio.create_task(part.ask(CallRoute(uuid.uuid4().hex, instead_of=ticket))))
            if part.missing:
                # All have ended, and none returned everything: the first gives the reason.
                first.result()
                raise EngineError(f"a replica ended its answer with {len(part.missing)} rollouts missing")
            if len(asked) == 1:
                self._patience[part.kind].answered(size, time.monotonic() - part.sent)
        finally:
            self._parts.discard(part)
            if times is not None:
                times.end(ticket, not part.missing and len(asked) == 1, time.monotonic())
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _is_lost(self, part: _Part, size: int, last: bool) -> bool:
        """Check if nothing was heard of a call for so long that another replica is to be asked.

        Args: last: no other can be. Raises: EngineError then, or if there is no other replica.
        """
        now = time.monotonic()
        if not self.replicas_serving:
            # It waits for a replica, which may load for long; an outage has its own rules.
            part.heard = now
        limit_s = self._patience[part.kind].silence_s(size)
        if not part.missing or now - part.heard <= limit_s:
            return False
        missing, part.heard = len(part.missing), now
        self._on_event("request_lost", pool=self.name, call=part.kind, rollouts=missing, silent_s=round(limit_s, 1))
        if last or self.replicas_serving == 1:
            raise EngineError(f"no replica said anything of {missing} rollouts for {limit_s:.3g} s (cluster.request_silence_s)")
        self.retried += missing
        return True

    def waits_for(self) -> list[str]:
        """Calls that are not answered yet, in one line; none if there are none."""
        if not self._parts:
            return []
        rollouts = sum(len(part.missing) for part in self._parts)
        silent_s = time.monotonic() - min(part.heard for part in self._parts)
        return [
            f"pool {self.name} ({self.replicas_serving} replicas serve): {rollouts} rollouts in {len(self._parts)} calls, the "
            f"longest without a word for {silent_s:.0f} s"
        ]

    def _note_hedge(self, part: _Part) -> None:
        self.hedged += len(part.missing)
        self._on_event("hedge", pool=self.name, call=part.kind, rollouts=len(part.missing))

    def _note_retry(self, state: Any, part: _Part) -> None:
        error, missing = state.outcome.exception(), len(part.missing)
        self.retried += missing
        self._on_event("retry", pool=self.name, attempt=part.failures, rollouts=missing, reason=repr(error)[:500])
        logger.warning("%s: attempt %d failed, %d rollouts again: %r", self.name, part.failures, missing, error)


def _table(item: Any) -> pa.Table:
    assert isinstance(item, pa.Table)
    return item
