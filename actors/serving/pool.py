"""TeacherPool over Ray Serve: split a call over replicas, stream what comes back, send again what a dead replica lost."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from tenacity import AsyncRetrying, RetryError, retry_if_not_exception_type, stop_after_attempt, wait_exponential

from actors.serving.autoscaling import ScaleWatch
from actors.serving.engine import EngineSpec
from actors.serving.hedging import CallTimes
from actors.serving.load_stats import Awaited
from actors.serving.replica import RatedReplica, TeacherReplica
from actors.serving.replica_choice import Route
from actors.serving.serve_autoscaling import serve_config
from kdray.config import ClusterSettings, EngineSettings
from kdray.errors import EngineError, RequestRefused
from kdray.interfaces import Availability
from kdray.rollouts.arrow import requests_to_table, rollouts_to_table, table_to_rollouts
from kdray.types import Rollout, SampleRequest

logger = logging.getLogger(__name__)

# Rollouts that one call carries at most: large enough that calls cost nothing, small enough to spread over replicas.
_MAX_PER_CALL = 256
# Calls that a replica holds where replicas come and go or differ in speed. Those beyond wait at the caller, and whoever is free
# takes the next: a call once sent to a replica stays there. Enough that small calls of a scorer fill an engine's step.
_CALLS_PER_REPLICA = 8
_ROUTING_STATS_PERIOD_S = 2.0
_LOOK_FOR_SLOW_EVERY_S = 0.5


@dataclass
class _Part:
    """The samples of one call."""

    kind: str
    call: Callable[[list[int], Route], Any]
    """Asks a replica for such samples; gives Serve's stream of the answer."""
    arrived: asyncio.Queue[list[Rollout]]
    missing: dict[int, int]
    """Samples, and the tokens that each may take to draw or has to score."""
    sent: float
    """When; parts that are sent side by side have one time, so that each may overtake the others."""

    async def ask(self, route: Route) -> None:
        """Ask one replica; hand on the rollouts that are still missing, and take them from there."""
        response = self.call(list(self.missing), route)
        try:
            async for table in response:
                rollouts = [rollout for rollout in table_to_rollouts(_table(table)) if rollout.sample_id in self.missing]
                for rollout in rollouts:
                    del self.missing[rollout.sample_id]
                if rollouts:
                    self.arrived.put_nowait(rollouts)
        except asyncio.CancelledError:
            # Nobody waits for the answer any more: the replica may stop drawing.
            response.cancel()
            raise


