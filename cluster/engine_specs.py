"""Specifications of a run's engines: which models a replica holds, and with what limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from actors.serving.engine import EngineSpec
from cluster.parts import Models
from kdray.checks.preflight import Checked
from kdray.config import Config, EngineSettings
from kdray.data.dataset import reencode, templated
from kdray.errors import ConfigError
from kdray.models.inspect import load_tokenizer, shape
from kdray.models.vocab import tokenizer_hash

_CANARY_TOKENS = 64


_TEACHER_TOKENS = 4
"""Times as many tokens as the student that a teacher with another tokenizer may need for a text; longer ones get no rows."""


def teacher_tokenizer(config: Config, name: str) -> Any:
    return load_tokenizer(*config.source(name))


def _own_vocabulary_spec(config: Config, checked: Checked, models: Models, name: str) -> EngineSpec:
    """A teacher alone, over its own vocabulary; its tokens for a text may be several times the student's."""
    teacher = config.served_teachers[name]
    tokenizer = teacher_tokenizer(config, name)
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


def _privileged_spec(config: Config, checked: Checked, models: Models, name: str) -> EngineSpec:
    """A teacher alone, whose prompts are longer than the student's."""
    teacher = config.served_teachers[name]
    longest = max(len(ids) for ids in privileged_prompts(config, checked, name).values()) + config.rollout.max_new_tokens
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


def teacher_spec(config: Config, checked: Checked, models: Models, name: str) -> EngineSpec:
    teacher = config.served_teachers[name]
    if not config.loss.shared_ids:
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
        tokenizer=tokenizer_hash(teacher_tokenizer(config, name)),
    )


def student_spec(config: Config, checked: Checked, models: Models) -> EngineSpec:
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


def privileged_prompts(config: Config, checked: Checked, name: str) -> dict[int, np.ndarray]:
    """What a teacher with a template of its own reads, by prompt id."""
    template = config.served_teachers[name].prompt_template
    assert template is not None
    prompts = [*checked.dataset.train, *checked.dataset.heldout]
    return templated(config, checked.tokenizer, prompts, template)
