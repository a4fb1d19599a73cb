"""Who samples and who scores: the teachers and student-only replicas of a run, from its config, as the loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.daemon_thread import in_daemon_thread
from actors.hf_teacher import HFTeacher
from actors.remote_teacher import RemoteTeacher
from actors.teacher_engine import EngineSpec
from actors.teacher_pool import ReplicaPool, deploy
from cluster.placement import Bundle, bundles
from cluster.reservation import await_placed, living_actors
from kdray.captured_teacher import CapturedTeacher
from kdray.config import (
    CaptureTeacherSettings,
    ClusterSettings,
    Config,
    EngineSettings,
    HFTeacherSettings,
    ModelSource,
    OtherTeacherSettings,
    ProgramSettings,
    SequenceLoss,
    ULDLoss,
)
from kdray.cross_tokenizer import CrossTokenizerScorer
from kdray.data import asked_text, question_encoder, reencode, response_encoder, templated
from kdray.errors import ConfigError, EngineError
from kdray.evaluate import evaluate
from kdray.interfaces import Sampler, Scorer, Teacher
from kdray.models import resolve_model
from kdray.preflight import Checked, load_tokenizer, shape
from kdray.privileged import PrivilegedScorer
from kdray.programs.sampler import ProgramSampler, TextCodec
from kdray.references import WithReferences
from kdray.seeds import sample_seed
from kdray.signals import check_loss, check_prefill, check_rows
from kdray.teachers import TeacherTeam, prompts_of
from kdray.types import SampleRequest
from kdray.vocab import tokenizer_hash

_SIGNAL_PROMPTS, _SIGNAL_TOKENS = 8, 16
_CANARY_TOKENS = 64
_TEACHER_TOKENS = 4
"""Times as many tokens as the student that a teacher with another tokenizer may need for a text; longer ones get no rows."""


OtherTeacher = RemoteTeacher | HFTeacher | CapturedTeacher
"""Teachers that are no pool of replicas."""


@dataclass(frozen=True)
class Models:
    """Where the weights lie: folders or hub ids."""

    student: str
    teachers: dict[str, str]


@dataclass(frozen=True)
class Pools:
    """Who samples and who scores, as the loop sees them, and all pools behind."""

    sampler: Sampler
    scorer: Scorer | None
    all: list[ReplicaPool]
    others: list[OtherTeacher]
    """Teachers that are no pool of replicas."""
    team: TeacherTeam | None = None
    """The teachers as one, where there are several."""
    program: ProgramSampler | None = None
    """The System-2 program around the one teacher or the team, where there is one: the sampler then."""

    @property
    def teachers(self) -> list[ReplicaPool]:
        """Those served by replicas."""
        return [pool for pool in self.all if pool.spec.role != "student"]

    @property
    def named(self) -> list[Teacher]:
        """Teachers of every kind."""
        return [*self.teachers, *self.others]

    @property
    def students(self) -> ReplicaPool | None:
        """The student-only replicas, where there are some."""
        return next((pool for pool in self.all if pool.spec.role == "student"), None)

    @property
    def retried(self) -> int:
        """Rollouts asked for again after a failure."""
        return sum(pool.retried for pool in self.all) + sum(
            other.retried for other in self.others if isinstance(other, RemoteTeacher)
        )

    @property
    def hedged(self) -> int:
        """Rollouts that a second replica was asked for too."""
        return sum(pool.hedged for pool in self.all)

    def awaited(self, sample_ids: Sequence[int]) -> None:
        """Tell every pool which samples the trainer waits for."""
        if self.program is not None:
            self.program.awaited(sample_ids)
            return
        for pool in self.all:
            pool.awaited(sample_ids)

    def metrics(self) -> dict[str, float]:
        return {
            "teacher_replicas": float(sum(pool.replicas_serving for pool in self.teachers)),
            "retried_samples": float(self.retried),
            "hedged_samples": float(self.hedged),
            **{f"teacher/{pool.name}/replicas": float(pool.replicas_serving) for pool in self.teachers},
            **{f"teacher/{pool.name}/wait_s": pool.take_waited_s() for pool in self.teachers},
            **(self.team.metrics() if self.team is not None else {}),
            **(self.program.metrics() if self.program is not None else {}),
        }


def resolve_models(config: Config) -> Models:
    """Build the tiny models, where the config asks for some."""
    cache = config.run.output / ".models"
    return Models(
        student=_absolute(resolve_model(config.student.model, cache)),
        teachers={name: _absolute(resolve_model(config.source(name)[0], cache)) for name in config.served_teachers}
        | {name: _absolute(resolve_model(model, cache)) for name, model in _other_models(config).items()},
    )


def _other_models(config: Config) -> dict[str, ModelSource]:
    """Models of teachers that no replica holds, as far as this run needs their weights."""
    found: dict[str, ModelSource] = {}
    for name, teacher in config.other_teachers.items():
        if isinstance(teacher, HFTeacherSettings):
            found[name] = teacher.model
        if isinstance(teacher, CaptureTeacherSettings) and teacher.model and config.rollout.teacher_signal == "hidden":
            found[name] = teacher.model
    return found


def _absolute(model: str) -> str:
    """Folders as absolute paths: replicas and ranks work in other folders."""
    return str(Path(model).absolute()) if Path(model).exists() else model


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

    def teacher_spec(name: str) -> EngineSpec:
        spec = _teacher_spec(config, checked, models, name)
        if alone is None:
            return spec
        return replace(spec, role="teacher", student=None, student_revision=None, canary=alone)

    served = [pool(name, teacher_spec(name), each) for name, each in config.served_teachers.items()]
    others = {name: _other_teacher(config, checked, name, each) for name, each in config.other_teachers.items()}
    students = (
        [pool("rollout", _student_spec(config, checked, models), settings.pool)]
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
    if isinstance(config.loss, ULDLoss):
        scorer = _cross_tokenizer(config, checked, served[0])
    elif config.teacher_apart:
        scorer = PrivilegedScorer(served[0], _privileged_prompts(config, checked, served[0].name))
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


def _other_teacher(config: Config, checked: Checked, name: str, settings: OtherTeacherSettings) -> OtherTeacher:
    """A teacher that lives in this process."""
    if isinstance(settings, HFTeacherSettings):
        cache = config.run.output / ".models"
        return HFTeacher(name, settings, checked.vocab_size, checked.stop_ids, config.rollout.teacher_top_k, cache)
    if isinstance(settings, CaptureTeacherSettings):
        asked = prompts_of(config, name, checked.dataset.train)
        return CapturedTeacher(name, settings.path, asked, checked.vocab_size, tokenizer_hash(checked.tokenizer))
    prompts = [*checked.dataset.train, *checked.dataset.heldout]
    return RemoteTeacher(
        name,
        settings,
        checked.tokenizer,
        # A chat endpoint applies its own template, to the question before the student's.
        asked_text(config, checked.tokenizer, prompts, settings.chat),
        checked.vocab_size,
        checked.stop_ids,
    )


def _cross_tokenizer(config: Config, checked: Checked, pool: ReplicaPool) -> CrossTokenizerScorer:
    """The pool of a teacher with another tokenizer, as a scorer of the student's rollouts."""
    tokenizer = _teacher_tokenizer(config, pool.name)
    prompts = reencode(config, tokenizer, [*checked.dataset.train, *checked.dataset.heldout])
    spec = pool.spec
    return CrossTokenizerScorer(pool, checked.tokenizer, tokenizer, prompts, spec.vocab_size, spec.max_model_len)


