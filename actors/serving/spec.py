"""Specification of a replica: the contents and size of its engine, and the actors of the run that it talks to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Role = Literal["mixture", "teacher", "student"]


@dataclass(frozen=True)
class EngineSpec:
    """Contents and size of one engine; picklable."""

    role: Role
    model: str
    """Folder or hub id of the engine's own checkpoint: the teacher's, or the student's for role `student`."""
    student: str | None
    """Folder or hub id of the student in the same engine as the teacher (role `mixture`)."""
    vocab_size: int
    """Ids that teacher and student share; rows beyond are cut off before the softmax."""
    stop_ids: tuple[int, ...]
    """End-of-sequence ids; sampling one ends the rollout, and it is the rollout's last token."""
    max_model_len: int
    """Longest prompt plus response, in tokens."""
    revision: str | None = None
    """Commit or tag of `model` on the hub."""
    student_revision: str | None = None
    """Commit or tag of `student` on the hub."""
    teacher: str = ""
    """Name of the teacher, written into every rollout it scored."""
    canary: tuple[int, ...] = ()
    """Token ids that the teacher scores at its start, so that every replica can be compared with the first one."""
    tokenizer: str = ""
    """Hash of the teacher's tokenizer."""
    scoring: Literal["recorder", "prompt_logprobs"] = "recorder"
    """Method of scoring prefill: by the recorder, or by vLLM's own `prompt_logprobs`."""
    model_runner: Literal["v1", "v2"] = "v1"
    """Model runner of vLLM, with a recorder of its own."""
    record_hidden: bool = False
    """Record the teacher's last hidden state for every token."""
    teacher_top_k: int = 32
    student_top_k: int = 16
    dtype: str = "auto"
    logits: Literal["model", "float32"] = "model"
    """Dtype of logits; `model` is that of the model's weights."""
    tensor_parallel_size: int = 1
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 4096
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.85
    seed: int = 0
    start_timeout_s: float = 3600.0
    """Maximum time that the engine may take to start."""
    stuck_after_s: float = 300.0
    """Maximum time that the engine may take to respond between two steps."""
    update_kv: Literal["recompute", "keep"] = "recompute"
    """Keys and values of requests in flight after an update of the student."""
    weight_transfer: str | None = None
    """vLLM backend that transfers the student's weights from rank 0; None if they come as files."""
    parity_ids: tuple[int, ...] = ()
    """Token ids on which the student is compared with the trainer's after every update; empty if it is not."""
    student_dtype: str = "float32"
    """Dtype in which the trainer computes."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    """Files with the values of environment variables that the engine needs, by the variable's name."""


@dataclass(frozen=True)
class RunHandles:
    """Handles of the run's actors that its pools and replicas talk to; None for those that a run does not have."""

    weights: Any = None
    """The WeightStore of the student; None if the student never changes."""
    teacher_weights: Any = None
    """The WeightStore of a teacher that changes during the run."""
    registry: Any = None
    """The TeacherRegistry, which also receives the reports of engines that did not start; None if the run has none."""
    compared: bool = True
    """Whether replicas of the teacher must agree with each other; those of a changing teacher differ by its version."""
    board: Any = None
    """The ScalingBoard; None if no pool is autoscaled."""

    @property
    def owner(self) -> Any:
        """An actor that lives as long as the run's driver: the run ends with it. None if there is none."""
        return next((each for each in (self.weights, self.registry, self.board) if each is not None), None)
