"""Runner of a run, from its first phase to its summary: supervised warm-up, distillation, fine-tuning, the control.

Only this module knows every part: it starts them, passes them to the loop, which knows none, and closes them in reverse order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.background_call import in_daemon_thread
from actors.driver_actor import on_driver_node
from actors.serving.registry import TeacherRegistry
from actors.serving.spec import RunHandles
from actors.student.group import StudentGroup
from actors.student.trainer import Phase
from cluster.assembly import open_pools, training_sources
from cluster.batch_hooks import batch_hooks
from cluster.checkpointing import Checkpoint, CheckpointedStudent, Numbering, Pace, Renewal
from cluster.engine_specs import student_ids
from cluster.evaluation import check_signals, measure_at_start, measure_student, teacher_facts
from cluster.parts import ConcurrentRuns, Pools, RunStores
from cluster.planning.placement import Bundle, bundles
from cluster.planning.reservation import await_placed, living_actors
from cluster.stages.phases import Phases
from cluster.stages.supervised import Answers, Steps
from kdray.checks.parity import refusal
from kdray.checks.unsafe_notes import unsafe_notes
from kdray.data.dataset import PromptStream
from kdray.errors import EngineError, Interrupted, KdrayError, TrainingError
from kdray.loop import Distillation, Hooks
from kdray.models.inspect import chat_template_text
from kdray.models.saving import TokenizerSource
from kdray.rollouts.draw import LoopSettings
from kdray.rollouts.pretraining import PretrainingText
from kdray.rollouts.race import Stopped, both, first_of
from kdray.rollouts.schedules import Schedules
from kdray.runs.checkpoints import COMMITTED
from kdray.runs.context import Checked, Models, RunContext, installed_versions
from kdray.runs.folder import RunFolder
from kdray.runs.lease import Lease
from kdray.runs.ledger import Ledger, Totals
from kdray.runs.remote_copy import LEDGER, StoredRun
from kdray.runs.reporter import RunReporter
from kdray.runs.results.comparison import compare
from kdray.runs.resume import carried_progress, final_counts, restore_run_state
from kdray.types import StepReport, TrainBatch

_CLEAN_UP_S = 30.0


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run that is about to start: its config, its files, and its starting point."""

    checked: Checked
    folder: RunFolder
    reporter: RunReporter
    checkpoint: Checkpoint | None
    """Checkpoint to resume from; None for a new run."""
    stored: StoredRun | None
    """The run in `run.storage`, if it has one."""
    lease: Lease
    """The driver's right to write to the run's files."""
    record: dict[str, Any]
    """Kept in every checkpoint: the run's `inputs` and `installation`, see `kdray.checks.inputs`."""
    on_start: Callable[[], None]
    """Called when the first replica or rank is about to start."""


