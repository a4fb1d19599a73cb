"""The student-only rollout pool: replicas that sample at alpha 0 for a teacher that scores by prefill.

It is a ReplicaPool like the teachers' (`actors.teacher_pool`), around an engine that holds the student alone.
"""

from __future__ import annotations

from dataclasses import replace

from actors.teacher_engine import EngineSpec
from kdray.config import Config


def rollout_spec(config: Config, teacher: EngineSpec) -> EngineSpec:
    """The engine of one student-only replica, beside the given teacher's."""
    pool = config.rollout.pool
    assert teacher.student is not None
    return replace(
        teacher,
        role="student",
        model=teacher.student,
        revision=teacher.student_revision,
        student=None,
        student_revision=None,
        teacher="",
        dtype=pool.dtype,
        tensor_parallel_size=pool.tensor_parallel_size,
        max_num_seqs=pool.max_num_seqs,
        max_num_batched_tokens=pool.max_num_batched_tokens,
        kv_cache_gib=pool.kv_cache_gib,
        gpu_memory_utilization=pool.gpu_memory_utilization,
        engine_args=pool.engine_args,
    )
