"""Who samples and who scores: the teachers and student-only replicas of a run, from its config, as the loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.background_call import in_daemon_thread
from actors.serving.engine import EngineSpec
from actors.serving.pool import ReplicaPool, deploy
from cluster.engine_specs import privileged_prompts, student_spec, teacher_spec, teacher_tokenizer
from cluster.parts import Models, Pools
from cluster.planning.placement import Bundle, bundles
from cluster.planning.reservation import await_placed, living_actors
from kdray.checks.preflight import Checked
from kdray.config import (
    ClusterSettings,
    Config,
    EngineSettings,
    ProgramSettings,
)
from kdray.data.dataset import question_encoder, reencode, response_encoder
from kdray.errors import EngineError
from kdray.interfaces import Sampler, Scorer, Teacher
from kdray.models.inspect import decoder
from kdray.rollouts.reference_answers import WithReferences
from kdray.teachers.cross_tokenizer import CrossTokenizerScorer
from kdray.teachers.kind import TeacherContext, kind_of
from kdray.teachers.privileged import PrivilegedScorer
from kdray.teachers.programs.sampler import ProgramSampler, TextCodec
from kdray.teachers.team import TeacherTeam


@contextlib.asynccontextmanager
async def open_pools(
    config: Config,
    checked: Checked,
    models: Models,
    weights: Any | None,
    registry: Any | None,
    on_event: Callable[..., None] = lambda kind, **fields: None,
    teacher_weights: Mapping[str, Any] | None = None,
    alone: tuple[int, ...] | None = None,
) -> AsyncIterator[Pools]:
    """Start every teacher, and the student-only replicas where something needs them; end them whatever happens.

    Args: registry: the TeacherRegistry's handle, whose end is the pools' end; None where nothing is served;
          teacher_weights: the WeightStore of each teacher that changes during the run, by name; alone: given, the teachers run
          without any student, at alpha 1, and their replicas are compared by this canary.
    Raises: ConfigError where a remote teacher cannot be used; EngineError where replicas do not start.
    """
    settings = config.rollout

    def pool(name: str, spec: EngineSpec, engine: EngineSettings) -> ReplicaPool:
        missing_after_s = 120.0 if settings.teachers is None else settings.teachers.missing_after_s
        live = (teacher_weights or {}).get(name)
        # Replicas of a teacher that changes differ by its version, and nothing is wrong with that.
        compared = registry if live is None else None
        return ReplicaPool(
            name, spec, engine, config.cluster, weights, settings.retries, on_event, compared, missing_after_s, live
        )

    def spec_of(name: str) -> EngineSpec:
        spec = teacher_spec(config, checked, models, name)
        if alone is None:
            return spec
        return replace(spec, role="teacher", student=None, student_revision=None, canary=alone)

    served = [pool(name, spec_of(name), each) for name, each in config.served_teachers.items()]
    context = TeacherContext(config, checked.tokenizer, checked.dataset, checked.vocab_size, checked.stop_ids)
    others = {name: kind_of(config, name).open(context) for name in config.other_teachers}
    students = (
        [pool("rollout", student_spec(config, checked, models), settings.pool)]
        if config.has_rollout_pool and alone is None
        else []
    )
    pools = [*served, *students]
    by_name: dict[str, Teacher] = {**{pool.name: pool for pool in served}, **others}
    teachers = [by_name[name] for name in config.teachers]
    team = None
    if settings.teachers is not None:
        team = TeacherTeam(config, teachers, [*checked.dataset.train, *checked.dataset.heldout], checked.vocab_size)
    one = team or teachers[0]
    scorer: Scorer = one
    if not config.loss.shared_ids:
        scorer = _cross_tokenizer(config, checked, served[0])
    elif config.teacher_apart:
        scorer = PrivilegedScorer(served[0], privileged_prompts(config, checked, served[0].name))
    student_samples = settings.sampler == "student"
    watchers: list[asyncio.Task[None]] = []
    try:
        for other in others.values():
            await other.check()
        try:
            if pools:
                await deployed(pools, bundles(config), config.cluster, on_event)
        except EngineError as error:
            for name in config.served_teachers:
                if registry is not None and (reasons := await registry.refused.remote(name)):
                    raise EngineError(f"teacher {name} is not the one that the run began with: {reasons[-1]}") from error
            raise
        watchers = [asyncio.create_task(pool.watch_replicas()) for pool in pools]
        on_event("serving", pools=[pool.name for pool in pools])
        program = None if settings.program is None else _program(config, checked, settings.program, one, pools)
        yield Pools(
            sampler=program or (students[0] if student_samples else one),
            scorer=scorer if student_samples or (team is not None and team.scores) else None,
            all=pools,
            others=list(others.values()),
            team=team,
            program=program,
        )
    finally:
        for watcher in watchers:
            watcher.cancel()
        # A deploy in progress cannot be cancelled inside its thread; deleting the application ends it.
        deleting = (asyncio.to_thread(pool.delete) for pool in pools)
        await asyncio.gather(*deleting, *(other.close() for other in others.values()), return_exceptions=True)


async def deployed(
    pools: Sequence[ReplicaPool], wanted: Sequence[Bundle], settings: ClusterSettings, on_event: Callable[..., None]
) -> None:
    """Start the replicas of all pools and wait until they serve.

    Args: wanted: the run's bundles, with those of the pools among them.
    Raises: EngineError where they do not start; CapacityError where others took their room, after `cluster.wait_s`.
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
        await asyncio.wait({serving, placing}, return_when=asyncio.FIRST_COMPLETED)
        if placing.done():
            placing.result()
        await serving
    finally:
        placing.cancel()
        serving.cancel()


