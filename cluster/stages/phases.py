"""Phases of a run as the ranks know them: their weights, losses, and schedules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.student.trainer import Phase
from kdray.config import Config
from kdray.runs.context import Models
from kdray.teachers.kind import kind_of

Source = tuple[str, str | None]
"""Folder or hub id of a model, and its revision."""


@dataclass(frozen=True)
class Phases:
    """All phases of one run."""

    config: Config
    models: Models
    checkpoints: Path
    """Folder of the run in which a phase leaves the student for the next one."""
    horizon: int
    """Steps of distillation that its schedule is laid out for."""

    @property
    def _origin(self) -> Source:
        return self.models.student, self.config.student.revision

    @property
    def _warmed_up(self) -> Source:
        """The student that distillation and the control begin with."""
        return (str(self.checkpoints / "sft"), None) if self.config.training.sft.steps else self._origin

    @property
    def sft(self) -> Phase:
        settings = self.config.training.sft
        return Phase("sft", *self._origin, None, settings.learning_rate, settings.steps, base=self._origin)

    @property
    def distill(self) -> Phase:
        training = self.config.training
        model, revision = self._warmed_up
        return Phase(
            name="distill",
            model=model,
            revision=revision,
            loss=self.config.loss,
            learning_rate=training.learning_rate,
            steps=self.horizon * training.updates_per_step,
            warmup_steps=training.warmup_steps * training.updates_per_step,
            schedule=training.schedule,
            teacher=self._teacher_of_head,
            base=self._origin,
            feature_teacher=self._teacher_of_features,
        )

    @property
    def finetune(self) -> Phase:
        settings, schedule = self.config.training.finetune, self.config.training.schedule
        model, rate = str(self.checkpoints / "distilled"), settings.learning_rate
        return Phase("finetune", model, None, None, rate, settings.steps, schedule=schedule, base=self._origin)

    @property
    def last(self) -> Phase:
        """The phase whose student is the run's result."""
        return self.finetune if self.config.training.finetune.steps else self.distill

    def control(self, steps: int) -> Phase:
        """Phase of the control, whose learning rate decays like distillation's."""
        rate, schedule = self.config.training.sft.learning_rate, self.config.training.schedule
        return Phase("control", *self._warmed_up, None, rate, steps, schedule=schedule, base=self._origin)

    @property
    def _teacher_of_head(self) -> Source | None:
        """Model of the output head that the ranks need, if teachers return hidden states."""
        if self.config.rollout.teacher_signal != "hidden":
            return None
        (name,) = self.config.teachers
        found = kind_of(self.config, name).model
        assert found is not None
        return self.models.teachers[name], found[1]

    @property
    def _teacher_of_features(self) -> Source | None:
        """Teacher whose layers the student is compared with, if the config enables it."""
        if self.config.training.features is None or self.config.white_box_teacher is None:
            return None
        name, _ = self.config.white_box_teacher
        return self.models.teachers[name], self.config.source(name)[1]