def _teacher_tokenizer(config: Config, name: str) -> Any:
    return load_tokenizer(*config.source(name))


def _own_vocabulary_spec(config: Config, checked: Checked, models: Models, name: str) -> EngineSpec:
    """A teacher alone, over its own vocabulary; its tokens for a text may be several times the student's."""
    teacher = config.served_teachers[name]
    tokenizer = _teacher_tokenizer(config, name)
    rows, positions = shape(*config.source(name))
    heldout = reencode(config, tokenizer, checked.dataset.heldout[:_CANARY_TOKENS])
    canary = [int(token_id) for ids in heldout.values() for token_id in ids][:_CANARY_TOKENS]
    longest = _TEACHER_TOKENS * config.max_model_len
    return replace(
        _spec(config, checked, teacher),
        role="teacher",
        model=models.teachers[name],
        revision=config.source(name)[1],
        teacher=name,
        scoring=teacher.scoring,
        vocab_size=rows,
        stop_ids=(int(tokenizer.eos_token_id),),
        max_model_len=longest if positions is None else min(longest, positions),
        canary=tuple(canary),
        tokenizer=tokenizer_hash(tokenizer),
    )


def _privileged_prompts(config: Config, checked: Checked, name: str) -> dict[int, np.ndarray]:
    """What a teacher with a template of its own reads, by prompt id."""
    template = config.served_teachers[name].prompt_template
    assert template is not None
    prompts = [*checked.dataset.train, *checked.dataset.heldout]
    return templated(config, checked.tokenizer, prompts, template)