def _program(
    config: Config, checked: Checked, settings: ProgramSettings, teacher: Teacher | TeacherTeam, pools: Sequence[ReplicaPool]
) -> ProgramSampler:
    """The System-2 program around the one teacher or the team."""

    def awaited(calls: Sequence[int]) -> None:
        for pool in pools:
            pool.awaited(calls)

    return ProgramSampler(
        settings,
        teacher,
        teacher.name,
        [*checked.dataset.train, *checked.dataset.heldout],
        TextCodec(question_encoder(config, checked.tokenizer), response_encoder(checked.tokenizer), decoder(checked.tokenizer)),
        config.rollout.samples_per_prompt,
        config.data.prefix,
        config.data.max_prompt_tokens,
        config.run.seed,
        awaited,
    )


def _cross_tokenizer(config: Config, checked: Checked, pool: ReplicaPool) -> CrossTokenizerScorer:
    """The pool of a teacher with another tokenizer, as a scorer of the student's rollouts."""
    tokenizer = teacher_tokenizer(config, pool.name)
    prompts = reencode(config, tokenizer, [*checked.dataset.train, *checked.dataset.heldout])
    spec = pool.spec
    return CrossTokenizerScorer(pool, checked.tokenizer, tokenizer, prompts, spec.vocab_size, spec.max_model_len)


def training_route(config: Config, checked: Checked, pools: Pools) -> tuple[Sampler, Scorer | None]:
    """Who samples and who scores what is trained on: the pools, and the data where it has a share of the responses."""
    share = max((config.rollout.data_share, *_scheduled(config, "rollout.data_share")))
    if not share:
        return pools.sampler, pools.scorer
    # Where the sampler's rollouts come back scored, nobody else would score the data's.
    scorer: Scorer | None = None
    if pools.scorer is None and config.loss.signals:
        scorer = pools.team or pools.named[0]
    prompts, limit = checked.dataset.train, config.rollout.max_new_tokens
    return WithReferences(pools.sampler, scorer, prompts, checked.tokenizer, limit), pools.scorer


def _scheduled(config: Config, name: str) -> tuple[float, ...]:
    schedule = config.training.schedules.get(name)
    return () if schedule is None else schedule.extremes