class Runner:
    """A run from its first phase to its summary."""

    def __init__(self, name: str, plan: RunPlan, stores: RunStores, beside: ConcurrentRuns) -> None:
        """Args: name: among the concurrent runs."""
        self.reporter = plan.reporter
        self.stop = asyncio.Event()
        """Event that ends the run after a checkpoint."""
        self.hurry = asyncio.Event()
        """Event that ends evaluations beside steps: the machine is taken away soon."""
        self.pace = Pace()
        self._name = name
        self._checked = plan.checked
        self._config = plan.checked.config
        self._lease = plan.lease
        self._folder = RunFolder(plan.folder.path.absolute(), plan.lease.check)
        self._distilled = self._folder.checkpoints / "distilled"
        self._checkpoint = plan.checkpoint
        # Within the supervised phase nothing is there that a resume of the later ones needs.
        self._after_sft = None if plan.checkpoint is None or plan.checkpoint.stage == "sft" else plan.checkpoint
        self._answers = Answers(plan.checked)
        self._stored = plan.stored
        self._record = plan.record
        self._on_start = plan.on_start
        self._stores = stores
        self._beside = beside
        self._measure = partial(measure_student, self._checked, self.reporter)
        self._numbers = Numbering(self._config.training.steps, self._config.training.finetune.steps)
        self._storage_retries = 0
        if self._stored is not None:
            self._stored.storage.on_retry = lambda retry: self._on_event("storage_retry", **asdict(retry))
        self._ledger = Ledger(self._folder.path / LEDGER, plan.lease.check)
        self._totals = Totals()
        self._started = time.monotonic()

    async def run(self) -> dict[str, Any]:
        """Start the run's parts, run them, shut them down; returns the run's summary."""
        config, stores = self._config, self._stores
        step = None if self._checkpoint is None else self._checkpoint.step
        within = {} if self._checkpoint is None else self._checkpoint.within
        self.reporter.event("start", resumed_step=step, **within, **self._record["installation"])
        for kind, fields in self._checked.dataset.events():
            self.reporter.event(kind, **fields)
        for line in unsafe_notes(config):
            self.reporter.event("unsafe", found=line)
        for line in self._checked.notes:
            self.reporter.event("note", found=line)
        context: RunContext = await self._or_stop(self._with_models())
        self._on_start()
        student = StudentGroup(
            training=config.training,
            vocab_size=context.vocab_size,
            seed=config.run.seed,
            tokenizer=TokenizerSource(context.models.student, config.student.revision, chat_template_text(config)),
            weights=stores.weights,
            checkpoints=self._folder.checkpoints,
            storage=self._folder.path / "logs" / "ray_train",
            parity_ids=student_ids(context),
            average=stores.average,
            on_event=self._on_event,
            secrets=config.cluster.secret_files("ranks"),
            stored=None if self._stored is None else self._stored.storage.url,
            # Peers' too: their folders are within the one that has it.
            lease=self._lease.ticket,
        )
        await student.start()
        self._beside.ranks_start(self._name, student.waits_for, student.mailbox)
        try:
            registry = on_driver_node(TeacherRegistry).remote(self._folder.read_teachers())
            self._beside.actors.add(f"the registry of teachers of {config.run.name}", registry)
            handles = RunHandles(weights=stores.weights, registry=registry, board=stores.board)
            opening = open_pools(context, handles, self.reporter.event, stores.teacher_weights, logs=self._folder.logs)
            pools = await self._or_stop(opening.__aenter__())
            self._beside.pools_serve(pools)
            self._folder.write_teachers(await registry.known.remote())
            try:
                await self._or_stop(await_placed(partial(self._unplaced_ranks, student), config.cluster, self.reporter.event))
                summary = await self._watched(self._phases(context.models, student, pools))
            finally:
                self.reporter.say("closing: replicas and ranks end")
                await opening.__aexit__(None, None, None)
            await self._await_others()
            return summary
        finally:
            self._beside.ranks_close(self._name)
            await student.close()
            self._beside.ranks_end(self._name)

    async def _await_others(self) -> None:
        """Wait for the end of the runs beside this one, or for an interruption: the ranks own what they published, which
        replicas of the others that start now still have to load."""
        self._beside.ended(self._name)
        with suppress(Stopped):
            await first_of(self._beside.others_ended(self._name), self.stop.wait())

    async def _with_models(self) -> RunContext:
        """The context, with the models that have to be trained first; their progress is shown."""
        loop = asyncio.get_running_loop()

        def on_step(what: str, done: int, total: int) -> None:
            # The interpreter must not end while a thread computes in native code, which aborts the process.
            if self.stop.is_set():
                raise Stopped
            loop.call_soon_threadsafe(self.reporter.preparing, what, done, total)

        building = in_daemon_thread(self._checked.with_models, None, on_step)
        try:
            return await asyncio.shield(building)
        finally:
            await asyncio.wait({building})
            building.exception()

    async def _watched(self, phases: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        """Run the phases; end them after a checkpoint if a replica refuses weights of the student or of its teacher: raises
        TrainingError with the gap between the replica's log q and the trainer's."""
        refused: list[str] = []

        async def watch(weights: Any, model: str) -> None:
            verdict = await weights.refused.remote()
            refused.append(refusal(verdict, model))
            self.reporter.event("version_refused", **asdict(verdict))
            self.stop.set()

        stores = {str(self._config.student.model): self._stores.weights, "its teacher": self._stores.average}
        watching = asyncio.gather(*(watch(each, model) for model, each in stores.items() if each is not None))
        try:
            return await phases
        except KdrayError as error:
            if refused:
                raise TrainingError(f"{refused[0]}. {error}") from error
            raise
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def _unplaced_ranks(self, student: StudentGroup) -> list[Bundle]:
        """Ranks not yet placed on a node, as long as none of the student's has started; blocks."""
        if not student.awaits_ranks():
            return []
        # Those of concurrent runs are included: Ray does not tell whose they are.
        here = ray.get_runtime_context().get_job_id()
        placed = sum(actor["ActorClassName"] == "RayTrainWorker" and actor["JobID"] == here for actor in living_actors())
        (ranks,) = (bundle for bundle in bundles(self._config) if bundle.role == "student")
        lacking = ranks.count * self._beside.rank_groups - placed
        return [replace(ranks, count=lacking)] if lacking > 0 else []

    async def _phases(self, models: Models, student: StudentGroup, pools: Pools) -> dict[str, Any]:
        config = self._config
        training = config.training
        steps = training.steps
        found = self._checkpoint.progress if self._checkpoint else None
        stored = self._after_sft.progress if self._after_sft else None
        # A run that ends earlier, or later, than it was laid out for keeps its curves.
        horizon = steps if stored is None else int(stored["horizon"])
        schedules = Schedules.of(config, horizon)
        start_step, self._totals = restore_run_state(self._folder, self._ledger, schedules, steps, found)
        phases = Phases(config, models, self._folder.checkpoints, horizon)
        lengths = {"steps": steps, "sft_steps": training.sft.steps, "finetune_steps": training.finetune.steps}
        progress: dict[str, Any] = {"horizon": horizon, **lengths, "stage": "sft", **self._record}
        recoverable = CheckpointedStudent(
            student,
            self._folder,
            self._stored,
            training.keep_checkpoints,
            progress,
            live={"totals": lambda: asdict(self._totals), "schedules": schedules.state},
            renewal=self._renewal(),
            on_event=self.reporter.event,
            guard=self._lease.check_everywhere,
            pace=self.pace,
        )
        if training.sft.steps and self._after_sft is None:
            await self._warm_up(recoverable, phases.sft)
        progress |= {"stage": "distill"} if stored is None else carried_progress(stored)
        if progress["stage"] == "distill":
            await self._distill(student, pools, phases.distill, recoverable, schedules, start_step)
        if progress["stage"] == "control":
            after = progress["after"]
            if not self._beside.alone:
                await self._teach_again(student, phases.last)
        elif training.finetune.steps:
            after = await self._finetune(student, pools, recoverable, phases.finetune)
        else:
            after = progress["distilled"]
        if self._stored is not None:
            await in_daemon_thread(self._stored.storage.get_tree, "student", self._folder.student, COMMITTED)
        self._beside.measured(self._name)
        control = None
        if config.evaluation.control:
            # The control's published weights must not teach peers that are still training.
            await self._or_stop(self._beside.others_measured(self._name))
            progress |= {"stage": "control", "after": after}
            control = await self._control(pools, recoverable, phases)
        return self._summarise(progress, after, control, await student.restarts(), pools)

    async def _teach_again(self, student: StudentGroup, last: Phase) -> None:
        """Publish the run's result as before the control, from which it resumes: who learns from it may have to resume, too."""
        assert self._checkpoint is not None
        before = self._checkpoint.folder.with_name(f"step-{self._numbers.last_checkpoint:06d}")
        await self._or_stop(student.start_phase(last, before))
        await student.publish(self._numbers.last_version)

    async def _distill(
        self,
        student: StudentGroup,
        pools: Pools,
        phase: Phase,
        recoverable: CheckpointedStudent,
        schedules: Schedules,
        start_step: int,
    ) -> None:
        """Run the distillation phase; its measurements are stored in the progress of every checkpoint."""
        config, checked = self._config, self._checked
        training, steps, progress = config.training, config.training.steps, recoverable.progress
        checkpoint = self._after_sft
        await self._or_stop(student.start_phase(phase, checkpoint.folder if checkpoint else None))
        if self._stores.average is not None:
            # The average stored in a checkpoint is published unchanged.
            await student.renew(0, decay=0.0 if checkpoint is None else 1.0)
        await student.publish(start_step)
        await self._or_stop(self._check_parity(start_step))
        await self._or_stop(self._check_signals(pools, start_step))
        if checkpoint is None:
            progress |= await self._or_stop(measure_at_start(checked, self.reporter, pools)) | {"distilled": None}
            # From here on a resume repeats neither the supervised phase nor the first evaluation.
            await recoverable.save_checkpoint(0)
        sampler, scorer = training_sources(checked, pools)
        self.reporter.phase("distill", steps)
        await Distillation(
            settings=LoopSettings.of(config),
            prompts=PromptStream(checked.dataset.train, config.run.seed),
            sampler=sampler,
            scorer=scorer,
            student=recoverable,
            reporter=self.reporter,
            ledger=self._ledger,
            totals=self._totals,
            schedules=schedules,
            hooks=Hooks(
                evaluate=lambda done: self._measure(pools, done, None),
                pool_metrics=pools.metrics,
                text=self._text(pools),
                on_wait=pools.awaited,
                on_rollouts=self.reporter.heard,
                save_early=recoverable.should_save_early,
                **batch_hooks(checked),
            ),
            stop=self.stop,
            hurry=self.hurry,
            start_step=start_step,
        ).run()
        name, folder = ("distilled", self._distilled) if training.finetune.steps else ("after", self._folder.student)
        progress["distilled"] = await self._measure_and_export(student, pools, steps, name, folder)

    async def _measure_and_export(
        self, student: StudentGroup, pools: Pools, version: int, name: str, folder: Path
    ) -> dict[str, float]:
        """Evaluate a version, which takes the replicas, while the ranks write it as a model."""
        self._folder.guard()
        numbers, _ = await both(self._measure(pools, version, name), student.export(folder))
        return numbers

    def _renewal(self) -> Renewal | None:
        found = (teacher.renewal for teacher in self._config.teachers.values())
        return next((Renewal(*renewal) for renewal in found if renewal is not None), None)

    async def _finetune(
        self, student: StudentGroup, pools: Pools, recoverable: CheckpointedStudent, phase: Phase
    ) -> dict[str, float]:
        """Run the second stage, on the reference answers; a resume continues it from its last checkpoint."""
        training, number = self._config.training, self._numbers.finetune_checkpoint
        resumed = recoverable.progress["stage"] == "finetune"
        recoverable.progress["stage"] = "finetune"
        settings = training.finetune
        checkpoint = self._checkpoint if resumed else None
        await self._or_stop(student.start_phase(phase, checkpoint.folder if checkpoint else None))
        done = self._numbers.finetune_done(checkpoint.step) if checkpoint else 0
        if resumed and self._stores.average is not None:
            # Replicas that start later wait for their teacher.
            await student.renew(0, decay=1.0)
        if not resumed:
            # From here on a resume repeats no part of distillation.
            await recoverable.save_checkpoint(number(0))

        async def save(reached: int) -> None:
            await recoverable.save_checkpoint(number(reached))
            self.reporter.event("checkpoint", step=number(reached))

        def count(report: StepReport) -> None:
            self._totals.trained_tokens += report.num_target_tokens

        batches = self._answers.batches(training.sft.steps * training.sft.batch_size, settings.batch_size)
        steps = Steps("finetune", settings.steps, batches, save, training.checkpoint_every, count)
        await steps.run(recoverable, self.reporter, self.stop, done)
        await recoverable.save_checkpoint(number(settings.steps))
        version = self._numbers.finetuned_version
        await student.publish(version)
        return await self._measure_and_export(student, pools, version, "after", self._folder.student)

    async def _check_parity(self, version: int) -> None:
        """Wait until a replica has loaded the student and compared it with the trainer's. A refusal ends the run as in
        `_watched`.

        Raises: EngineError if no replica has within `training.stuck_after_s`.
        """
        route = self._checked.route
        if route.student_in_replicas or route.student_pool:
            limit = self._config.training.stuck_after_s
            try:
                verdict = await asyncio.wait_for(self._stores.weights.verdict.remote(version), limit)
            except TimeoutError as error:
                raise EngineError(
                    f"no replica has loaded student version {version} within training.stuck_after_s={limit:g}; the reason is "
                    f"in {self._folder.path / 'logs'} and in Ray's own logs of the replicas"
                ) from error
            self.reporter.event("parity", **asdict(verdict))

    async def _check_signals(self, pools: Pools, version: int) -> None:
        """Check every teacher's answers and the run's loss, on a few held-out prompts. Raises: SignalError."""
        for teacher in pools.named:
            found = await check_signals(self._checked, teacher, version)
            self.reporter.event("signals", teacher=teacher.name, **found)

    def _text(self, pools: Pools) -> Callable[[int], Awaitable[TrainBatch]] | None:
        """The pretraining text of a step, if the config mixes in any."""
        settings = self._config.training.pretraining
        if settings is None:
            return None
        scorer = pools.teachers[0] if settings.teacher_share else None
        return PretrainingText(self._checked.windows, settings, self._config.run.seed, scorer).batch

    async def _warm_up(self, recoverable: CheckpointedStudent, phase: Phase) -> None:
        """Run the supervised phase before distillation; a resume continues it from its last checkpoint."""
        training, sft, student = self._config.training, self._config.training.sft, recoverable.ranks
        await self._or_stop(student.start_phase(phase, self._checkpoint.folder if self._checkpoint else None))
        save = partial(recoverable.save_in_phase, "sft", step=0)
        steps = Steps("sft", sft.steps, self._answers.batches(0, sft.batch_size), save, training.checkpoint_every)
        await steps.run(recoverable, self.reporter, self.stop, self._checkpoint.phase_step if self._checkpoint else 0)
        await student.export(self._folder.checkpoints / "sft")

    async def _control(self, pools: Pools, recoverable: CheckpointedStudent, phases: Phases) -> dict[str, Any]:
        """Train the same student further by SFT alone, on at least as many student tokens as distillation used.

        A resume continues it from its last checkpoint.
        """
        training, sft, progress = self._config.training, self._config.training.sft, recoverable.progress
        student, resumed = recoverable.ranks, self._checkpoint if "control_tokens" in progress else None
        count = self._answers.steps_for(1.02 * self._totals.trained_tokens, sft.batch_size)
        progress.setdefault("control_tokens", 0)
        await self._or_stop(student.start_phase(phases.control(count), resumed.folder if resumed else None))
        if resumed and self._stores.average is not None:
            # Replicas answer once they have their teacher, which every checkpoint has kept as it was.
            await student.renew(0, decay=1.0)

        def add(report: StepReport) -> None:
            progress["control_tokens"] += report.num_target_tokens

        save = partial(recoverable.save_in_phase, "control", step=self._numbers.last_checkpoint)
        batches = self._answers.batches(sft.steps * sft.batch_size, sft.batch_size)
        steps = Steps("control", count, batches, save, training.checkpoint_every, add)
        await steps.run(recoverable, self.reporter, self.stop, resumed.phase_step if resumed else 0)
        version = self._numbers.control_version
        await student.publish(version)
        numbers = await self._or_stop(self._measure(pools, version, "control"))
        await recoverable.drop("control")
        return {**numbers, "method": "sft", "trained_tokens": progress["control_tokens"]}

    async def _or_stop(self, work: Awaitable[Any]) -> Any:
        """Return the result of `work`; cancel it and raise Interrupted if the user stops the run first: nothing to save yet."""
        try:
            # Its own clean-up comes first, but must not keep the run from ending.
            return await first_of(work, self.stop.wait(), clean_up_s=_CLEAN_UP_S)
        except Stopped:
            raise Interrupted("stopped before there was anything new to save; --resume goes on") from None

    def _on_event(self, kind: str, **fields: Any) -> None:
        self._storage_retries += kind == "storage_retry"
        self.reporter.event(kind, **fields)

    def _summarise(
        self, progress: dict[str, Any], after: dict[str, float], control: Any, restarts: int, pools: Pools
    ) -> dict[str, Any]:
        steps = self._config.training.steps
        summary = {
            **final_counts(self._ledger, self._totals, self._config),
            "wall_s": round(time.monotonic() - self._started, 3),
            "before": progress["before"],
            "program": progress["program"],
            "teacher": progress["teacher"],
            **({"distilled": progress["distilled"]} if self._config.training.finetune.steps else {}),
            "after": after,
            "control": control,
            "restarts": restarts,
            "retried_samples": pools.retried,
            "hedged_samples": pools.hedged,
            **({"storage_retries": self._storage_retries} if self._stored is not None else {}),
            "dropped_prompts": self._checked.dataset.dropped,
            "resumed_from_step": self._checkpoint.step if self._checkpoint else None,
            **installed_versions(self._config),
        }
        summary |= compare(self._folder, summary, self._config.evaluation.passes, teacher_facts(self._checked))
        self._folder.write_summary(summary)
        self.reporter.finish(summary)
        # After the summary: anything before it in the file is from a run that had not ended.
        self.reporter.event("finished", steps=steps)
        return summary
