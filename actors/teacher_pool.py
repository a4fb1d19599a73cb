"""TeacherPool over Ray Serve: split a call over replicas, stream what comes back, send again what a dead replica lost."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pyarrow as pa
from tenacity import AsyncRetrying, RetryError, retry_if_not_exception_type, stop_after_attempt, wait_exponential

from actors.teacher_engine import EngineSpec
from actors.teacher_replica import TeacherReplica
from kdray.config import ClusterSettings, EngineSettings
from kdray.errors import EngineError, RequestRefused
from kdray.records import requests_to_table, rollouts_to_table, table_to_rollouts
from kdray.types import Rollout, SampleRequest

logger = logging.getLogger(__name__)

# Rollouts that one call carries at most: large enough that calls cost nothing, small enough to spread over replicas.
_MAX_PER_CALL = 256


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
    ) -> None:
        self.name = name
        self.spec = spec
        self.retried = 0
        self.replicas_serving = 0
        self._run = uuid.uuid4().hex[:12]
        self._settings = settings
        self._cluster = cluster
        self._weights = weights
        self._retries = retries
        self._on_event = on_event
        self._handle: Any = None

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
        options: dict[str, Any] = {
            "name": self.name,
            "max_ongoing_requests": 1000,
            "health_check_period_s": self._cluster.health_check_period_s,
            "health_check_timeout_s": max(30.0, 3 * self._cluster.health_check_period_s),
            "graceful_shutdown_timeout_s": 5.0,
            "ray_actor_options": actor_options(settings),
        }
        if settings.autoscaling is None:
            options["num_replicas"] = settings.replicas
        else:
            options["autoscaling_config"] = settings.autoscaling
        deployment = serve.deployment(TeacherReplica).options(**options)
        return serve.RunTarget(deployment.bind(self.spec, self._weights), name=self.application, route_prefix=None)

    def delete(self) -> None:
        """Take the replicas down, waiting until they are gone."""
        from ray import serve

        serve.delete(self.application)
        self._handle = None

    async def watch_replicas(self, period_s: float = 2.0) -> None:
        """Keep `replicas_serving` current, and write an event when it changes; never returns."""
        while True:
            serving = await asyncio.to_thread(self._count_replicas)
            if serving != self.replicas_serving:
                self._on_event("replicas", pool=self.name, before=self.replicas_serving, now=serving)
                self.replicas_serving = serving
            await asyncio.sleep(period_s)

    def _count_replicas(self) -> int:
        from ray import serve

        application = serve.status().applications.get(self.application)
        if application is None:
            return 0
        return int(application.deployments[self.name].replica_states.get("RUNNING", 0))

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`. A request that is sent again draws the same tokens under the same weights."""
        by_id = {request.sample_id: request for request in requests}

        def call(missing: list[int]) -> Any:
            table = requests_to_table([by_id[sample_id] for sample_id in missing])
            return self._handle.options(stream=True).sample.remote(table)

        async with aclosing(self._stream(list(by_id), call)) as stream:
            async for rollouts in stream:
                yield rollouts

    async def score(self, rollouts: Sequence[Rollout]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`. Exact KLs are taken under the newest version that sampled, or a newer one."""
        by_id = {rollout.sample_id: rollout for rollout in rollouts}
        min_version = max(int(rollout.student_versions.max()) for rollout in rollouts)

        def call(missing: list[int]) -> Any:
            table = rollouts_to_table([by_id[sample_id] for sample_id in missing])
            return self._handle.options(stream=True).score.remote(table, min_version)

        async with aclosing(self._stream(list(by_id), call)) as stream:
            async for scored in stream:
                yield scored

    async def _stream(self, ids: list[int], call: Callable[[list[int]], Any]) -> AsyncGenerator[list[Rollout]]:
        """Split ids over calls that run side by side, and yield whatever any of them gives; each id exactly once."""
        if self._settings.autoscaling is None:
            size = min(_MAX_PER_CALL, -(-len(ids) // self._settings.replicas))
        else:
            # Serve scales by calls in flight, and a new replica gets work only by them: half an engine's slots each.
            size = max(1, self._settings.max_num_seqs // 2)
        arrived: asyncio.Queue[list[Rollout]] = asyncio.Queue()
        parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        tasks = [asyncio.create_task(self._persist(part, call, arrived)) for part in parts]
        remaining = len(ids)
        getter = asyncio.ensure_future(arrived.get())
        try:
            while remaining:
                pending = {task for task in tasks if not task.done()}
                await asyncio.wait({getter, *pending}, return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    rollouts = getter.result()
                    getter = asyncio.ensure_future(arrived.get())
                    remaining -= len(rollouts)
                    yield rollouts
                    continue
                for task in tasks:
                    if task.done():
                        task.result()
                if all(task.done() for task in tasks) and arrived.empty():
                    raise EngineError(f"`{self.name}` ended its answer with {remaining} rollouts missing")
        finally:
            getter.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(getter, *tasks, return_exceptions=True)

    async def _persist(self, ids: list[int], call: Callable[[list[int]], Any], arrived: asyncio.Queue[list[Rollout]]) -> None:
        """One call, sent again for what is still missing while replicas die; bounded and backed off."""
        missing = dict.fromkeys(ids)
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self._retries + 1),
            wait=wait_exponential(multiplier=0.5, max=30),
            retry=retry_if_not_exception_type((RequestRefused, asyncio.CancelledError)),
            before_sleep=lambda state: self._note_retry(state, len(missing)),
        )
        try:
            async for attempt in attempts:
                with attempt:
                    response = call(list(missing))
                    try:
                        async for table in response:
                            rollouts = [r for r in table_to_rollouts(_table(table)) if r.sample_id in missing]
                            for rollout in rollouts:
                                del missing[rollout.sample_id]
                            arrived.put_nowait(rollouts)
                    except asyncio.CancelledError:
                        # Nobody waits for the answer any more: the replica may stop drawing.
                        response.cancel()
                        raise
                    if missing:
                        raise EngineError(f"a replica ended its answer with {len(missing)} rollouts missing")
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise EngineError(
                f"`{self.name}` could not serve {len(missing)} rollouts in {self._retries + 1} attempts: {cause}"
            ) from cause

    def _note_retry(self, state: Any, missing: int) -> None:
        error = state.outcome.exception()
        self.retried += missing
        self._on_event("retry", pool=self.name, attempt=state.attempt_number, rollouts=missing, reason=repr(error)[:500])
        logger.warning("%s: attempt %d failed, %d rollouts again: %r", self.name, state.attempt_number, missing, error)


def deploy(pools: Sequence[ReplicaPool]) -> None:
    """Start the replicas of all pools side by side and wait until they serve; blocks.

    Raises: EngineError when some do not start.
    """
    from ray import serve

    try:
        handles = serve.run_many([pool._target() for pool in pools])
    except RuntimeError as error:
        names = ", ".join(pool.name for pool in pools)
        raise EngineError(f"replicas of {names} did not start: {error}") from error
    for pool, handle in zip(pools, handles, strict=True):
        pool._handle = handle


def _table(item: Any) -> pa.Table:
    assert isinstance(item, pa.Table)
    return item


def actor_options(settings: EngineSettings) -> dict[str, Any]:
    """Ray actor options of one replica: what it reserves, and the threads that it may use."""
    # Ray sets one thread for an actor that reserves a fraction of a CPU; the reservation is the intended number.
    threads = str(max(1, int(settings.num_cpus)))
    options: dict[str, Any] = {
        "num_cpus": settings.num_cpus,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}},
    }
    if settings.num_gpus:
        options["num_gpus"] = settings.num_gpus
    if settings.accelerator_type:
        options["accelerator_type"] = settings.accelerator_type
    if settings.resources:
        options["resources"] = settings.resources
    return options
