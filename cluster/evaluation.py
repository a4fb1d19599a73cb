"""Measurements of a run's student, program and teachers through its pools."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from actors.serving.pool import ReplicaPool
from cluster.parts import Pools
from kdray.checks.teacher_signal import check_loss, check_prefill, check_rows
from kdray.evaluation import HeldOut
from kdray.interfaces import Teacher
from kdray.models.inspect import decoder
from kdray.rollouts.columns import unscored
from kdray.rollouts.seeds import sample_seed
from kdray.runs.context import Checked
from kdray.types import SampleRequest

_SIGNAL_PROMPTS = 8
_SIGNAL_TOKENS = 16


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
    return _held_out(checked, sampler=sampler, scorer=scorer, exact=route.measures_exact)


async def measure_program(checked: Checked, pools: Pools) -> dict[str, float] | None:
    """Metrics of the System-2 program's answers to the held-out prompts; None without a program.

    Named as in `kdray.runs.metrics` and `kdray.evaluation`; an unreadable answer counts as wrong.
    """
    if pools.program is None:
        return None
    program = pools.program.with_fresh_metrics()
    # The first of a prompt's samples: unperturbed, and a label row.
    siblings = checked.config.rollout.samples_per_prompt
    measurement = _held_out(checked, sampler=program, scorer=None, alpha=1.0, exact=False, samples_per_prompt=siblings)
    numbers, _ = await measurement.measure(version=0)
    return numbers | program.metrics()


def _held_out(checked: Checked, **how: Any) -> HeldOut:
    config = checked.config
    return HeldOut(
        prompts=checked.dataset.heldout[: config.evaluation.prompts],
        decode=decoder(checked.tokenizer),
        grade=checked.dataset.grade,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
        **how,
    )


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
    sampled = [rollout async for part in teacher.sample(requests) for rollout in part]
    if any(rollout.support_logprobs is None for rollout in sampled):
        return {"tokens": float(sum(len(rollout.token_ids) for rollout in sampled))}
    found = check_rows(sampled, checked.vocab_size)
    if not settings.served:
        return found | check_loss(sampled, config.loss, config.rollout.alpha, checked.vocab_size)
    pool = cast(ReplicaPool, teacher)
    asked = [unscored(rollout) for rollout in sampled]
    scored = [rollout async for part in pool.score(asked) for rollout in part]
    # Half-precision kernels round each layer in their own way; float32 ones differ only in the order of summation.
    tolerance = 1e-3 if pool.dtype == "float32" else 0.25
    recorded = [rollout.reverse_kl for rollout in sampled if rollout.reverse_kl is not None]
    if recorded:
        # 0 for a student that equals the teacher, such as a snapshot of it.
        found["student_reverse_kl"] = float(np.concatenate(recorded).mean())
    found["prefill_gap"] = check_prefill(sampled, scored, tolerance)
    return found | check_loss(sampled, config.loss, config.rollout.alpha, checked.vocab_size)