def _privileged_spec(config: Config, checked: Checked, models: Models, name: str) -> EngineSpec:
    """A teacher alone, whose prompts are longer than the student's."""
    teacher = config.served_teachers[name]
    longest = max(len(ids) for ids in _privileged_prompts(config, checked, name).values()) + config.rollout.max_new_tokens
    positions = shape(*config.source(name))[1]
    if positions is not None and longest > positions:
        raise ConfigError(
            f"teachers.{name}.prompt_template: its longest prompt needs {longest} positions with rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens}, and the model holds {positions}; shorten one of them"
        )
    return replace(
        _spec(config, checked, teacher),
        role="teacher",
        model=models.teachers[name],
        revision=config.source(name)[1],
        teacher=name,
        scoring=teacher.scoring,
        max_model_len=max(longest, config.max_model_len),
        canary=canary(config, checked),
        tokenizer=tokenizer_hash(checked.tokenizer),
    )


def _teacher_spec(config: Config, checked: Checked, models: Models, name: str) -> EngineSpec:
    teacher = config.served_teachers[name]
    if isinstance(config.loss, ULDLoss):
        return _own_vocabulary_spec(config, checked, models, name)
    if config.teacher_apart:
        return _privileged_spec(config, checked, models, name)
    return replace(
        _spec(config, checked, teacher),
        role="mixture",
        model=models.teachers[name],
        student=models.student,
        revision=config.source(name)[1],
        student_revision=config.student.revision,
        teacher=name,
        record_hidden=config.rollout.teacher_signal == "hidden",
        scoring=teacher.scoring,
        canary=canary(config, checked),
        tokenizer=tokenizer_hash(_teacher_tokenizer(config, name)),
    )


def _student_spec(config: Config, checked: Checked, models: Models) -> EngineSpec:
    return replace(_spec(config, checked, config.rollout.pool), model=models.student, revision=config.student.revision)


def _spec(config: Config, checked: Checked, engine: EngineSettings) -> EngineSpec:
    """What the engines of a run have in common, and their size; as a student-only one without its model."""
    return EngineSpec(
        role="student",
        model="",
        student=None,
        vocab_size=checked.vocab_size,
        stop_ids=checked.stop_ids,
        max_model_len=config.max_model_len,
        teacher_top_k=config.rollout.teacher_top_k,
        student_top_k=config.rollout.student_top_k,
        dtype=engine.dtype,
        tensor_parallel_size=engine.tensor_parallel_size,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_cache_gib=engine.kv_cache_gib,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        seed=config.run.seed,
        stuck_after_s=config.cluster.stuck_after_s,
        weight_transfer=None if config.training.weight_transfer == "object_store" else config.training.weight_transfer,
        engine_args=engine.engine_args,
    )


def canary(config: Config, checked: Checked) -> tuple[int, ...]:
    """Ids that every teacher replica scores at its start: held-out prompts, one after the other."""
    ids = [int(token_id) for prompt in checked.dataset.heldout[:_CANARY_TOKENS] for token_id in prompt.token_ids]
    return tuple(ids[: min(_CANARY_TOKENS, config.max_model_len)])


def training_route(config: Config, checked: Checked, pools: Pools) -> tuple[Sampler, Scorer | None]:
    """Who samples and who scores what is trained on: the pools, and the data where it has a share of the responses."""
    share = max((config.rollout.data_share, *_scheduled(config, "rollout.data_share")))
    if not share:
        return pools.sampler, pools.scorer
    # Where the sampler's rollouts come back scored, nobody else would score the data's.
    scorer: Scorer | None = None
    if pools.scorer is None and not isinstance(config.loss, SequenceLoss):
        scorer = pools.team or pools.named[0]
    prompts, limit = checked.dataset.train, config.rollout.max_new_tokens
    return WithReferences(pools.sampler, scorer, prompts, checked.tokenizer, limit), pools.scorer


