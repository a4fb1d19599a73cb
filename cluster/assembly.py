"""Assembly of a run's samplers and scorers: its teachers and student-only replicas, according to its route."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.background_call import in_daemon_thread
from actors.serve_controller import keep_alive
from actors.serving.deployment import deploy
from actors.serving.pool import ReplicaPool
from actors.serving.spec import EngineSpec, RunHandles
from cluster.engine_specs import privileged_prompts, student_spec, teacher_spec, teacher_tokenizer
from cluster.parts import Pools
from cluster.planning.placement import Bundle, bundles
from cluster.planning.reservation import await_placed, living_actors
from kdray.config import (
    ClusterSettings,
    EngineSettings,
    ProgramSettings,
)
from kdray.data.dataset import question_encoder, reencode, response_encoder
from kdray.errors import EngineError
from kdray.interfaces import Sampler, Scorer, Teacher
from kdray.models.inspect import decoder
from kdray.rollouts.environments import in_environment
from kdray.rollouts.reference_answers import WithReferences
from kdray.runs.context import Checked, RunContext
from kdray.teachers.cross_tokenizer import CrossTokenizerScorer
from kdray.teachers.kind import kind_of
from kdray.teachers.privileged import PrivilegedScorer
from kdray.teachers.programs.sampler import ProgramSampler, Rows, TextCodec
from kdray.teachers.team import TeacherTeam

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_START_GRACE_S = 60.0
"""Time beyond the limit of a start for what is not the engine's own: Serve's processes, and the report of the failure."""


@contextlib.asynccontextmanager
async def open_pools(
    context: RunContext,
    run: RunHandles,
    on_event: Callable[..., None] = lambda kind, **fields: None,
    teacher_weights: Mapping[str, Any] | None = None,
    canary: tuple[int, ...] | None = None,
    logs: Path | None = None,
) -> AsyncIterator[Pools]:
    """Start every teacher, and the student-only replicas if the route has some; shut them down in any case.

    Args: run: the run's actors; the pools end with them; teacher_weights: the WeightStore of each teacher that changes
          during the run, by name; canary: ids by which the teachers' replicas are compared, in place of the held-out prompts';
          logs: folder for the log of an engine that does not start, None if the command has none.
    Raises: ConfigError if a remote teacher cannot be used; EngineError with the cause if replicas do not start.
    """
    config, route = context.config, context.route
    settings = config.rollout

    def pool(name: str, spec: EngineSpec, engine: EngineSettings) -> ReplicaPool:
        missing_after_s = None if settings.teachers is None else settings.teachers.missing_after_s
        live = (teacher_weights or {}).get(name)
        handles = run if live is None else replace(run, compared=False, teacher_weights=live)
        return ReplicaPool(name, spec, engine, config.cluster, handles, settings.retries, missing_after_s, on_event)

    def spec_of(name: str) -> EngineSpec:
        spec = teacher_spec(context, name)
        return spec if canary is None else replace(spec, canary=canary)

    served = [pool(name, spec_of(name), each) for name, each in config.served_teachers.items()]
    telling = replace(context, on_event=on_event)
    others = {name: kind_of(config, name).open(telling) for name in config.other_teachers}
    students = [pool("rollout", student_spec(context), settings.pool)] if route.student_pool else []
    pools = [*served, *students]
    by_name: dict[str, Teacher] = {**{pool.name: pool for pool in served}, **others}
    teachers = [by_name[name] for name in config.teachers]
    team = None if settings.teachers is None else TeacherTeam(config, teachers, context.prompts, context.vocab_size)
    one = team or teachers[0]
    program = None if settings.program is None else _program(context, settings.program, one, pools)
    samplers: dict[str, Sampler | None] = {"teachers": one, "program": program, "students": next(iter(students), None)}
    sampler = samplers[route.sampler]
    assert sampler is not None
    scorer = _scorer(context, one, served) if route.scored_later else None
    watchers = [asyncio.create_task(keep_alive(config.cluster.stuck_after_s, on_event))] if pools else []
    try:
        for other in others.values():
            await other.check()
        try:
            if pools:
                # Engines load for a minute or more, in which nothing else is said.
                on_event("starting", pools=[pool.name for pool in pools])
                await deployed(pools, bundles(config), config.cluster, on_event)
        except EngineError as error:
            await in_daemon_thread(_keep_logs, pools, logs)
            for name in config.served_teachers:
                if run.registry is not None and (reasons := await run.registry.refused.remote(name)):
                    raise EngineError(f"teacher {name} is not the one that the run began with: {reasons[-1]}") from error
            raise
        watchers += [asyncio.create_task(pool.watch_replicas()) for pool in pools]
        on_event("serving", pools=[pool.name for pool in pools])
        yield Pools(
            sampler=sampler,
            scorer=scorer,
            all=pools,
            others=list(others.values()),
            team=team,
            program=program,
        )
    finally:
        for watcher in watchers:
            watcher.cancel()
        # A deployment in progress cannot be cancelled inside its thread; deleting the application ends it.
        closing = {pool.name: in_daemon_thread(pool.delete) for pool in pools}
        closing |= {name: asyncio.ensure_future(other.close()) for name, other in others.items()}
        await _closed(closing, config.cluster.teardown_s, on_event)


def _keep_logs(pools: Sequence[ReplicaPool], folder: Path | None) -> None:
    """Write the log of each pool's last engine that did not start into `folder`; without one, print where it is."""
    for pool in pools:
        for failure in pool.start_failures()[-1:]:
            if folder is None:
                logger.warning("the log of an engine of %s that did not start: %s", pool.name, failure.place)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            name = "rollout-pool" if pool.spec.role == "student" else f"teacher-{pool.name}"
            (folder / f"{name}.log").write_text(f"{failure.place}\n{failure.log}", encoding="utf-8")


