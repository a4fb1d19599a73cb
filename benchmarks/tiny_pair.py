"""The pair of tiny models that engines are measured with: a teacher of 2.3 million parameters, a student of 0.3 million."""

from __future__ import annotations

from pathlib import Path

from actors.serving.spec import EngineSpec, Role
from kdray.config import TinyModel
from kdray.models.resolve import build_tiny_model

VOCAB = 99


def engine_spec(folder: Path, max_num_seqs: int, role: Role = "mixture") -> EngineSpec:
    """Engine with the models that a role needs, built in `folder`."""
    teacher = TinyModel(type="tiny", layers=6, width=192, seed=1)
    student = TinyModel(type="tiny", layers=3, width=96, seed=2)
    return EngineSpec(
        role=role,
        model=str(build_tiny_model(student if role == "student" else teacher, folder / f"{role}-model")),
        student=str(build_tiny_model(student, folder / f"{role}-student")) if role == "mixture" else None,
        vocab_size=VOCAB,
        # A random model ends a sequence at any token; without that, every round has the same work.
        stop_ids=(),
        max_model_len=256,
        teacher_top_k=16,
        student_top_k=16,
        max_num_seqs=max_num_seqs,
        kv_cache_gib=0.5,
    )
