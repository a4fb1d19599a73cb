"""The true runner of a run, all its phases and evaluations included, over the models of `tests.support.stub_run`: no Ray."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from cluster.checkpointing import Checkpoint
from cluster.evaluation import held_out
from cluster.parts import ConcurrentRuns, Pools, RunStores
from cluster.runner import Runner, RunPlan
from kdray.config import Config
from kdray.config.route import Route
from kdray.data.dataset import load_dataset
from kdray.interfaces import Availability
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.race import once
from kdray.runs.checkpoints import newest_checkpoint
from kdray.runs.context import Checked, Models
from kdray.runs.folder import RunFolder
from kdray.runs.lease import Lease, leased
from kdray.runs.reporter import RunReporter
from kdray.runs.storage import Storage
from kdray.types import Rollout, SampleRequest, StepReport, TrainBatch
from tests.support.stub_run import EOS, StubSampler, StubStudent, Tables, log_softmax


class StubPool(StubSampler):
    """A teacher's replicas, which hold the student, too."""

    spec = SimpleNamespace(role="teacher")
    replicas_serving, retried, hedged = 1, 0, 0

    def __init__(self, tables: Tables, name: str = "toy", peer: StubRun | None = None) -> None:
        """Args: peer: the run whose student is the teacher."""
        # Evaluations of the student take longer than a step: what runs beside them could meet them.
        super().__init__(tables, lambda request: 0.01 if request.alpha == 0.0 else 0.0)
        self.name = name
        self.availability = Availability()
        self.asked: list[SampleRequest] = []
        self._peer = peer

    async def _one(self, request: SampleRequest) -> Rollout:
        await asyncio.sleep(self._delay_s(request))
        version = max(self._tables.published)
        if self._peer is not None:
            self._tables.teacher = await self._peer.taught(version)
        # As replicas do whose teacher is not published.
        await once(lambda: self._tables.teacher is not None, 0.005)
        return self._tables.draw(request, version)

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        self.asked.extend(requests)
        async for part in super().sample(requests):
            yield part

    def awaited(self, sample_ids: Sequence[int]) -> None:
        pass

    def take_teacher_share(self) -> float | None:
        return 1.0

    def take_waited_s(self) -> float:
        return 0.0


class StubGroup(StubStudent):
    """The ranks, as the runner commands them."""

    on_step: Callable[[int], None] = staticmethod(lambda step: None)

    phase = ""
    answers: Any = None

    async def publish(self, version: int) -> None:
        await super().publish(version)
        self.history[version] = self._tables.student

    @property
    def history(self) -> dict[int, Any]:
        """Weights of every version that was published."""
        return self.__dict__.setdefault("_history", {})

    async def start_phase(self, phase: Any, checkpoint: Path | None = None) -> None:
        self.phase = phase.name
        if phase.loss is not None:
            self._tables.average = None
        for rank in self.ranks:
            rank.updates = 0
        if checkpoint is not None:
            self.restore(checkpoint)

    async def train_step(self, batch: TrainBatch, *others: Any, **named: Any) -> StepReport:
        self.on_step(batch.step)
        self.trained.append((self.phase, batch.step))
        teacher = self._tables.teacher
        if self.phase != "distill":
            # The reference answers stand for a teacher of their own, whoever teaches otherwise.
            self._tables.teacher = self.answers
        report = await super().train_step(batch)
        self._tables.teacher = teacher
        return report

    async def renew(self, version: int, decay: float) -> None:
        """Move the average of the weights, and publish it as the teacher."""
        tables = self._tables
        kept = tables.student if tables.average is None else tables.average
        tables.average = decay * kept + (1.0 - decay) * tables.student
        tables.teacher = log_softmax(tables.average)

    async def save_checkpoint(self, step: int, progress: dict[str, Any] | None = None, name: str | None = None) -> Any:
        self._take(progress or {})
        await super().save_checkpoint(step, name)
        return SimpleNamespace(retries=[], bytes=0, write_s=0.0, store_s=0.0)

    async def open_checkpoint(self, step: int, progress: dict[str, Any] | None = None) -> Any:
        self._take(progress or {})
        self.opened = await super().open_checkpoint(step)
        return self.opened

    def _take(self, progress: dict[str, Any]) -> None:
        self.live = {name: lambda value=value: value for name, value in progress.items()}

    async def commit_checkpoint(self) -> Any:
        await self.opened.commit()
        return SimpleNamespace(retries=[], bytes=0, write_s=0.0, store_s=0.0)

    @property
    def trained(self) -> list[tuple[str, int]]:
        """Steps made, by phase."""
        return self.__dict__.setdefault("_trained", [])

    async def export(self, folder: Path) -> None:
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)

    async def restarts(self) -> int:
        return 0

    async def holds_too_much(self) -> bool:
        return False

    async def leaving(self) -> list[int]:
        return []