class ReplicaPool:
    """One Ray Serve deployment of engines, as a Sampler and a Scorer (`kdray.interfaces`)."""

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        settings: EngineSettings,
        cluster: ClusterSettings,
        weights: Any | None,
        retries: int,
        on_event: Callable[..., None] = lambda kind, **fields: None,
        registry: Any | None = None,
        missing_after_s: float = 120.0,
        teacher_weights: Any | None = None,
    ) -> None:
        """Args: registry: the TeacherRegistry's handle; missing_after_s: time without a replica until an outage begins;
        teacher_weights: the WeightStore of a teacher that changes during the run.
        """
        self.name = name
        self.spec = spec
        self.retried = 0
        self.hedged = 0
        """Rollouts that a second replica was asked for too, because the first was slow."""
        self.availability = Availability()
        self.replicas_serving = 0
        self.ended = False
        """Whether it was deleted: nothing of it may start any more."""
        self._run = uuid.uuid4().hex[:12]
        self._settings = settings
        self._cluster = cluster
        self._weights = weights
        self._retries = retries
        self._on_event = on_event
        self._registry = registry
        self._teacher_weights = teacher_weights
        self._missing_after_s = missing_after_s
        self._refusals = 0
        self._served_at = time.monotonic()
        self._handle: Any = None
        self._awaited = Awaited(self._note_waiting)
        self._times: dict[str, CallTimes] = {}
        if cluster.hedge_after is not None and self._several and not settings.mixed_hardware:
            self._times = {kind: CallTimes(cluster.hedge_after) for kind in ("sample", "score")}
        self._scale = None if settings.autoscaling is None else ScaleWatch(settings.autoscaling.placement_timeout_s)

    @property
    def application(self) -> str:
        """Unique in the cluster: another run's pool of the same name is another application."""
        return f"kdray-{self._run}-{self.name}"

    @property
    def dtype(self) -> str:
        """Of the engines' arithmetic; `auto` is float32 on CPUs, and stays `auto` on GPUs, where it is the checkpoint's own."""
        return "float32" if self.spec.dtype == "auto" and not self._settings.num_gpus else self.spec.dtype

    def _target(self) -> Any:
        """What Ray Serve is to run."""
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
        }
        if settings.max_replicas_per_node is not None:
            options["max_replicas_per_node"] = settings.max_replicas_per_node
        if settings.autoscaling is None:
            options["num_replicas"] = settings.replicas
        else:
            options["autoscaling_config"] = serve_config(self.name, settings.autoscaling, self._weights)
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
        application = deployment.bind(self.spec, self._weights, self._registry, self._teacher_weights)
        return serve.RunTarget(application, name=self.application, route_prefix=None)

    @property
    def _several(self) -> bool:
        """Whether there may be more than one replica."""
        scaling = self._settings.autoscaling
        return (self._settings.replicas if scaling is None else scaling.max_replicas) > 1

    @property
    def _uneven(self) -> bool:
        """Whether replicas come and go, or differ in speed: then calls are small, and wait for whoever is free."""
        return self._settings.autoscaling is not None or self._settings.mixed_hardware

    def awaited(self, sample_ids: Sequence[int]) -> None:
        """The trainer waits for these samples from now on, whichever pools were asked for them; for none when it goes on."""
        self._awaited.misses(sample_ids, time.monotonic())

    def take_waited_s(self) -> float:
        """Seconds that the trainer waited for this pool since the last call of this."""
        return self._awaited.take_s(time.monotonic())

    def _note_waiting(self, waits: bool) -> None:
        # The store counts the seconds: it need only be told of both ends of a wait.
        if self._scale is not None and self._weights is not None:
            self._weights.note_waiting.remote(self.name, 0.0 if waits else None)

    def delete(self) -> None:
        """Take the replicas down, waiting until they are gone."""
        from ray import serve

        self.ended = True
        # A deployment under way either sees that, or is there to be deleted.
        with _DEPLOYING:
            if self._handle is not None:
                # Its router goes on reporting to Serve, and would start a Ray of its own once this one has ended.
                self._handle.shutdown()
                self._handle = None
            serve.delete(self.application)

    async def watch_replicas(self, period_s: float = 2.0) -> None:
        """Keep `replicas_serving` current, and write an event when it or the size asked for changes; never returns."""
        while True:
            try:
                await self._watch()
            except Exception as error:
                # Serve's controller may be away for a moment; a watcher that ended would never see a teacher go or come back.
                logger.warning("%s: its replicas could not be watched: %r", self.name, error)
                self._on_event("watch_failed", pool=self.name, reason=repr(error)[:500])
            await asyncio.sleep(period_s)

    async def _watch(self) -> None:
        serving = await asyncio.to_thread(self._count_replicas)
        if serving != self.replicas_serving:
            self._on_event("replicas", pool=self.name, before=self.replicas_serving, now=serving)
            self.replicas_serving = serving
        await self._watch_target(serving)
        if self.spec.role != "student":
            await self._watch_availability(serving)

    async def _watch_target(self, serving: int) -> None:
        """Write an event when the size asked for changes (`scale`), and one when it does not come (`scale_stuck`)."""
        if self._scale is None or self._weights is None:
            return
        found = await self._weights.target.remote(self.name)
        if found is not None:
            target, reason = found
            for kind, fields in self._scale.see(serving, target, reason, time.monotonic()):
                self._on_event(kind, pool=self.name, **fields)

    @property
    def _patience_s(self) -> float:
        """Time without a replica until an outage begins; a pool that grows from nothing is given the time to place one."""
        autoscaling = self._settings.autoscaling
        return self._missing_after_s if autoscaling is None else max(self._missing_after_s, autoscaling.placement_timeout_s)

    async def _watch_availability(self, serving: int) -> None:
        """Begin the outage where no replica serves for long, or none but such that were turned away; end it when one does."""
        refused = [] if self._registry is None else await self._registry.refused.remote(self.name)
        for reason in refused[self._refusals :]:
            self._on_event("teacher_refused", teacher=self.name, reason=reason)
        turned_away, self._refusals = refused[self._refusals :], len(refused)
        now = time.monotonic()
        if serving or not self._awaited.owes:
            # A pool that scaled to zero and has no work is not missing.
            self._served_at = now
        if serving:
            if self.availability.reason is not None:
                self.availability.restore()
                self._on_event("teacher_back", teacher=self.name)
            return
        reason = None
        if turned_away:
            reason = f"teacher {self.name} has no replica left; the new one was turned away: {turned_away[-1]}"
        elif self.availability.reason is None and now - self._served_at > self._patience_s:
            reason = f"teacher {self.name} has had no replica for {now - self._served_at:.0f} s"
        if reason is not None and reason != self.availability.reason:
            self.availability.lose(reason, final=bool(turned_away))
            self._on_event("teacher_missing", teacher=self.name, reason=reason)

    def _count_replicas(self) -> int:
        from ray import serve

        application = serve.status().applications.get(self.application)
        if application is None:
            return 0
        return int(application.deployments[self.name].replica_states.get("RUNNING", 0))

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`. A request that is sent again draws the same tokens under the same weights."""
        by_id = {request.sample_id: request for request in requests}

        def call(missing: list[int], route: Route) -> Any:
            table = requests_to_table([by_id[sample_id] for sample_id in missing])
            return self._handle.options(stream=True).sample.remote(table, route=route)

        tokens = {request.sample_id: request.max_new_tokens for request in requests}
        async with aclosing(self._stream(tokens, "sample", call)) as stream:
            async for rollouts in stream:
                yield rollouts

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`. Exact KLs are taken under the newest version that sampled, or a newer one."""
        by_id = {rollout.sample_id: rollout for rollout in rollouts}
        min_version = max(int(rollout.student_versions.max()) for rollout in rollouts)

        def call(missing: list[int], route: Route) -> Any:
            table = rollouts_to_table([by_id[sample_id] for sample_id in missing])
            return self._handle.options(stream=True).score.remote(table, min_version, top_k, route=route)

        tokens = {each: len(rollout.prompt_ids) + len(rollout.token_ids) for each, rollout in by_id.items()}
        async with aclosing(self._stream(tokens, "score", call)) as stream:
            async for scored in stream:
                yield scored

    async def _stream(
        self, tokens: dict[int, int], kind: str, call: Callable[[list[int], Route], Any]
    ) -> AsyncGenerator[list[Rollout]]:
        """Split samples over calls that run side by side, and yield whatever any of them gives; each sample exactly once.

        Args: tokens: by sample, those that it may take to draw, or has to score.
        """
        ids = list(tokens)
        if self._uneven:
            # Two calls fill an engine, and a new or faster replica takes the next one soon.
            size = max(1, self._settings.max_num_seqs // 2)
        else:
            size = min(_MAX_PER_CALL, -(-len(ids) // self._settings.replicas))
        unanswered = set(ids)
        now = time.monotonic()
        self._awaited.asked(unanswered, now)
        arrived: asyncio.Queue[list[Rollout]] = asyncio.Queue()
        parts = [
            _Part(kind, call, arrived, {each: tokens[each] for each in ids[start : start + size]}, now)
            for start in range(0, len(ids), size)
        ]
        tasks = [asyncio.create_task(self._persist(part)) for part in parts]
        remaining = len(ids)
        getter = asyncio.ensure_future(arrived.get())
        gone = asyncio.ensure_future(self.availability.lost(only_final=True))
        try:
            while remaining:
                pending = {task for task in tasks if not task.done()}
                await asyncio.wait({getter, gone, *pending}, return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    rollouts = getter.result()
                    getter = asyncio.ensure_future(arrived.get())
                    remaining -= len(rollouts)
                    answered = [rollout.sample_id for rollout in rollouts]
                    unanswered.difference_update(answered)
                    self._awaited.answered(answered, time.monotonic())
                    yield rollouts
                    continue
                if gone.done():
                    gone.result()
                for task in tasks:
                    if task.done():
                        task.result()
                if all(task.done() for task in tasks) and arrived.empty():
                    raise EngineError(f"`{self.name}` ended its answer with {remaining} rollouts missing")
        finally:
            self._awaited.answered(unanswered, time.monotonic())
            running: list[asyncio.Future[Any]] = [getter, gone, *tasks]
            for future in running:
                future.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _persist(self, part: _Part) -> None:
        """One call, sent again for what is still missing while replicas die; bounded and backed off."""
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self._retries + 1),
            wait=wait_exponential(multiplier=0.5, max=30),
            retry=retry_if_not_exception_type((RequestRefused, asyncio.CancelledError)),
            before_sleep=lambda state: self._note_retry(state, len(part.missing)),
        )
        try:
            async for attempt in attempts:
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        part.sent = time.monotonic()
                    await self._once(part)
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise EngineError(
                f"`{self.name}` could not serve {len(part.missing)} rollouts in {self._retries + 1} attempts: {cause}"
            ) from cause

    async def _once(self, part: _Part) -> None:
        """Ask one replica for what is missing, and a second one too where that is slow; whatever comes first counts."""
        ticket, times = uuid.uuid4().hex, self._times.get(part.kind)
        if times is not None:
            times.begin(ticket, sum(part.missing.values()), part.sent)
        first = asyncio.create_task(part.ask(Route(ticket)))
        asked = {first}
        try:
            while part.missing and (running := {task for task in asked if not task.done()}):
                watched = times if len(asked) == 1 else None
                await asyncio.wait(
                    running, timeout=None if watched is None else _LOOK_FOR_SLOW_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                late = watched is not None and not first.done() and watched.is_slow(ticket, time.monotonic())
                if late and part.missing and self.replicas_serving > 1:
                    self._note_hedge(part)
                    asked.add(asyncio.create_task(part.ask(Route(uuid.uuid4().hex, instead_of=ticket))))
            if part.missing:
                # All have ended, and none answered everything: the first tells why.
                first.result()
                raise EngineError(f"a replica ended its answer with {len(part.missing)} rollouts missing")
        finally:
            if times is not None:
                times.end(ticket, not part.missing and len(asked) == 1, time.monotonic())
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _note_hedge(self, part: _Part) -> None:
        self.hedged += len(part.missing)
        self._on_event("hedge", pool=self.name, call=part.kind, rollouts=len(part.missing))

    def _note_retry(self, state: Any, missing: int) -> None:
        error = state.outcome.exception()
        self.retried += missing
        self._on_event("retry", pool=self.name, attempt=state.attempt_number, rollouts=missing, reason=repr(error)[:500])
        logger.warning("%s: attempt %d failed, %d rollouts again: %r", self.name, state.attempt_number, missing, error)


_DEPLOYING = threading.Lock()
_LOOK_EVERY_S = 0.5
_MISSING_PACKAGE = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


def deploy(pools: Sequence[ReplicaPool]) -> None:
    """Start the replicas of all pools side by side and wait until they serve; blocks.

    Raises: EngineError when some do not start, or are deleted meanwhile.
    """
    from ray import serve

    logging.getLogger("ray.serve").addFilter(_is_news)
    try:
        # Ray Serve cannot be asked to run something in two threads at once (Ray 2.60).
        with _DEPLOYING:
            _check_wanted(pools)
            handles = serve.run_many([pool._target() for pool in pools], wait_for_applications_running=False)
        _await_serving(pools)
    except EngineError:
        raise
    except RuntimeError as error:
        names = ", ".join(pool.name for pool in pools)
        # Serve's error names the deployments; why a replica failed stands in their status.
        found = serve.status().applications
        details = [
            each.message for pool in pools if pool.application in found for each in found[pool.application].deployments.values()
        ]
        if missing := _MISSING_PACKAGE.search("\n".join([str(error), *details])):
            raise EngineError(
                f"replicas of {names} did not start: a node has no Python package `{missing[1]}`; install kdray's requirements "
                "on every node that serves (pip install 'kdray[gpu]', or 'kdray[cpu]' without GPUs)"
            ) from error
        raise EngineError(f"replicas of {names} did not start: {error}") from error
    for pool, handle in zip(pools, handles, strict=True):
        pool._handle = handle


def _await_serving(pools: Sequence[ReplicaPool]) -> None:
    """Wait until all serve. Raises: RuntimeError where one fails; EngineError where one is deleted.

    Serve's own wait never ends for what was deleted (Ray 2.60); it would go on after Ray has ended, and start another.
    """
    from ray import serve

    waiting = list(pools)
    while waiting:
        _check_wanted(waiting)
        found = serve.status().applications
        states = {pool: found[pool.application] for pool in waiting if pool.application in found}
        for pool, state in states.items():
            if state.status == "DEPLOY_FAILED":
                raise RuntimeError(f"deploying {pool.application} failed: {state.message}")
        waiting = [pool for pool in waiting if pool not in states or states[pool].status != "RUNNING"]
        time.sleep(_LOOK_EVERY_S)


def _check_wanted(pools: Sequence[ReplicaPool]) -> None:
    if ended := [pool.name for pool in pools if pool.ended]:
        raise EngineError(f"replicas of {', '.join(ended)} were taken down before they served")


def _is_news(record: logging.LogRecord) -> bool:
    """Filter of Ray Serve's log: that calls wait for a free replica is how a busy pool works, and not worth a warning each."""
    return not record.getMessage().startswith("Failed to route request after")


def _table(item: Any) -> pa.Table:
    assert isinstance(item, pa.Table)
    return item


def actor_options(settings: EngineSettings) -> dict[str, Any]:
    """Ray actor options of one replica: what it reserves, and the threads that it may use."""
    # Ray sets one thread for an actor that reserves a fraction of a CPU; the reservation is the intended number.
    threads = str(max(1, int(settings.num_cpus)))
    options: dict[str, Any] = {
        "num_cpus": settings.num_cpus,
        "runtime_env": {"env_vars": {**_job_variables(), "OMP_NUM_THREADS": threads}},
    }
    if settings.num_gpus:
        options["num_gpus"] = settings.num_gpus
    if settings.accelerator_type:
        options["accelerator_type"] = settings.accelerator_type
    if settings.label_selector:
        options["label_selector"] = settings.label_selector
    if settings.resources:
        options["resources"] = settings.resources
    return options


def _job_variables() -> dict[str, str]:
    """Variables that this process's Ray job was given. Serve's controller, which may be another job's, hands on its own."""
    if not ray.is_initialized():
        return {}
    return dict(ray.get_runtime_context().runtime_env.get("env_vars") or {})
