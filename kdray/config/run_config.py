"""The config of a run as a whole: its sections, what follows from them, and the rules that join them.

Rules here need nothing but the config itself; what needs files or a cluster is checked by `kdray.checks.preflight` and
`cluster.planning.placement`, before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import product
from operator import getitem
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from kdray.config.base import Settings, with_default_type
from kdray.config.data import (
    DataSettings,
)
from kdray.config.explain import explain
from kdray.config.features import AttentionTerm, HiddenTerm, RelationTerm
from kdray.config.losses import (
    DIVERGENCE_LOSSES,
    ForwardKLSampledLoss,
    HintonLoss,
    LMOpsLoss,
    LossSettings,
    MiniLLMLoss,
    PerDecisionLoss,
    SequenceLoss,
    ULDLoss,
    VOPDLoss,
    type_of,
)
from kdray.config.models import ModelSource, StudentSettings
from kdray.config.programs import (
    RationaleProgram,
)
from kdray.config.roles import with_roles
from kdray.config.rollout import (
    EnsembleSettings,
    RolloutSettings,
)
from kdray.config.sections import ClusterSettings, EvaluationSettings, RunSettings
from kdray.config.teachers import (
    CaptureTeacherSettings,
    HFTeacherSettings,
    OtherTeacherSettings,
    PeerTeacherSettings,
    SelfTeacherSettings,
    ServedTeacher,
    TeacherSettings,
    TeacherSource,
)
from kdray.config.training import TrainingSettings

SCHEDULED_SHARES = ("alpha", "teacher_share", "data_share")
"""Settings of `rollout` that `training.schedules` may change."""


class Config(Settings):
    """A whole run."""

    run: RunSettings
    """Name, seed, output."""
    data: DataSettings = DataSettings()
    """Prompts and what is held out."""
    student: StudentSettings
    """The model that learns."""
    teachers: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], TeacherSource] = Field(min_length=1)
    """Teachers by name; the keys depend on `type`: vllm (the default), self, peer, openai, hf or capture."""
    rollout: RolloutSettings = RolloutSettings()
    """How sequences are drawn."""
    loss: LossSettings = MiniLLMLoss()
    """What is minimised; the keys depend on `type`, and docs/losses.md says which when."""
    training: TrainingSettings = TrainingSettings()
    """Optimizer, ranks, precision, checkpoints."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is measured on held-out prompts."""
    cluster: ClusterSettings = ClusterSettings()
    """Where it runs."""

    @model_validator(mode="before")
    @classmethod
    def _default_type(cls, tree: Any) -> Any:
        return with_roles(with_default_type(tree, "loss", "minillm"))

    @model_validator(mode="after")
    def _together(self) -> Config:
        self._check_teachers()
        self._check_writers()
        self._check_live_teachers()
        self._check_weight_transfer()
        self._check_schedules()
        if isinstance(self.loss, MiniLLMLoss | LMOpsLoss | PerDecisionLoss | VOPDLoss) and self.rollout.alpha == 1.0:
            raise ValueError(
                f"rollout.alpha=1 with loss.type={self.loss.type}: the weight q/m is unbounded when the teacher draws "
                "every token; use alpha below 1, or loss.type=forward_kl"
            )
        if isinstance(self.loss, ForwardKLSampledLoss) and self.rollout.alpha == 0.0:
            raise ValueError(
                "rollout.alpha=0 with loss.type=forward_kl_sampled: the weight p/m is unbounded when the student draws every "
                "token; use alpha above 0, or loss.type=forward_kl"
            )
        if self.rollout.teacher_signal == "hidden" and not isinstance(self.loss, DIVERGENCE_LOSSES):
            raise ValueError(
                f"rollout.teacher_signal=hidden with loss.type={self.loss.type}: exact rows are made for the divergences "
                f"({', '.join(sorted(type_of(loss) for loss in DIVERGENCE_LOSSES))}); choose one of them, or "
                "rollout.teacher_signal=support"
            )
        if isinstance(self.loss, ULDLoss) and (
            self.rollout.sampler != "student" or len(self.teachers) > 1 or not self.served_teachers
        ):
            raise ValueError(
                "loss.type=uld: a teacher with another tokenizer cannot sample beside the student, nor share a target with "
                "others; set rollout.sampler=student, and keep one teacher of type vllm"
            )
        if isinstance(self.loss, ULDLoss) and self.training.pretraining is not None and self.training.pretraining.teacher_share:
            raise ValueError("training.pretraining.teacher_share with loss.type=uld: the text is in other ids; set it to 0")
        if self.training.features is not None:
            self._check_features()
        if "rollout" in self.teachers:
            raise ValueError("teachers.rollout: that is the name of the rollout pool; give the teacher another name")
        if "rollout.pool" in self.cluster.roles and not self.has_rollout_pool:
            raise ValueError(
                f"cluster.roles.rollout.pool with rollout.sampler={self.rollout.sampler}: the teachers' replicas sample, and "
                "no pool of student replicas runs; remove the role, or set rollout.sampler=student"
            )
        if self.training.batch_size % self.rollout.samples_per_prompt:
            raise ValueError(
                f"training.batch_size={self.training.batch_size} is not a multiple of "
                f"rollout.samples_per_prompt={self.rollout.samples_per_prompt}"
            )
        self._check_program()
        return self

    def _check_writers(self) -> None:
        """Who writes the responses, and whether the loss can learn from them."""
        rollout, loss = self.rollout, self.loss
        drawn = (1.0 - rollout.data_share) * (1.0 - rollout.teacher_share)
        if isinstance(loss, SequenceLoss) and rollout.alpha < 1.0 and drawn > 0.0:
            raise ValueError(
                f"rollout.alpha={rollout.alpha:g} with loss.type=sequence: cross entropy of what the student drew teaches "
                "nothing; set rollout.alpha=1, so that the teacher writes"
            )
        if rollout.sampler == "student" and rollout.teacher_share:
            raise ValueError(
                f"rollout.teacher_share={rollout.teacher_share:g} with rollout.sampler=student: student-only replicas cannot "
                "write for the teacher; set rollout.sampler=mixture with rollout.alpha=0"
            )
        if isinstance(loss, HintonLoss) and loss.soft_share < 1.0 and rollout.alpha < 1.0 and drawn > 0.0:
            raise ValueError(
                f"loss.soft_share={loss.soft_share:g} with rollout.alpha={rollout.alpha:g}: what the student drew is no label; "
                "set loss.soft_share=1, rollout.alpha=1 or rollout.data_share=1"
            )
        weighted = MiniLLMLoss | LMOpsLoss | PerDecisionLoss | VOPDLoss | ForwardKLSampledLoss
        if isinstance(loss, weighted) and rollout.data_share:
            raise ValueError(
                f"rollout.data_share={rollout.data_share:g} with loss.type={loss.type}: its weights divide by the density that "
                "each token was drawn from, and nobody knows the data's; use a divergence, or loss.type=sequence"
            )
        if isinstance(loss, weighted) and not isinstance(loss, ForwardKLSampledLoss) and rollout.teacher_share:
            raise ValueError(
                f"rollout.teacher_share={rollout.teacher_share:g} with loss.type={loss.type}: the weight q / m is unbounded "
                "where the teacher writes alone; use a divergence, or rollout.alpha for mixing token by token"
            )
        if rollout.filters is not None and rollout.filters.agreement is not None and rollout.samples_per_prompt == 1:
            raise ValueError(
                f"rollout.filters.agreement={rollout.filters.agreement} with rollout.samples_per_prompt=1: there is nothing to "
                "agree with; raise rollout.samples_per_prompt"
            )

    def _check_live_teachers(self) -> None:
        """Teachers that read other prompts, or whose weights change during the run."""
        peers, selves = self.peers, [t for t in self.teachers.values() if isinstance(t, SelfTeacherSettings)]
        if self.teacher_apart and not isinstance(self.loss, ULDLoss):
            name = next(name for name, teacher in self.served_teachers.items() if teacher.prompt_template is not None)
            if self.rollout.sampler != "student" or len(self.teachers) > 1:
                raise ValueError(
                    f"teachers.{name}.prompt_template: a teacher that reads another prompt cannot sample beside the student, "
                    "nor share a target with others; set rollout.sampler=student, and keep one teacher"
                )
        if peers and len(peers) < len(self.teachers):
            raise ValueError(
                f"teachers: {', '.join(peers)} of type peer learn from this student and from each other; another kind of "
                "teacher beside them is not known: keep peers alone"
            )
        if len(peers) > 1 and not isinstance(self.rollout.teachers, EnsembleSettings):
            raise ValueError("rollout.teachers: several peers teach as one; set rollout.teachers.type=ensemble")
        if peers and self.rollout.teachers is not None and (self.rollout.teachers.names()):
            raise ValueError("rollout.teachers: peers count alike, since every student has the others; remove their names")
        sources = [(self.student.model, self.student.revision), *((peer.model, peer.revision) for peer in peers.values())]
        if any(source in sources[:place] for place, source in enumerate(sources)):
            raise ValueError(
                "teachers: peers that start from one model and see the same data stay one model, and have nothing to teach; "
                "give them different models, or tiny ones of different seeds"
            )
        alone = selves and not self.teacher_apart and self.rollout.data_share == 0.0
        if alone and not isinstance(self.loss, SequenceLoss):
            raise ValueError(
                "teachers of type self: the student begins as its own teacher, where every divergence is zero and stays so; "
                "set rollout.data_share for answers to learn from, or prompt_template so that the teacher knows more"
            )
        if selves and (len(self.teachers) > 1 or isinstance(self.loss, ULDLoss)):
            raise ValueError(
                "teachers: one of type self is the only teacher of its run, and reads the student's own ids; remove the others"
            )
        if (peers or selves) and self.rollout.teacher_signal == "hidden":
            raise ValueError(
                "rollout.teacher_signal=hidden: the ranks hold an output head of fixed weights, and these teachers change; use "
                "rollout.teacher_signal=support"
            )

    def _check_weight_transfer(self) -> None:
        """Where NCCL brings the weights, both ends need GPUs that nobody else has."""
        if self.training.weight_transfer == "object_store":
            return
        asked = f"training.weight_transfer={self.training.weight_transfer}"
        if self.training.gpus_per_rank < 1:
            raise ValueError(
                f"{asked} with training.gpus_per_rank={self.training.gpus_per_rank:g}: NCCL sends from a GPU of rank 0's own; "
                "set training.gpus_per_rank=1, or training.weight_transfer=object_store"
            )
        takers = {} if self.teacher_apart else {f"teachers.{name}": each for name, each in self.served_teachers.items()}
        for name, engine in (takers | ({"rollout.pool": self.rollout.pool} if self.has_rollout_pool else {})).items():
            if engine.num_gpus < 1:
                raise ValueError(
                    f"{asked} with {name}.num_gpus={engine.num_gpus:g}: its replicas take the student's weights, and NCCL "
                    f"brings them to GPUs of their own alone; set {name}.num_gpus={engine.tensor_parallel_size}, or "
                    "training.weight_transfer=object_store"
                )
            if engine.engine_args.get("data_parallel_size", 1) != 1:
                raise ValueError(
                    f"{asked} with {name}.engine_args.data_parallel_size: each replica is one engine here; remove it and raise "
                    f"{name}.replicas, or set training.weight_transfer=object_store"
                )
        if self.peers:
            raise ValueError(
                f"{asked} with teachers of type peer ({', '.join(self.peers)}): their replicas take weights of several "
                "students, which nccl does not bring; set training.weight_transfer=object_store"
            )

    def _check_schedules(self) -> None:
        """Every scheduled setting must exist, and be valid at both ends of its course."""
        for name in self.training.schedules:
            if self.scheduled(name) is None:
                known = [f"rollout.{one}" for one in SCHEDULED_SHARES]
                known += [f"loss.{field}" for field, value in self.loss if isinstance(value, float)]
                known += [f"{term.setting}.weight" for term in self._feature_terms]
                raise ValueError(f"training.schedules.{name}: no number that can change; those are {', '.join(known)}")
        for values, changed in self.extremes():
            try:
                Config.model_validate(changed)
            except ValidationError as error:
                reasons = "; ".join(explain(item, Config) for item in error.errors())
                described = ", ".join(f"{name} at {value:g}" for name, value in values.items())
                raise ValueError(f"training.schedules.{described}: {reasons}") from error

    def extremes(self) -> Iterator[tuple[dict[str, float], dict[str, Any]]]:
        """Every combination of the ends of scheduled settings: their values, and the config as a tree with these."""
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
        """The own value of a setting that a schedule may change; None where there is no such number."""
        section, _, leaf = name.partition(".")
        if section == "rollout" and leaf in SCHEDULED_SHARES:
            return float(getattr(self.rollout, leaf))
        if section == "training":
            return next((term.weight for term in self._feature_terms if name == f"{term.setting}.weight"), None)
        value = getattr(self.loss, leaf, None) if section == "loss" else None
        return value if isinstance(value, float) else None

    @property
    def _feature_terms(self) -> list[HiddenTerm | AttentionTerm | RelationTerm]:
        return [] if self.training.features is None else self.training.features.terms

    def _check_program(self) -> None:
        program = self.rollout.program
        if program is None:
            return
        setting = f"rollout.program.type={program.type}"
        if self.rollout.alpha < 1.0:
            raise ValueError(f"rollout.alpha={self.rollout.alpha:g} with {setting}: the teacher writes; set rollout.alpha=1")
        if not isinstance(self.loss, SequenceLoss):
            raise ValueError(
                f"loss.type={self.loss.type} with {setting}: a final answer has no log-probabilities; set loss.type=sequence"
            )
        recorded = [name for name, teacher in self.teachers.items() if isinstance(teacher, CaptureTeacherSettings)]
        if recorded:
            raise ValueError(
                f"teachers.{recorded[0]}.type=capture with {setting}: recorded answers cannot be asked anything new; remove "
                "rollout.program to train on them"
            )
        if isinstance(self.rollout.teachers, EnsembleSettings):
            raise ValueError(f"rollout.teachers.type=ensemble with {setting}: answers have no target to share; use type=route")
        if isinstance(program, RationaleProgram):
            if self.rollout.samples_per_prompt % 2:
                raise ValueError(
                    f"rollout.samples_per_prompt={self.rollout.samples_per_prompt} with {setting}: label and rationale rows "
                    "come in pairs; set rollout.samples_per_prompt=2"
                )
            filters = self.rollout.filters
            if filters is not None and (filters.agreement or filters.correct or filters.distinct or filters.pattern):
                raise ValueError(
                    f"rollout.filters with {setting}: a label and a rationale are never the same text; keep `finished` alone"
                )
            if program.rationale_prefix == self.data.prefix:
                raise ValueError(
                    f"rollout.program.rationale_prefix={program.rationale_prefix!r} is data.prefix too: the student could not "
                    "tell the rows apart; set data.prefix to another text, such as '[label] '"
                )

    def _check_teachers(self) -> None:
        names, sharing = ", ".join(self.teachers), self.rollout.teachers
        text = self.training.pretraining
        if text is not None and text.teacher_share and not self.served_teachers:
            raise ValueError(
                f"training.pretraining.teacher_share={text.teacher_share:g}: the text is scored by a teacher of type vllm, and "
                "there is none; set it to 0"
            )
        if sharing is None:
            if len(self.teachers) > 1:
                raise ValueError(
                    f"teachers names {names}: say who teaches what: set rollout.teachers.type to route or ensemble"
                )
            return
        unknown = sorted(sharing.names() - set(self.teachers))
        if unknown:
            raise ValueError(f"rollout.teachers names {', '.join(unknown)}, but the teachers are {names}")
        if isinstance(sharing, EnsembleSettings) and sharing.support == "sampler" and self.rollout.sampler == "student":
            raise ValueError(
                "rollout.teachers.support=sampler with rollout.sampler=student: no teacher samples, so none has a support to "
                "share; use rollout.teachers.support=union"
            )
        if self.rollout.teacher_signal == "hidden" and len(self.teachers) > 1:
            raise ValueError(
                f"rollout.teacher_signal=hidden with teachers {names}: the ranks hold one output head; use "
                "rollout.teacher_signal=support"
            )
        if text is not None and text.teacher_share and len(self.teachers) > 1:
            raise ValueError(
                f"training.pretraining.teacher_share={text.teacher_share:g} with teachers {names}: nothing says which of them "
                "scores the text; set it to 0"
            )

    def _check_features(self) -> None:
        described = ", ".join(f"{name} (type={teacher.type})" for name, teacher in self.teachers.items())
        if len(self.teachers) > 1 or self.white_box_teacher is None:
            raise ValueError(
                f"training.features with teachers {described}: the ranks load one teacher whose weights are at hand; keep one "
                "of type vllm or hf, or remove training.features"
            )
        if self.teacher_apart and not isinstance(self.loss, ULDLoss):
            raise ValueError(
                "training.features with prompt_template: layers are compared at the student's prompt, and the teacher reads "
                "another; remove one of them"
            )
        if isinstance(self.loss, ULDLoss):
            raise ValueError(
                "training.features with loss.type=uld: states are compared token by token, and the teacher's tokens are others"
                "; remove training.features"
            )

    @property
    def white_box_teacher(self) -> tuple[str, TeacherSettings | HFTeacherSettings] | None:
        """Name and settings of the first teacher whose weights are at hand."""
        for name, teacher in self.teachers.items():
            if isinstance(teacher, TeacherSettings | HFTeacherSettings):
                return name, teacher
        return None

    @property
    def served_teachers(self) -> dict[str, ServedTeacher]:
        """Teachers that replicas on the cluster serve."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, ServedTeacher)}

    @property
    def other_teachers(self) -> dict[str, OtherTeacherSettings]:
        """Teachers that are no pool of replicas."""
        return {name: teacher for name, teacher in self.teachers.items() if not isinstance(teacher, ServedTeacher)}

    @property
    def peers(self) -> dict[str, PeerTeacherSettings]:
        """Teachers that learn too."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, PeerTeacherSettings)}

    @property
    def teacher_apart(self) -> bool:
        """Whether the teacher reads something else than the student, so that no replica can hold both."""
        templates = any(teacher.prompt_template is not None for teacher in self.served_teachers.values())
        return templates or isinstance(self.loss, ULDLoss)

    def source(self, name: str) -> tuple[ModelSource, str | None]:
        """Model and revision of a served teacher; a self-teacher's are the student's."""
        teacher = self.served_teachers[name]
        owner = self.student if isinstance(teacher, SelfTeacherSettings) else teacher
        return owner.model, owner.revision

    @property
    def has_rollout_pool(self) -> bool:
        """Whether student-only replicas run: they sample, or measure a student whose teacher cannot hold it."""
        return self.rollout.sampler == "student" or bool(self.other_teachers)

    @property
    def run_folder(self) -> Path:
        return self.run.output / self.run.name

    @property
    def max_model_len(self) -> int:
        """Longest sequence that an engine must hold, in tokens."""
        text = self.training.pretraining
        window = text.window_tokens if text is not None and text.teacher_share else 0
        program = self.rollout.program
        stage = program.max_stage_tokens if program is not None else 0
        return max(self.data.max_prompt_tokens + self.rollout.max_new_tokens, window, stage)

    def dump(self) -> str:
        """The resolved config as YAML: every setting, defaults included; `load_config` reads it back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
