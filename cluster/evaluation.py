"""Measurements of a run's student, program and teachers through its pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from actors.serving.pool import ReplicaPool
from cluster.parts import Pools
from kdray.checks.teacher_signal import check_loss, check_prefill, check_rows, prefill_tolerance
from kdray.config import TeacherSettings
from kdray.errors import SignalError
from kdray.evaluation import HeldOut, Measurement
from kdray.interfaces import Sampler, Teacher
from kdray.models.inspect import decoder
from kdray.rollouts.columns import unscored
from kdray.rollouts.environments import in_environment
from kdray.rollouts.seeds import sample_seed
from kdray.runs.context import Checked
from kdray.runs.reporter import RunReporter
from kdray.runs.results.comparison import TeacherFacts
from kdray.types import Prompt, SampleRequest

_SIGNAL_PROMPTS = 8
_SIGNAL_TOKENS = 16
_ATTEMPTS = 5
"""Checks of a teacher that learns, of which one has to pass."""


def held_out(checked: Checked, pools: Pools) -> HeldOut:
    """The evaluation of a run's student."""
    route = checked.route
    # The team's own metrics are for training.
    team = None if pools.team is None else pools.team.with_fresh_metrics()
    sampling = pools.sampler if pools.program is None else pools.program.teacher
    sampler = team if team is not None and sampling is pools.team else sampling
    scorer = team if team is not None and pools.scorer is pools.team else pools.scorer
    if route.measures_on_students:
        # Exact KLs need both models in one replica; without them, the student's responses are graded.
        assert pools.students is not None
        sampler, scorer = pools.students, None
    rollout = checked.config.rollout
    top_ids = (rollout.teacher_top_k, rollout.student_top_k)
    return _held_out(checked, sampler=sampler, scorer=scorer, exact=route.measures_exact, top_ids=top_ids)


async def measure_student(
    checked: Checked, reporter: RunReporter, pools: Pools, version: int, name: str | None
) -> dict[str, float]:
    """Evaluate a student version. Args: name: name under which the evaluation is reported and stored; None does neither."""
    found = await held_out(checked, pools).measure(version)
    if name is not None:
        _record(checked, reporter, name, found)
    return found.numbers


async def measure_at_start(checked: Checked, reporter: RunReporter, pools: Pools) -> dict[str, dict[str, float] | None]:
    """Evaluate what distillation starts from: `before`, the student; `program` and `teacher`, None where there is none.

    The metrics of a program are named as in `kdray.runs.metrics` and `kdray.evaluation`; an unreadable answer counts as wrong.
    """
    before = await measure_student(checked, reporter, pools, 0, "before")
    return {
        "before": before,
        "program": await _measure_program(checked, reporter, pools),
        "teacher": await _measure_teacher(checked, reporter, pools),
    }


async def _measure_program(checked: Checked, reporter: RunReporter, pools: Pools) -> dict[str, float] | None:
    if pools.program is None:
        return None
    program = pools.program.with_fresh_metrics()
    # The first of a prompt's samples: unperturbed, and a label row.
    siblings = checked.config.rollout.samples_per_prompt
    found = await _held_out(checked, sampler=program, scorer=None, alpha=1.0, exact=False, siblings=siblings).measure(version=0)
    return _record(checked, reporter, "program", replace(found, numbers=found.numbers | program.metrics()))


async def _measure_teacher(checked: Checked, reporter: RunReporter, pools: Pools) -> dict[str, float] | None:
    reason = teacher_left_out(checked)
    if reason is not None:
        reporter.event("teacher_not_measured", reason=reason)
        return None
    teacher = pools.named[0] if pools.team is None else pools.team.with_fresh_metrics()
    # Its divergence from itself is 0; from the student, it would be a divergence at other prefixes than the student's.
    found = await _held_out(checked, sampler=teacher, scorer=None, alpha=1.0, exact=False).measure(version=0)
    return _record(checked, reporter, "teacher", found)