def _scorer(context: RunContext, teachers: Scorer, served: Sequence[ReplicaPool]) -> Scorer:
    """The teachers as a scorer of the student's rollouts, whatever their input."""
    if context.route.teacher_reads == "own_ids":
        return _cross_tokenizer(context, served[0])
    if context.route.teacher_reads == "own_prompts":
        return PrivilegedScorer(served[0], privileged_prompts(context, served[0].name))
    return teachers


async def deployed(
    pools: Sequence[ReplicaPool], wanted: Sequence[Bundle], settings: ClusterSettings, on_event: Callable[..., None]
) -> None:
    """Start the replicas of all pools and wait until they serve.

    Args: wanted: the run's bundles, including those of the pools.
    Raises: EngineError if they do not start, or not within `cluster.start_timeout_s`; CapacityError if others took their
    capacity, after `cluster.wait_s`.
    """
    by_role = {bundle.role: bundle for bundle in wanted}
    asked = {pool: by_role["rollout pool" if pool.spec.role == "student" else f"teacher {pool.name}"] for pool in pools}

    def unplaced() -> list[Bundle]:
        living = Counter(actor["ActorClassName"] for actor in living_actors())
        # Serve names the class after application and deployment.
        lacking = {pool: asked[pool].count - living[f"ServeReplica:{pool.application}:{pool.name}"] for pool in pools}
        return [replace(asked[pool], count=count) for pool, count in lacking.items() if count > 0]

    serving = in_daemon_thread(deploy, pools)
    placing = asyncio.create_task(await_placed(unplaced, settings, on_event))
    try:
        await _served(serving, placing, pools, settings, on_event)
    finally:
        placing.cancel()
        serving.cancel()


