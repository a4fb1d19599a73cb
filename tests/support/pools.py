"""Small pools of real replicas, as several files start them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.serving.pool import ReplicaPool
from actors.serving.spec import EngineSpec, RunHandles
from kdray.config import ClusterSettings, VLLMTeacherSettings
from tests.integration.conftest import EOS, VOCAB

Events = list[dict[str, Any]]
NOBODY = RunHandles()


def engine_spec(model: Path, student: Path | None = None, /, **changes: Any) -> EngineSpec:
    """Of a tiny model as the teacher, which draws with the student where there is one."""
    given: dict[str, Any] = {
        "role": "teacher" if student is None else "mixture",
        "model": str(model),
        "student": None if student is None else str(student),
        "vocab_size": VOCAB,
        "stop_ids": (EOS,),
        "max_model_len": 256,
        "teacher": "t",
        "teacher_top_k": 8,
        "student_top_k": 0 if student is None else 4,
        "kv_cache_gib": 0.1,
    }
    return EngineSpec(**given | changes)


def replica_pool(
    spec: EngineSpec, events: Events, run: RunHandles = NOBODY, teacher: dict[str, Any] | None = None, **changes: Any
) -> ReplicaPool:
    """Not yet deployed. Args: events: where its events go; teacher: settings; changes: of the pool's arguments."""

    def on_event(kind: str, **fields: Any) -> None:
        events.append({"kind": kind, **fields})

    settings = VLLMTeacherSettings.model_validate({"model": spec.model, **(teacher or {})})
    given: dict[str, Any] = {"retries": 3, "on_event": on_event} | changes
    return ReplicaPool(spec.teacher, spec, settings, ClusterSettings(health_check_period_s=2), run, **given)