@dataclass(frozen=True)
class Verdict:
    """Agreement of a replica with the ranks."""

    gap: float = 0.0


@dataclass
class StubRun:
    """One start of a run; `resume` continues what an earlier one left in the folder."""

    config: Config
    resume: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    """Among the concurrent runs."""
    beside: ConcurrentRuns = field(default_factory=lambda: ConcurrentRuns([""]))
    peer: StubRun | None = None
    """The run whose student is the teacher."""
    group: StubGroup = field(init=False)

    async def taught(self, version: int) -> Any:
        """The student as another run's teacher: version for version, as long as it is trained, and then the last."""
        wanted = min(version, self.config.training.steps)
        await once(lambda: hasattr(self, "group") and wanted in self.group.history, 0.005)
        return log_softmax(self.group.history[wanted])

    async def __call__(self, stop_at: int | None = None, phase: str | None = None) -> StubRun:
        """Run it to its end. Args: stop_at: step in which the user interrupts the run, in this phase or any."""
        with leased(self.config, None) as lease:
            return await self._run(stop_at, phase, lease)

    async def _run(self, stop_at: int | None, phase: str | None, lease: Lease) -> StubRun:
        config, tokenizer = self.config, task_tokenizer()
        found = newest_checkpoint([Storage.local(config.run_folder)])[0] if self.resume else None
        folder = RunFolder.create(config, self.resume, found.step if found else 0, lease.check)
        checkpoint = None if found is None else Checkpoint(folder.path / found.key, found.progress)
        reporter = RunReporter(folder, config.training.steps, Console(file=io.StringIO()), decode=tokenizer.decode)
        dataset = load_dataset(config, tokenizer)
        reporter.references = dataset.answers
        checked = Checked(config, tokenizer, dataset, len(tokenizer), (EOS,), Route.of(config))
        tables = Tables(config.run.seed + len(self.name), len(tokenizer))
        self.pool = StubPool(tables, next(iter(config.teachers)), self.peer)
        group = self.group = StubGroup(tables, folder, config, lambda: None)
        group.answers = tables.teacher
        follows = any(teacher.follows_student for teacher in config.teachers.values())
        if follows or self.peer is not None:
            # Nobody teaches before something was published.
            tables.teacher = None
        average = object() if follows else None
        stores: Any = RunStores(SimpleNamespace(verdict=SimpleNamespace(remote=_verdict)), None, average, {})
        record: dict[str, Any] = {"inputs": {"tokenizer": {"vocabulary": "abc"}}, "installation": {"host": "here"}}
        plan = RunPlan(checked, folder, reporter, checkpoint, None, lease, record, on_start=lambda: None)
        runner = Runner(self.name, plan, stores, self.beside)

        def on_step(step: int) -> None:
            if step == stop_at and phase in (None, group.phase):
                runner.stop.set()

        group.on_step = on_step
        self.checked = checked
        pools = self._pools(self.pool)
        try:
            self.summary = await runner._phases(Models("student", {"toy": "teacher"}), group, pools)  # type: ignore[arg-type]
        finally:
            reporter.close()
        return self

    @staticmethod
    def _pools(pool: Any) -> Pools:
        return Pools(sampler=pool, scorer=None, all=[pool], others=[])

    async def alone(self, version: int) -> dict[str, float]:
        """Numbers of a version that was published, measured again while nothing else happens."""
        tables = Tables(self.config.run.seed, self.checked.vocab_size)
        tables.published = {version: self.group.history[version]}
        return (await held_out(self.checked, self._pools(StubPool(tables))).measure(version)).numbers


async def _verdict(version: int) -> Verdict:
    await asyncio.sleep(0)
    return Verdict()