async def _served(
    serving: asyncio.Future[None],
    placing: asyncio.Future[None],
    pools: Sequence[ReplicaPool],
    settings: ClusterSettings,
    on_event: Callable[..., None],
) -> None:
    """Wait until all pools serve. The time begins anew once they are placed, and with every engine that failed: Serve then
    starts another.

    A replica ends by itself when its start takes too long. This limit is for one that cannot, as a stopped process, and for
    Serve's controller, whose answers Serve's own calls wait for without end.
    Raises: EngineError; what `placing` raises.
    """
    since, progress = time.monotonic(), (False, 0)
    while not serving.done():
        await asyncio.wait({serving} if placing.done() else {serving, placing}, timeout=_LOOK_EVERY_S)
        if placing.done():
            placing.result()
        found = placing.done(), sum([await pool.watch_starts() for pool in pools])
        if found != progress:
            since, progress = time.monotonic(), found
        limit_s = settings.start_timeout_s + _START_GRACE_S + (0.0 if placing.done() else settings.wait_s)
        waited_s = time.monotonic() - since
        if waited_s > limit_s and not serving.done():
            names = [pool.name for pool in pools]
            on_event("start_stuck", waited_for=names, waited_s=round(waited_s, 1))
            raise EngineError(
                f"replicas of {', '.join(names)} did not serve within {waited_s:.0f} s, and none reported a failure "
                f"(cluster.start_timeout_s={settings.start_timeout_s:g}): a replica or Ray Serve's controller stands still; "
                "Ray's logs of both say which. If the model needs longer to load, raise the limit"
            )
    await serving


async def _closed(closing: Mapping[str, asyncio.Future[None]], limit_s: float, on_event: Callable[..., None]) -> None:
    """Wait until all pools and teachers are closed, but not for ever: Serve's own wait for its controller has no end.

    What is not closed by then, or failed to, is named with the reason in an event; it is not why the run ends.
    """
    if not closing:
        return
    began = time.monotonic()
    await asyncio.wait(closing.values(), timeout=limit_s)
    reasons = {}
    for name, each in closing.items():
        if not each.done():
            reasons[name] = f"not closed within cluster.teardown_s={limit_s:g}"
            each.cancel()
        elif each.cancelled():
            reasons[name] = "its closing was cancelled"
        elif (error := each.exception()) is not None:
            reasons[name] = repr(error)[:500]
    if reasons:
        waited_s = round(time.monotonic() - began, 1)
        on_event("teardown_stuck", waited_for=list(reasons), waited_s=waited_s, reasons=reasons)


def _program(
    context: RunContext, settings: ProgramSettings, teacher: Teacher | TeacherTeam, pools: Sequence[ReplicaPool]
) -> ProgramSampler:
    """The System-2 program around the single teacher or the team."""
    config, tokenizer = context.config, context.tokenizer

    def awaited(calls: Sequence[int]) -> None:
        for pool in pools:
            pool.awaited(calls)

    return ProgramSampler(
        settings,
        teacher,
        teacher.name,
        context.prompts,
        TextCodec(question_encoder(config, tokenizer), response_encoder(tokenizer), decoder(tokenizer)),
        Rows.of(config),
        awaited,
    )


def _cross_tokenizer(context: RunContext, pool: ReplicaPool) -> CrossTokenizerScorer:
    """The pool of a teacher with another tokenizer, as a scorer of the student's rollouts."""
    tokenizer = teacher_tokenizer(context.config, pool.name)
    prompts = reencode(context.config, tokenizer, context.prompts)
    spec = pool.spec
    return CrossTokenizerScorer(pool, context.tokenizer, tokenizer, prompts, spec.vocab_size, spec.max_model_len)


def training_sources(checked: Checked, pools: Pools) -> tuple[Sampler, Scorer | None]:
    """Sampler and scorer of the training samples: the pools', and the data if it provides a share of the responses."""
    sampler = in_environment(
        pools.sampler, checked.config.rollout.environment, checked.tokenizer, checked.vocab_size, checked.dataset.train
    )
    if not checked.route.data_responds:
        return sampler, pools.scorer
    scorer: Scorer | None = (pools.team or pools.named[0]) if checked.route.scores_references else None
    prompts, limit = checked.dataset.train, checked.config.rollout.max_new_tokens
    return WithReferences(sampler, scorer, prompts, checked.tokenizer, limit), pools.scorer
