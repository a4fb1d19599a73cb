"""Parts of a run, as held by the driver: its pools, the actors that outlive them, and what concurrent runs share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.driver_actor import ActorWatch
from actors.serving.pool import ReplicaPool
from kdray.interfaces import Sampler, Scorer, Teacher
from kdray.runs.watchdog import Watchdog
from kdray.teachers.kind import LocalTeacher
from kdray.teachers.programs.sampler import ProgramSampler
from kdray.teachers.team import TeacherTeam


@dataclass(frozen=True)
class Pools:
    """Sampler and scorer of a run, and all pools that they use."""

    sampler: Sampler
    scorer: Scorer | None
    all: list[ReplicaPool]
    others: list[LocalTeacher]
    """Teachers that are not a pool of replicas."""
    team: TeacherTeam | None = None
    """The teachers combined, if there are several."""
    program: ProgramSampler | None = None
    """The System-2 program around the single teacher or the team, if any: it is then the sampler."""
    missing: list[int] = field(default_factory=list)
    """Samples that the trainer waits for."""

    @property
    def teachers(self) -> list[ReplicaPool]:
        """Teachers served by replicas."""
        return [pool for pool in self.all if pool.spec.role != "student"]

    @property
    def named(self) -> list[Teacher]:
        """Teachers of every kind."""
        return [*self.teachers, *self.others]

    @property
    def students(self) -> ReplicaPool | None:
        """The student-only replicas, if any."""
        return next((pool for pool in self.all if pool.spec.role == "student"), None)

    @property
    def retried(self) -> int:
        """Number of rollouts requested again after a failure."""
        return sum(pool.retried for pool in self.all) + sum(other.retried for other in self.others)

    @property
    def answered_at(self) -> float:
        """Time of the latest answer of any pool, by `time.monotonic`; 0 if there was none."""
        return max((pool.answered_at for pool in self.all), default=0.0)

    def tell(self, watchdog: Watchdog) -> None:
        """Let a watchdog see what these pools do: for commands that only ask them."""
        watchdog.advanced_at, watchdog.waits_for = (lambda: self.answered_at), self.waits_for

    def waits_for(self) -> list[str]:
        """Who has not answered yet, a line each."""
        return [*(line for pool in self.all for line in pool.waits_for()), *self._others_wait_for()]

    @property
    def hedged(self) -> int:
        """Number of rollouts also requested from a second replica."""
        return sum(pool.hedged for pool in self.all)

    def awaited(self, sample_ids: Sequence[int]) -> None:
        """Pass the samples that the trainer waits for to every pool."""
        self.missing[:] = sample_ids
        if self.program is not None:
            self.program.awaited(sample_ids)
            return
        for pool in self.all:
            pool.awaited(sample_ids)

    def _others_wait_for(self) -> list[str]:
        """Rollouts that are missing, in one line, if a teacher that is no pool may owe them."""
        if not self.others or not self.missing:
            return []
        names = ", ".join(other.name for other in self.others)
        return [f"{len(self.missing)} rollouts, of which {names} may have to answer some"]

    def metrics(self) -> dict[str, float]:
        shares = {pool.name: pool.take_teacher_share() for pool in self.teachers}
        return {
            "teacher_replicas": float(sum(pool.replicas_serving for pool in self.teachers)),
            "retried_samples": float(self.retried),
            "hedged_samples": float(self.hedged),
            **{f"teacher/{pool.name}/replicas": float(pool.replicas_serving) for pool in self.teachers},
            **{f"teacher/{pool.name}/wait_s": pool.take_waited_s() for pool in self.teachers},
            **{f"teacher/{name}/pass_share": share for name, share in shares.items() if share is not None},
            **(self.team.metrics() if self.team is not None else {}),
            **(self.program.metrics() if self.program is not None else {}),
        }


@dataclass(frozen=True)
class RunStores:
    """Actors of a run that outlive its replicas and ranks; the caller creates and ends them."""

    weights: Any
    """The WeightStore of the student."""
    board: Any
    """The ScalingBoard; None if no pool is autoscaled."""
    average: Any
    """The WeightStore of the student's average; None if the average is not a teacher."""
    teacher_weights: Mapping[str, Any]
    """The WeightStores of teachers that change during the run, by name."""


class ConcurrentRuns:
    """Shared state of concurrent runs that use one cluster and teach each other."""

    def __init__(self, runs: Sequence[str], silence_s: float = 300.0) -> None:
        """Args: silence_s: longest time without an answer of an actor that holds a run's state (`cluster.stuck_after_s`)."""
        self.actors = ActorWatch(silence_s)
        """The actors that hold the runs' state."""
        self._measured = {run: asyncio.Event() for run in runs}
        self._ended = {run: asyncio.Event() for run in runs}
        self._with_ranks: set[str] = set()
        self._waits: list[Callable[[], list[str]]] = []
        self._pools: list[Pools] = []

    def waits_for(self) -> list[str]:
        """Who is waited for in any of the runs, a line each."""
        return [line for each in self._waits for line in each()]

    @property
    def answered_at(self) -> float:
        """Time of the latest answer of any pool, by `time.monotonic`; 0 if there was none."""
        return max((pools.answered_at for pools in self._pools), default=0.0)

    def ranks_start(self, run: str, waits_for: Callable[[], list[str]], mailbox: Any = None) -> None:
        """Register that the run's ranks are placed or waiting for placement. Args: waits_for: what they have to do; mailbox:
        the actor that tells them, which is watched from now on."""
        self._with_ranks.add(run)
        if mailbox is not None:
            self.actors.add(_mailbox(run), mailbox)
        self._waits.append(waits_for)

    def pools_serve(self, pools: Pools) -> None:
        """Register pools of which answers are expected from now on."""
        self._pools.append(pools)
        self._waits.append(pools.waits_for)

    def ranks_close(self, run: str) -> None:
        """Register that the run's ranks and their mailbox are about to end."""
        self.actors.remove(_mailbox(run))

    def ranks_end(self, run: str) -> None:
        self._with_ranks.discard(run)

    @property
    def rank_groups(self) -> int:
        """Number of runs whose ranks are placed or waiting for placement."""
        return len(self._with_ranks)

    @property
    def alone(self) -> bool:
        """True if there is one run, whose student teaches nobody else."""
        return len(self._measured) == 1

    def measured(self, run: str) -> None:
        """Register that the run's student is trained, evaluated and exported."""
        self._measured[run].set()

    async def others_measured(self, run: str) -> None:
        await _others(self._measured, run)

    def ended(self, run: str) -> None:
        """Register that the run has its summary, and needs no teacher any more."""
        self._ended[run].set()

    async def others_ended(self, run: str) -> None:
        await _others(self._ended, run)


async def _others(events: Mapping[str, asyncio.Event], run: str) -> None:
    """Wait for the events of all runs but one."""
    for other, event in events.items():
        if other != run:
            await event.wait()


def _mailbox(run: str) -> str:
    return f"the mailbox of the ranks of {run}" if run else "the mailbox of the ranks"
