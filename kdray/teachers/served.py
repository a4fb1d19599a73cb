"""Teachers in vLLM replicas: with their own weights, the student's earlier ones, or another student's."""

from __future__ import annotations

from typing import TypeVar

from kdray.config import PeerTeacherSettings, SelfTeacherSettings, ServedTeacherSettings
from kdray.config.signals import MEANING, Signal
from kdray.teachers.kind import ModelKind

Served = TypeVar("Served", bound=ServedTeacherSettings)


class ServedKind(ModelKind[Served]):
    """A teacher served by replicas."""

    def offers(self) -> frozenset[Signal]:
        every: frozenset[Signal] = frozenset(MEANING)
        if self.settings.scoring == "recorder":
            return every
        # vLLM's own prompt logprobs cover only the teacher's top ids, and under its newer model runner others too.
        return every - ({"hidden"} if self.settings.model_runner == "v2" else {"requested", "hidden"})

    @property
    def in_flight(self) -> int:
        engine = self.settings
        replicas = engine.replicas if engine.autoscaling is None else engine.autoscaling.max_replicas
        return replicas * engine.max_num_seqs


class SelfKind(ServedKind[SelfTeacherSettings]):
    """An earlier version of the student."""

    capturable = False

    def describe(self) -> str:
        every = self.settings.every
        return "the student itself" + (f", renewed every {every} steps" if every else " as distillation begins")


class PeerKind(ServedKind[PeerTeacherSettings]):
    """Another student of the same run."""

    capturable = False

    def describe(self) -> str:
        return f"{super().describe()}, a student too"