def _scheduled(config: Config, name: str) -> tuple[float, ...]:
    schedule = config.training.schedules.get(name)
    return () if schedule is None else schedule.extremes


def measure_arguments(config: Config, checked: Checked, pools: Pools) -> dict[str, Any]:
    """What `kdray.evaluate.evaluate` is given besides the version."""
    # The team's metrics are those of training.
    team = None if pools.team is None else pools.team.apart()
    sampling = pools.sampler if pools.program is None else pools.program.teacher
    sampler = team if team is not None and sampling is pools.team else sampling
    scorer = team if team is not None and pools.scorer is pools.team else pools.scorer
    if (config.other_teachers or config.teacher_apart) and pools.students is not None:
        # Exact KLs need both models in one replica; without them, what the student writes is graded.
        sampler, scorer = pools.students, None
    return {
        "prompts": checked.dataset.heldout[: config.evaluation.prompts],
        "sampler": sampler,
        "scorer": scorer,
        "decode": decoder(checked.tokenizer),
        "grade": checked.dataset.grade,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.run.seed,
        "exact": not (config.other_teachers or config.teacher_apart)
        and (pools.sampler is not pools.students or _all_recorded(config)),
    }


async def measure_program(config: Config, checked: Checked, pools: Pools) -> dict[str, float] | None:
    """What the System-2 program answers to the held-out prompts; None without one.

    By the names of `kdray.metrics` and `kdray.evaluate`; an answer that could not be read is wrong.
    """
    if pools.program is None:
        return None
    program = pools.program.apart()
    numbers, _ = await evaluate(
        prompts=checked.dataset.heldout[: config.evaluation.prompts],
        sampler=program,
        scorer=None,
        decode=decoder(checked.tokenizer),
        grade=checked.dataset.grade,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
        version=0,
        alpha=1.0,
        exact=False,
        # The first of a prompt's samples: unperturbed, and a label row.
        samples_per_prompt=config.rollout.samples_per_prompt,
    )
    return numbers | program.metrics()


def _all_recorded(config: Config) -> bool:
    """Whether prefill gives the exact KLs."""
    return all(teacher.scoring == "recorder" for teacher in config.served_teachers.values())


async def check_signals(config: Config, checked: Checked, teacher: Teacher, version: int = 0) -> dict[str, float]:
    """Draw from the teacher alone, score what it drew by prefill, and give both to the checks of `kdray.signals`.

    A teacher that gives text alone, reads other ids, or recorded its answers earlier has nothing to check.
    Raises: SignalError with what is wrong.
    """
    if isinstance(config.loss, ULDLoss) or isinstance(teacher, CapturedTeacher):
        return {}
    requests = [
        SampleRequest(
            sample_id=index,
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt.token_ids,
            alpha=1.0,
            seed=sample_seed(config.run.seed, "signals", index),
            max_new_tokens=min(config.rollout.max_new_tokens, _SIGNAL_TOKENS),
            min_version=version,
        )
        for index, prompt in enumerate(checked.dataset.heldout[:_SIGNAL_PROMPTS])
    ]
    sampled = [rollout async for part in teacher.sample(requests) for rollout in part]
    if any(rollout.support_logprobs is None for rollout in sampled):
        return {"tokens": float(sum(len(rollout.token_ids) for rollout in sampled))}
    found = check_rows(sampled, checked.vocab_size)
    if not isinstance(teacher, ReplicaPool):
        return found | check_loss(sampled, config.loss, config.rollout.alpha, checked.vocab_size)
    asked = [rollout.unscored() for rollout in sampled]
    scored = [rollout async for part in teacher.score(asked) for rollout in part]
    # Half-precision kernels round each layer their own way; float32 ones differ in the order of sums alone.
    tolerance = 1e-3 if teacher.dtype == "float32" else 0.25
    recorded = [rollout.reverse_kl for rollout in sampled if rollout.reverse_kl is not None]
    if recorded:
        # 0 for a student that equals the teacher, such as a snapshot of it.
        found["student_reverse_kl"] = float(np.concatenate(recorded).mean())
    found["prefill_gap"] = check_prefill(sampled, scored, tolerance)
    return found | check_loss(sampled, config.loss, config.rollout.alpha, checked.vocab_size)


def decoder(tokenizer: Any) -> Callable[[np.ndarray], str]:
    def decode(token_ids: np.ndarray) -> str:
        return tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    return decode
