"""The complete config of a run: its sections, derived values, and the rules that join them.

Rules here need only the config itself; rules that need files or a cluster are checked by `kdray.checks.preflight` and
`cluster.planning.placement`, before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import product
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import Field, ValidationInfo, model_validator

from kdray.config.base import SAVED, OnResume, Settings
from kdray.config.data import DataSettings
from kdray.config.features import AttentionTerm, HiddenTerm, RelationTerm
from kdray.config.losses import LossSource, MiniLLMLoss
from kdray.config.models import ModelSource, StudentSettings
from kdray.config.roles import with_roles
from kdray.config.rollout import RolloutSettings
from kdray.config.rules import SCHEDULED_SHARES, first_broken
from kdray.config.sections import ClusterSettings, EvaluationSettings, RunSettings
from kdray.config.teachers import PeerTeacherSettings, ServedTeacherSettings, TeacherSettings, TeacherSource
from kdray.config.training import TrainingSettings


class Config(Settings):
    """Config of a run."""

    run: RunSettings
    """Name, seed, output folder."""
    data: DataSettings = DataSettings()
    """Prompts and held-out data."""
    student: StudentSettings
    """The model to train."""
    teachers: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], TeacherSource] = Field(min_length=1)
    """Teachers by name; the keys depend on `type`: vllm (the default), self, peer, openai, hf or capture."""
    rollout: RolloutSettings = RolloutSettings()
    """Sampling of sequences."""
    loss: LossSource = MiniLLMLoss()
    """Objective; the keys depend on `type`, and docs/losses.md says when to use which."""
    training: TrainingSettings = TrainingSettings()
    """Optimizer, ranks, precision, checkpoints."""
    evaluation: Annotated[EvaluationSettings, OnResume()] = EvaluationSettings()
    """Measurements on held-out prompts."""
    cluster: Annotated[ClusterSettings, OnResume()] = ClusterSettings()
    """Cluster and placement."""

    @model_validator(mode="before")
    @classmethod
    def _roles(cls, tree: Any) -> Any:
        return with_roles(tree)

    @model_validator(mode="after")
    def _together(self, info: ValidationInfo) -> Config:
        broken = None if (info.context or {}).get(SAVED) else first_broken(self)
        if broken is not None:
            raise ValueError(broken)
        return self

    def extremes(self) -> Iterator[tuple[dict[str, float], dict[str, Any]]]:
        """Yield each combination of the end points of scheduled settings: the values, and the config tree that has them."""
        courses = {
            name: (self.scheduled(name) or 0.0, *schedule.extremes) for name, schedule in self.training.schedules.items()
        }
        for ends in product(*courses.values()):
            tree = self.model_dump(mode="json")
            tree["training"]["schedules"] = {}
            values = dict(zip(courses, ends, strict=True))
            for name, value in values.items():
                *sections, leaf = name.split(".")
                reduce(getitem, sections, tree)[leaf] = value
            if values:
                yield values, tree

    def scheduled(self, name: str) -> float | None:
        """Unscheduled value of a setting that a schedule may change; None if there is no such number."""
        section, _, leaf = name.partition(".")
        if section == "rollout" and leaf in SCHEDULED_SHARES:
            return float(getattr(self.rollout, leaf))
        if section == "training":
            return next((term.weight for term in self.feature_terms if name == f"{term.setting}.weight"), None)
        value = getattr(self.loss, leaf, None) if section == "loss" else None
        return value if isinstance(value, float) else None

    @property
    def feature_terms(self) -> list[HiddenTerm | AttentionTerm | RelationTerm]:
        return [] if self.training.features is None else self.training.features.terms

    @property
    def white_box_teacher(self) -> tuple[str, TeacherSettings] | None:
        """Name and settings of the first teacher whose weights can be loaded."""
        return next(((name, teacher) for name, teacher in self.teachers.items() if teacher.white_box), None)

    @property
    def served_teachers(self) -> dict[str, ServedTeacherSettings]:
        """Teachers served by replicas on the cluster."""
        served = {name: teacher for name, teacher in self.teachers.items() if teacher.served}
        return cast(dict[str, ServedTeacherSettings], served)

    @property
    def other_teachers(self) -> dict[str, TeacherSettings]:
        """Teachers not served by replicas."""
        return {name: teacher for name, teacher in self.teachers.items() if not teacher.served}

    @property
    def peers(self) -> dict[str, PeerTeacherSettings]:
        """Teachers that are trained in the same run."""
        learning = {name: teacher for name, teacher in self.teachers.items() if teacher.learns}
        return cast(dict[str, PeerTeacherSettings], learning)

    @property
    def teacher_needs_own_engine(self) -> bool:
        """True if the teacher's input differs from the student's, so that no replica can hold both."""
        templates = any(teacher.prompt_template is not None for teacher in self.served_teachers.values())
        return templates or not self.loss.shared_ids

    @property
    def trains_on_references(self) -> bool:
        """True if a phase trains on the data's reference answers."""
        supervised = self.training.sft.steps or self.training.finetune.steps or self.evaluation.control
        return bool(supervised) or self.rollout.data_share > 0.0 or "rollout.data_share" in self.training.schedules

    @property
    def rewarded(self) -> bool:
        """True if responses are rewarded in some step."""
        return self.loss.reward_weight > 0.0 or "loss.reward_weight" in self.training.schedules

    @property
    def distilled(self) -> bool:
        """True if the student learns from its teacher's distributions in some step."""
        return self.loss.distillation_weight > 0.0 or "loss.distillation_weight" in self.training.schedules

    @property
    def trained_by(self) -> str:
        """What trains the student, apart from a warm-up, in words that may begin a sentence."""
        reward = ("a reward" if self.distilled else "a reward alone") if self.rewarded else None
        parts = ["distillation" if self.distilled else None, reward, "fine-tuning" if self.training.finetune.steps else None]
        *others, last = [part for part in parts if part is not None]
        return f"{', '.join(others)} and {last}" if others else last

    def student_beside(self, name: str) -> bool:
        """True if a served teacher's replicas also hold the student."""
        return self.served_teachers[name].holds_student and not self.teacher_needs_own_engine

    def source(self, name: str) -> tuple[ModelSource, str | None]:
        """Model and revision of a teacher whose weights the run loads; those of the student if the teacher follows it."""
        owner: Any = self.student if self.teachers[name].follows_student else self.teachers[name]
        return owner.model, owner.revision

    @property
    def has_rollout_pool(self) -> bool:
        """True if student-only replicas run: to sample, or to evaluate a student that no teacher replica can hold."""
        return self.rollout.sampler == "student" or bool(self.other_teachers)

    @property
    def run_folder(self) -> Path:
        return self.run.output / self.run.name

    @property
    def max_model_len(self) -> int:
        """Maximum sequence length of the engines, tokens."""
        text = self.training.pretraining
        window = text.window_tokens if text is not None and text.teacher_share else 0
        program = self.rollout.program
        stage = program.max_stage_tokens if program is not None else 0
        return max(self.data.max_prompt_tokens + self.rollout.max_response_tokens, window, stage)

    def dump(self) -> str:
        """The resolved config as YAML, including defaults; `load_config` reads it back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
