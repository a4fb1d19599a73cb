"""Pools of a run, as the driver holds them: its teachers of every kind, and its student-only replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.serving.pool import ReplicaPool
from kdray.interfaces import Sampler, Scorer, Teacher
from kdray.teachers.kind import LocalTeacher
from kdray.teachers.programs.sampler import ProgramSampler
from kdray.teachers.team import TeacherTeam


@dataclass(frozen=True)
class Pools:
    """The sampler and the scorer of a run, and all pools behind."""

    sampler: Sampler
    scorer: Scorer | None
    all: list[ReplicaPool]
    others: list[LocalTeacher]
    """Teachers that are no pool of replicas."""
    team: TeacherTeam | None = None
    """The teachers as one, where there are several."""
    program: ProgramSampler | None = None
    """The System-2 program around the one teacher or the team, where there is one: the sampler then."""

    @property
    def teachers(self) -> list[ReplicaPool]:
        """Teachers that replicas serve."""
        return [pool for pool in self.all if pool.spec.role != "student"]

    @property
    def named(self) -> list[Teacher]:
        """Teachers of every kind."""
        return [*self.teachers, *self.others]

    @property
    def students(self) -> ReplicaPool | None:
        """The student-only replicas, where there are some."""
        return next((pool for pool in self.all if pool.spec.role == "student"), None)

    @property
    def retried(self) -> int:
        """Rollouts asked for again after a failure."""
        return sum(pool.retried for pool in self.all) + sum(other.retried for other in self.others)

    @property
    def hedged(self) -> int:
        """Rollouts that a second replica was asked for too."""
        return sum(pool.hedged for pool in self.all)

    def awaited(self, sample_ids: Sequence[int]) -> None:
        """Tell every pool which samples the trainer waits for."""
        if self.program is not None:
            self.program.awaited(sample_ids)
            return
        for pool in self.all:
            pool.awaited(sample_ids)

    def metrics(self) -> dict[str, float]:
        return {
            "teacher_replicas": float(sum(pool.replicas_serving for pool in self.teachers)),
            "retried_samples": float(self.retried),
            "hedged_samples": float(self.hedged),
            **{f"teacher/{pool.name}/replicas": float(pool.replicas_serving) for pool in self.teachers},
            **{f"teacher/{pool.name}/wait_s": pool.take_waited_s() for pool in self.teachers},
            **(self.team.metrics() if self.team is not None else {}),
            **(self.program.metrics() if self.program is not None else {}),
        }
