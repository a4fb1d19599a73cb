"""Specifications of a run's engines: the models that a replica holds, and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from actors.serving.spec import EngineSpec
from kdray.checks.parity import parity_ids
from kdray.config import Config, EngineSettings
from kdray.data.dataset import reencode, templated
from kdray.errors import ConfigError
from kdray.models.inspect import load_tokenizer, shape
from kdray.models.vocab import tokenizer_hash
from kdray.runs.context import Checked, RunContext

_CANARY_TOKENS = 64
_TEACHER_TOKENS = 4
"""Maximum ratio of a text's tokens between a teacher with another tokenizer and the student; longer texts get no rows."""


def teacher_tokenizer(config: Config, name: str) -> Any:
    return load_tokenizer(*config.source(name))


def _own_vocabulary_spec(context: RunContext, name: str) -> EngineSpec:
    """Spec of a teacher alone, over its own vocabulary; its tokens for a text may be several times the student's."""
    config = context.config
    teacher = config.served_teachers[name]
    tokenizer = teacher_tokenizer(config, name)
    rows, positions = shape(*config.source(name))
    heldout = reencode(config, tokenizer, context.dataset.heldout[:_CANARY_TOKENS])
    canary = [int(token_id) for ids in heldout.values() for token_id in ids][:_CANARY_TOKENS]
    longest = _TEACHER_TOKENS * config.max_model_len
    return replace(
        _spec(context, teacher),
        role="teacher",
        model=context.models.teachers[name],
        revision=config.source(name)[1],
        teacher=name,
        scoring=teacher.scoring,
        vocab_size=rows,
        stop_ids=(int(tokenizer.eos_token_id),),
        max_model_len=longest if positions is None else min(longest, positions),
        canary=tuple(canary),
        tokenizer=tokenizer_hash(tokenizer),
    )


def _privileged_spec(context: RunContext, name: str) -> EngineSpec:
    """Spec of a teacher alone, whose prompts are longer than the student's."""
    config = context.config
    teacher = config.served_teachers[name]
    longest = max(len(ids) for ids in privileged_prompts(context, name).values()) + config.rollout.max_response_tokens
    positions = shape(*config.source(name))[1]
    if positions is not None and longest > positions:
        raise ConfigError(
            f"teachers.{name}.prompt_template: its longest prompt needs {longest} positions with a response of "
            f"{config.rollout.max_response_tokens} tokens, and the model holds {positions}; shorten one of them"
        )
    return replace(
        _spec(context, teacher),
        role="teacher",
        model=context.models.teachers[name],
        revision=config.source(name)[1],
        teacher=name,
        scoring=teacher.scoring,
        max_model_len=max(longest, config.max_model_len),
        canary=canary(context),
        tokenizer=tokenizer_hash(context.tokenizer),
    )


def teacher_spec(context: RunContext, name: str) -> EngineSpec:
    """Spec of a served teacher, according to its input, and with the student if the route places it there."""
    own = {"own_ids": _own_vocabulary_spec, "own_prompts": _privileged_spec}.get(context.route.teacher_reads)
    if own is not None:
        return own(context, name)
    config = context.config
    teacher = config.served_teachers[name]
    spec = replace(
        _spec(context, teacher),
        role="teacher",
        model=context.models.teachers[name],
        revision=config.source(name)[1],
        teacher=name,
        record_hidden=config.rollout.teacher_signal == "hidden",
        scoring=teacher.scoring,
        canary=canary(context),
        tokenizer=tokenizer_hash(teacher_tokenizer(config, name)),
    )
    if not context.route.student_in_replicas or not teacher.holds_student:
        return spec
    return replace(spec, role="mixture", student=context.models.student, student_revision=config.student.revision)


def student_spec(context: RunContext) -> EngineSpec:
    config = context.config
    return replace(_spec(context, config.rollout.pool), model=context.models.student, revision=config.student.revision)


def _spec(context: RunContext, engine: EngineSettings) -> EngineSpec:
    """Specification shared by the run's engines, with their size; the spec of a student-only engine except for its model."""
    config = context.config
    return EngineSpec(
        role="student",
        model="",
        student=None,
        vocab_size=context.vocab_size,
        stop_ids=context.stop_ids,
        max_model_len=config.max_model_len,
        teacher_top_k=config.rollout.teacher_top_k,
        student_top_k=config.rollout.student_top_k,
        dtype=engine.dtype,
        logits=config.training.logits,
        tensor_parallel_size=engine.tensor_parallel_size,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_cache_gib=engine.kv_cache_gib,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        model_runner=engine.model_runner,
        seed=config.run.seed,
        start_timeout_s=config.cluster.start_timeout_s,
        stuck_after_s=config.cluster.stuck_after_s,
        parity_ids=student_ids(context),
        student_dtype="bfloat16" if config.training.precision == "bf16" else "float32",
        update_kv=config.rollout.update_kv,
        weight_transfer=None if config.training.weight_transfer == "object_store" else config.training.weight_transfer,
        engine_args=engine.engine_args | engine.unsafe_engine_args,
        secrets=config.cluster.secret_files("replicas"),
    )


def canary(checked: Checked) -> tuple[int, ...]:
    """Ids that every teacher replica scores at its start: held-out prompts, concatenated."""
    ids = [int(token_id) for prompt in checked.dataset.heldout[:_CANARY_TOKENS] for token_id in prompt.token_ids]
    return tuple(ids[: min(_CANARY_TOKENS, checked.config.max_model_len)])


def student_ids(checked: Checked) -> tuple[int, ...]:
    """Ids on which trainer and replicas compare the student: held-out prompts, concatenated."""
    return parity_ids([prompt.token_ids.tolist() for prompt in checked.dataset.heldout], checked.config.max_model_len)


def privileged_prompts(context: RunContext, name: str) -> dict[int, np.ndarray]:
    """Prompts of a teacher with a template of its own, by prompt id."""
    template = context.config.served_teachers[name].prompt_template
    assert template is not None
    return templated(context.config, context.tokenizer, context.prompts, template)