def teacher_left_out(checked: Checked) -> str | None:
    """Reason why the teacher itself is not measured on the held-out prompts; None if it is."""
    config, route, grade = checked.config, checked.route, checked.dataset.grade
    if not config.evaluation.teacher:
        return "evaluation.teacher is false"
    graded = grade is not None and any(grade.can_grade(prompt) for prompt in _prompts(checked))
    if not (graded or config.evaluation.rouge_l):
        return "nothing grades the held-out prompts"
    if route.sampler == "program":
        return "the teacher answers through its program, which is measured instead"
    if route.teacher_reads == "own_ids":
        return "the teacher has another tokenizer than the student"
    if route.teacher_reads == "own_prompts":
        return "the teacher reads prompts of its own (prompt_template)"
    if config.rollout.teachers is not None and config.rollout.teachers.one_target:
        return "the target of an ensemble is computed, and no model answers with it"
    for name, teacher in config.teachers.items():
        if config.rollout.environment is not None and not teacher.pauses:
            return f"teacher {name} writes a response in one piece, without the environment"
        if not (teacher.served or teacher.white_box):
            return f"teacher {name} {'replays recorded answers' if teacher.replays else 'returns text only'}"
        if _changes(teacher):
            return f"teacher {name} changes during the run"
    return None


def teacher_facts(checked: Checked) -> TeacherFacts:
    """Facts about the run that the comparison of its evaluations needs."""
    config = checked.config
    return TeacherFacts(teacher_left_out(checked), any(map(_changes, config.teachers.values())), config.trained_by)


def _changes(teacher: TeacherSettings) -> bool:
    """Return True for a teacher whose weights change during the run."""
    return teacher.learns or teacher.renewal is not None


def _record(checked: Checked, reporter: RunReporter, name: str, found: Measurement) -> dict[str, float]:
    reporter.event("evaluation", name=name, **found.numbers)
    # The samples for inspection are of as many prompts as possible.
    reporter.heldout_samples(found.rollouts[:: checked.config.evaluation.samples_per_prompt], name)
    reporter.heldout_draws(found.draws, name)
    return found.numbers


def _held_out(checked: Checked, sampler: Sampler, **how: Any) -> HeldOut:
    config, prompts = checked.config, _prompts(checked)
    return HeldOut(
        prompts=prompts,
        sampler=in_environment(sampler, config.rollout.environment, checked.tokenizer, checked.vocab_size, prompts),
        decode=decoder(checked.tokenizer),
        grade=checked.dataset.grade,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
        samples_per_prompt=config.evaluation.samples_per_prompt,
        pass_at=config.evaluation.passes,
        rouge_l=config.evaluation.rouge_l,
        **how,
    )


def _prompts(checked: Checked) -> list[Prompt]:
    return checked.dataset.heldout[: checked.config.evaluation.prompts]


async def check_signals(checked: Checked, teacher: Teacher, version: int = 0) -> dict[str, float]:
    """Sample from the teacher alone, score the samples by prefill, and pass both to the checks of
    `kdray.checks.teacher_signal`.

    A teacher that returns only text, reads other ids, or has recorded its answers earlier needs no check.
    Raises: SignalError with the reason.
    """
    settings = checked.config.teachers[teacher.name]
    if checked.route.teacher_reads == "own_ids" or settings.replays:
        return {}
    config = checked.config
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
    # A peer trains on: new weights may have come between sampling and scoring, but not every time.
    attempts = _ATTEMPTS if settings.learns else 1
    again = AsyncRetrying(retry=retry_if_exception_type(SignalError), stop=stop_after_attempt(attempts), reraise=True)
    return await again(_check_signals, checked, teacher, requests)


async def _check_signals(checked: Checked, teacher: Teacher, requests: Sequence[SampleRequest]) -> dict[str, float]:
    config, settings = checked.config, checked.config.teachers[teacher.name]
    sampled = [rollout async for part in teacher.sample(requests) for rollout in part]
    if any(rollout.support_logprobs is None for rollout in sampled):
        return {"tokens": float(sum(len(rollout.token_ids) for rollout in sampled))}
    found = check_rows(sampled, checked.vocab_size)
    if not settings.served:
        return found | check_loss(sampled, config.loss, config.rollout.alpha, checked.vocab_size)
    pool = cast(ReplicaPool, teacher)
    asked = [unscored(rollout) for rollout in sampled]
    scored = [rollout async for part in pool.score(asked) for rollout in part]
    recorded = [rollout.reverse_kl for rollout in sampled if rollout.reverse_kl is not None]
    if recorded:
        # 0 for a student that equals the teacher, such as a snapshot of it.
        found["student_reverse_kl"] = float(np.concatenate(recorded).mean())
    found["prefill_gap"] = check_prefill(sampled, scored, prefill_tolerance(pool.dtype))
    return found | check_loss(sampled, config.loss, config.rollout.alpha, checked.vocab_size)
