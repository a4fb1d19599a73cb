"""Measurements of a run's student, program and teachers through its pools."""

from __future__ import annotations

from typing import Any

import numpy as np

from actors.serving.pool import ReplicaPool
from cluster.parts import Pools
from kdray.capturing.teacher import CapturedTeacher
from kdray.checks.preflight import Checked
from kdray.checks.teacher_signal import check_loss, check_prefill, check_rows
from kdray.config import Config, ULDLoss
from kdray.evaluation import evaluate
from kdray.interfaces import Teacher
from kdray.models.inspect import decoder
from kdray.rollouts.columns import unscored
from kdray.rollouts.seeds import sample_seed
from kdray.types import SampleRequest

_SIGNAL_PROMPTS = 8


_SIGNAL_TOKENS = 16


def measure_arguments(config: Config, checked: Checked, pools: Pools) -> dict[str, Any]:
    """What `kdray.evaluation.evaluate` is given besides the version."""
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

    By the names of `kdray.runs.metrics` and `kdray.evaluation`; an answer that could not be read is wrong.
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
    """Draw from the teacher alone, score what it drew by prefill, and give both to the checks of `kdray.checks.teacher_signal`.

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
    asked = [unscored(rollout) for rollout in sampled]
    scored = [rollout async for part in teacher.score(asked) for rollout in part]
    # Half-precision kernels round each layer their own way; float32 ones differ in the order of sums alone.
    tolerance = 1e-3 if teacher.dtype == "float32" else 0.25
    recorded = [rollout.reverse_kl for rollout in sampled if rollout.reverse_kl is not None]
    if recorded:
        # 0 for a student that equals the teacher, such as a snapshot of it.
        found["student_reverse_kl"] = float(np.concatenate(recorded).mean())
    found["prefill_gap"] = check_prefill(sampled, scored, tolerance)
    return found | check_loss(sampled, config.loss, config.rollout.alpha, checked.vocab_size)
