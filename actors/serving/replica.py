"""Ray Serve deployment that owns one engine: sampling, scoring, health, and the student version that it holds.

Input and output are Arrow tables. A replica pulls new student weights as soon as they are published, and before it serves a
request that requires a newer version than it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.exceptions import ActorDiedError, ActorUnavailableError

from actors.background_call import in_daemon_thread
from actors.freed_memory import keep_returning
from actors.serving.engine import TeacherEngine
from actors.serving.load_stats import Workload
from actors.serving.replica_choice import CallRoute
from actors.serving.scoring.batch_sizes import check_batch_sizes
from actors.serving.spec import EngineSpec, RunHandles
from actors.serving.start_failure import StartFailure, StartWatch, end_process
from actors.vllm_plugin.record_table import Passes
from actors.weights.store import pull
from actors.weights.transfer import Ask, Turn, receive
from kdray.checks.parity import Verdict, judge, refusal
from kdray.config.secret_files import set_secrets
from kdray.errors import EngineError
from kdray.rollouts.arrow import rollouts_to_table, table_to_requests, table_to_rollouts
from kdray.teachers.fingerprint import Fingerprint
from kdray.types import Rollout, SampleRequest

logger = logging.getLogger("ray.serve")

_WATCH_PERIOD_S = 0.5
_RUN_ENDS_S = 60.0
_OWNER_ANSWERS_S = 10.0
_DELETED_S = 60.0
"""Time in which Serve ends the replicas of a deleted pool."""


class TeacherReplica:
    """An engine behind Ray Serve; also a student-only engine of a rollout pool."""

    async def __init__(self, spec: EngineSpec, run: RunHandles) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Start the engine. Raises: EngineError with the cause if it does not start, or the registry rejects this replica."""
        # From the first line on: loading may hang, and outlast the driver.
        watch = StartWatch(run.owner, spec.start_timeout_s, partial(_report, run.registry), _delete_pool)
        keep_returning()
        began = time.monotonic()
        try:
            await self._begin(spec, run)
        finally:
            watch.stop()
        if run.registry is not None:
            from ray import serve

            await run.registry.started.remote(serve.get_replica_context().deployment, time.monotonic() - began)

    async def _begin(self, spec: EngineSpec, run: RunHandles) -> None:
        self._spec = spec
        self._weights = run.weights if spec.role != "teacher" else None
        """Version of the student; None if this engine holds none, or it never changes."""
        self._teacher_weights = run.teacher_weights
        self._board = run.board
        self._owner = run.owner
        self._workload = Workload(spec.max_num_seqs, time.monotonic())
        self._engine = TeacherEngine(spec)
        self._passes = Passes()
        self._sync_lock = asyncio.Lock()
        self._receiving: asyncio.Task[None] | None = None
        fingerprint = await self._start(run)
        if fingerprint is not None:
            reason = await run.registry.enter.remote(spec.teacher, fingerprint)
            if reason is not None:
                await self._engine.close()
                raise EngineError(f"teacher {spec.teacher}: this replica is turned away: {reason}")
        # The weights on disk are older than any published version: version 0 is the student at the start of the phase.
        if spec.role != "teacher":
            await self._engine.set_initial_version(-1 if self._weights is not None else 0)
        follows = self._weights is not None or self._teacher_weights is not None
        self._follower = asyncio.create_task(self._follow()) if follows else None
        self._watcher = asyncio.create_task(self._watch())

    async def _start(self, run: RunHandles) -> Fingerprint | None:
        """Start the engine; returns the fingerprint by which replicas are compared, if they are.

        Raises: EngineError with the cause, which is also reported to the registry.
        """
        try:
            # The engine's own processes inherit them.
            set_secrets(self._spec.secrets)
            with kept_log_targets(logger):
                await self._engine.start()
            await check_batch_sizes(self._engine, self._engine.checked_sizes)
            if run.registry is None or not run.compared or self._spec.role == "student":
                return None
            return await self._engine.fingerprint()
        except Exception as error:
            failure = StartFailure.of(error)
            if run.registry is not None:
                from ray import serve

                await run.registry.failed.remote(serve.get_replica_context().deployment, failure)
            await self._engine.close()
            raise EngineError(failure.cause) from error

    async def check_health(self) -> None:
        """Health check: Ray Serve replaces the replica when this raises."""
        if self._follower is not None and self._follower.done():
            self._follower.result()
            raise EngineError("the replica stopped following student weights")
        await self._engine.check_health()

    async def sample(self, requests: pa.Table, route: CallRoute | None = None) -> AsyncGenerator[pa.Table]:
        """Sample every request of a table (`kdray.rollouts.arrow.REQUEST_SCHEMA`); each item holds the rollouts that finished
        since the last.

        Args: route: for Serve's router only.
        """
        wanted: list[SampleRequest] = table_to_requests(requests)
        await self._reach(max(request.min_version for request in wanted))
        call = self._workload.begin(len(wanted), time.monotonic())
        try:
            async with aclosing(self._engine.sample(wanted)) as stream:
                async for rollouts in stream:
                    self._note_done(call, rollouts)
                    yield self._with_passes(rollouts_to_table(rollouts))
        finally:
            self._workload.end(call, time.monotonic())

    async def score(
        self, rollouts: pa.Table, min_version: int = -1, top_k: bool = True, route: CallRoute | None = None
    ) -> AsyncGenerator[pa.Table]:
        """Fill in the teacher's columns of rollouts sampled elsewhere.

        Args: min_version: oldest student version under which the exact KLs may be computed, if the engine holds a student;
              top_k: as for `TeacherEngine.score`; route: for Serve's router only.
        """
        await self._reach(min_version)
        call = self._workload.begin(rollouts.num_rows, time.monotonic())
        try:
            async with aclosing(self._engine.score(table_to_rollouts(rollouts), top_k)) as stream:
                async for scored in stream:
                    self._note_done(call, scored)
                    yield self._with_passes(rollouts_to_table(scored))
        finally:
            self._workload.end(call, time.monotonic())

    def _with_passes(self, table: pa.Table) -> pa.Table:
        """A table of answers with the engine's forward passes since the last one."""
        before, self._passes = self._passes, self._engine.records.passes
        return self._passes.since(before).added_to(table)

    def _note_done(self, call: int, rollouts: list[Rollout]) -> None:
        self._workload.done(call, len(rollouts), sum(len(rollout.token_ids) for rollout in rollouts), time.monotonic())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Load statistics of this replica for the autoscaling policy; called by Ray Serve if the pool is autoscaled."""
        from ray import serve

        waiting_s = 0.0
        if self._board is not None:
            waiting_s = await self._board.waiting.remote(serve.get_replica_context().deployment)
        return {"waiting_s": waiting_s, **self._workload.stats(time.monotonic())}

    async def student_version(self) -> int:
        return self._engine.student_version

    async def _reach(self, version: int) -> None:
        """Return once the engine holds at least `version` of the student, and the matching version of a changing teacher.

        A teacher's weights are published before the student's that they belong to, so the newest are sufficient.
        """
        async with self._sync_lock:
            if self._weights is not None and self._engine.student_version < version:
                await self._load_student(self._weights, version)
                await self._renew_teacher()
            elif self._teacher_weights is not None and self._engine.teacher_version < 0:
                await self._renew_teacher()

    async def _load_student(self, weights: Any, at_least: int) -> None:
        """Load the newest version, and once more if its log q is not the trainer's.

        Raises: EngineError for a version that is refused twice; not at once, since the run, which learns of it, ends first.
        """
        verdict = await self._load_and_compare(weights, at_least)
        if verdict is not None and not verdict.accepted:
            # Requests in flight go on meanwhile: what is recorded is what they sample from, whichever weights those are.
            await self._engine.set_initial_version(-1)
            verdict = await self._load_and_compare(weights, at_least)
        if verdict is None:
            return
        await weights.report.remote(verdict)
        if not verdict.accepted:
            await asyncio.sleep(_RUN_ENDS_S)
            raise EngineError(refusal(verdict, self._spec.student or self._spec.model))

    async def _load_and_compare(self, weights: Any, at_least: int) -> Verdict | None:
        """Load the newest version. Returns: its comparison; None if the trainer's log q is not known."""
        if self._spec.weight_transfer is None:
            await self._pull(weights, at_least, self._engine.update_student)
        else:
            await self._receive(weights, at_least)
        return await self._compare(weights)

    async def _compare(self, weights: Any) -> Verdict | None:
        """Compare the loaded student with the trainer's; None if that is impossible, or a newer version has come meanwhile."""
        version = self._engine.student_version
        trained = await weights.trained.remote(version)
        if trained is None or not self._spec.parity_ids:
            return None
        served = await self._engine.log_probabilities(self._spec.parity_ids[: len(trained.logprobs) + 1])
        return judge(version, trained, served, self._engine.dtype, self._spec.student_dtype)

    async def _renew_teacher(self) -> None:
        """Load the newest weights of a changing teacher, waiting for its first; once more if its log p is not its trainer's.

        Raises: EngineError for a version that is refused twice; not at once, since the run, which learns of it, ends first.
        """
        store = self._teacher_weights
        if store is None:
            return
        newest, _ = await store.newest.remote(0)
        if newest <= self._engine.teacher_version:
            return
        await self._pull(store, newest, self._engine.update_teacher)
        verdict = await self._compare_teacher(store)
        if verdict is not None and not verdict.accepted:
            self._engine.teacher_version = -1
            await self._pull(store, newest, self._engine.update_teacher)
            verdict = await self._compare_teacher(store)
        if verdict is None:
            return
        await store.report_teacher.remote(verdict)
        if not verdict.accepted:
            await asyncio.sleep(_RUN_ENDS_S)
            raise EngineError(refusal(verdict, f"teacher {self._spec.teacher}"))

    async def _compare_teacher(self, store: Any) -> Verdict | None:
        """Compare the loaded teacher with its trainer's; None if its trainer has not computed these weights' log p.

        That is so for an average over versions, which no rank holds as a model, and where prefill is not recorded.
        """
        version = self._engine.teacher_version
        trained = await store.trained.remote(version)
        if trained is None or not self._spec.parity_ids or self._spec.scoring != "recorder":
            return None
        served = await self._engine.log_probabilities(self._spec.parity_ids[: len(trained.logprobs) + 1], "teacher")
        return judge(version, trained, served, self._engine.dtype, self._spec.student_dtype)

    async def _pull(self, store: Any, at_least: int, update: Callable[[list[Path], int], Awaitable[None]]) -> None:
        version, folder, paths = await pull(store, at_least)
        try:
            await update(paths, version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _receive(self, store: Any, at_least: int) -> None:
        await store.newest.remote(at_least)
        while self._engine.student_version < at_least:
            # A replica left in an undefined state by a transfer ends soon, and rank 0 should not wait for it.
            await self._engine.check_health()
            if self._receiving is None or self._receiving.done():
                ask = Ask(at_least, self._engine.num_workers, self._spec.stuck_after_s)
                self._receiving = asyncio.create_task(receive(store, ask, self._execute))
            # A cancelled caller must not interrupt a transfer: half the weights would be new.
            await asyncio.shield(self._receiving)

    async def _execute(self, turn: Turn) -> None:
        if turn.kind == "connect":
            await self._engine.connect_student(turn.info)
        else:
            await self._engine.receive_student(turn.info, turn.version)

    async def _follow(self) -> None:
        """Load every new version as soon as it is published."""
        async with asyncio.TaskGroup() as tasks:
            if self._weights is not None:
                tasks.create_task(self._follow_student(self._weights))
            if self._teacher_weights is not None:
                tasks.create_task(self._follow_teacher(self._teacher_weights))

    async def _follow_student(self, weights: Any) -> None:
        while True:
            # The wait holds no lock: requests that already have the version they need continue meanwhile.
            await weights.newest.remote(self._engine.student_version + 1)
            await self._reach(self._engine.student_version + 1)

    async def _follow_teacher(self, weights: Any) -> None:
        while True:
            await weights.newest.remote(self._engine.teacher_version + 1)
            async with self._sync_lock:
                await self._renew_teacher()

    async def _watch(self) -> None:
        """End this process as soon as its engine is dead, stuck or in an undefined state.

        A replica that outlives its engine would fail every call until Serve's threshold of failed health checks is reached; a
        dead one is replaced at once, and its callers use the next.
        """
        progress = asyncio.create_task(self._engine.check_progress())
        while True:
            await asyncio.sleep(_WATCH_PERIOD_S)
            try:
                await self._check_owner()
                await self.check_health()
                if progress.done():
                    progress.result()
                    progress = asyncio.create_task(self._engine.check_progress())
            except Exception:
                logger.exception("the engine of this replica failed; the replica ends")
                end_process()

    async def _check_owner(self) -> None:
        """Delete the whole pool if the run that it belongs to is gone: a killed driver could not.

        Without it, replicas on a cluster would hold their GPUs until somebody noticed.
        """
        if self._owner is None:
            return
        try:
            await asyncio.wait_for(_value(self._owner.__ray_ready__.remote()), _OWNER_ANSWERS_S)
        except ActorDiedError:
            in_daemon_thread(_delete_pool)
            # Serve now ends this replica gracefully, unless its controller stands still.
            await asyncio.sleep(_DELETED_S)
            end_process()
        except (ActorUnavailableError, TimeoutError):
            # The driver's node is temporarily unreachable, or stands still; the engine is watched all the same.
            return

    async def __del__(self) -> None:
        for task in (getattr(self, "_watcher", None), getattr(self, "_follower", None)):
            if task is not None:
                task.cancel()
        await self._engine.close()


async def _value(reference: Any) -> Any:
    return await reference


@contextlib.contextmanager
def kept_log_targets(of: logging.Logger) -> Iterator[None]:
    """Keep the files that a logger's buffers write to: vLLM configures logging when it is imported, which closes them.

    A buffer without a file keeps all that is logged, and Serve logs every request.
    """
    targets = {each: each.target for each in of.handlers if isinstance(each, logging.handlers.MemoryHandler)}
    try:
        yield
    finally:
        for handler, target in targets.items():
            handler.setTarget(target)
            handler.flush()


def _report(registry: Any, failure: StartFailure) -> None:
    """Report a start that took too long; blocks."""
    import ray
    from ray import serve

    logger.error("%s; the replica ends", failure.cause)
    if registry is not None:
        ray.get(registry.failed.remote(serve.get_replica_context().deployment, failure))


def _delete_pool() -> None:
    """Delete the pool that this replica belongs to; blocks for as long as Serve's controller takes to answer."""
    from ray import serve

    serve.delete(serve.get_replica_context().app_name, _blocking=False)


class RatedReplica(TeacherReplica):
    """Replica of a pool on mixed hardware, which reports its speed to the router.

    A separate class: Ray Serve polls every deployment that has this method, and notifies all callers whenever a result changed.
    """

    async def record_routing_stats(self) -> dict[str, float]:
        """Measured tokens/s to two digits, so that noise alone is not broadcast; empty before the first response."""
        rate = self._workload.tokens_per_s(time.monotonic())
        return {} if rate is None else {"tokens_per_s": float(f"{rate:.2g}")}
