"""The distillation loop: two coroutines around one buffer.

    prompts --admit--> sampler --rollouts--> (scorer) --scored--> RolloutBuffer --batch s--> student --version s + 1--+
                ^                                                                                                      |
                +---------------------------------- slots of the next batch <-----------------------------------------+

produce   consumes the sample ids that the buffer admits; produces their requests, each group passed to its own `_fill`;
          waits for a free slot and a version that may sample it, and continues when train publishes the next one.
_fill     consumes a group of requests; produces scored rollouts in the buffer; waits for the sampler, and for the scorer if
          there is one; continues with every answer, in whatever order they arrive.
train     consumes one complete batch per step; produces the student's next version and a line of ledger and metrics; waits
          for the slowest rollout of the batch, and continues when `_fill` adds it or `stop` is set; then waits for the ranks.

Only the admission of samples waits for train, so that step s + 1 is sampled while step s is trained, as far as `max_staleness`
allows. `stop` ends train's wait for a batch, or takes effect after the running step: a checkpoint is written in both cases. The
first coroutine that fails cancels the others, and only its error is raised from `run`.

Two things run beside the next step. An evaluation of version s: train holds version s + 1 back until it has ended, so that no
replica that answers it can have newer weights, and the line of step s is written with its numbers. A checkpoint of step s:
the student sets its state aside, and the files become a checkpoint later, once that line is written; until then the one
before counts.

The loop receives all collaborators and imports no Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from kdray.data.dataset import PromptStream
from kdray.errors import Interrupted, TrainingError, first_reason
from kdray.interfaces import OpenCheckpoint, Reporter, Sampler, Scorer, Student
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.buffer import ReadyBatch, RolloutBuffer
from kdray.rollouts.draw import LoopSettings, draw_scored, sample_request
from kdray.rollouts.race import Stopped, first_of
from kdray.rollouts.rewards import Rewards
from kdray.rollouts.schedules import Schedules
from kdray.runs.ledger import NOT_FINITE, Ledger, Totals, ledger_line, sample_outcomes
from kdray.runs.metrics import batch_metrics, filter_metrics
from kdray.runs.training_record import differences, training_columns
from kdray.types import Early, Rollout, SampleRequest, StepReport, TrainBatch

RATE_STEPS = 10
"""Steps that `tokens_per_s` is taken over: with stale samples, steps that wait take turns with steps that do not."""
SKIP_WINDOW = 100
"""Steps in which at most `training.max_skipped` batches are left out."""


EARLY_S = 5.0
"""Time between two questions after such a checkpoint while training waits for rollouts."""


async def _never() -> Early | None:
    return None


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop; each defaults to a no-op."""

    evaluate: Callable[[int], Awaitable[dict[str, float]]] | None = None
    """Called with a version after every `evaluate_every` steps, beside the next step; its numbers are added to the metrics of
    its own step. No newer version is published before it returns."""
    pool_metrics: Callable[[], dict[str, float]] = dict
    """Returns numbers of the pools for a step's metrics."""
    text: Callable[[int], Awaitable[TrainBatch]] | None = None
    """Returns the pretraining text of an optimizer step, counted from 1; requested concurrently with the step's rollouts."""
    on_wait: Callable[[Sequence[int]], None] = lambda missing: None
    """Called with the sample ids that training starts to wait for, and with none when the wait ends."""
    on_rollouts: Callable[[], None] = lambda: None
    """Called whenever a teacher, or the student, has answered: a sign of life, also where no step ends for long."""
    filters: Callable[[Sequence[Rollout]], dict[int, str]] = lambda rollouts: {}
    """Returns the rule by which each rollout of a batch is excluded from training, by sample id."""
    rewards: Callable[[Sequence[Rollout]], Rewards | None] = lambda rollouts: None
    """Returns the rewards of a batch; None without a reward."""
    weights: Callable[[Sequence[Rollout]], dict[int, float] | None] = lambda rollouts: None
    """Returns the loss weights of the rollouts of a batch, by sample id; None if all have equal weight."""
    save_early: Callable[[], Awaitable[Early | None]] = _never
    """Says whether a checkpoint is to be written though none is due: after a step, and while training waits for rollouts."""


@dataclass
class Distillation:
    """Steps [start_step, settings.steps) of a run. Version `start_step` of the student is already published."""

    settings: LoopSettings
    prompts: PromptStream
    sampler: Sampler
    scorer: Scorer | None
    """Scores what the sampler did not; None if the sampler's rollouts are already scored."""
    student: Student
    reporter: Reporter
    ledger: Ledger
    totals: Totals = field(default_factory=Totals)
    schedules: Schedules | None = None
    """Values of settings that change from step to step; None if none does."""
    hooks: Hooks = Hooks()
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Event that ends the run after the running step; a checkpoint is written."""
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    """Event that ends evaluations, whose numbers are then missing: a checkpoint must not wait for them."""
    start_step: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        self._buffer = RolloutBuffer(settings.batch_size, settings.max_staleness, settings.steps, self.start_step)
        self._schedules = self.schedules or Schedules({}, {}, settings.steps, settings.max_staleness)
        self._producer: asyncio.Task[None] | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS)
        """Tokens and seconds of the latest steps."""
        self._saved = self.start_step
        """Step of the newest checkpoint."""
        self._early: Early | None = None
        """Wish for a checkpoint that has not come since."""
        self._saving_s = 0.0
        """Seconds that train waited for checkpoints since the latest step."""
        self._evaluating: asyncio.Task[None] | None = None
        """The latest evaluation beside a step."""
        self._committing: asyncio.Task[None] | None = None
        """The latest checkpoint that was completed beside a step. Not cancelled with the others: its state is good."""
        self._files_kept = asyncio.Event()
        """Cleared while a checkpoint needs the files of the run as they are."""
        self._files_kept.set()
        self._left_out = self.ledger.not_finite_steps()
        """Steps whose batch the ranks left out, those before a resume included."""

    async def run(self) -> None:
        """Produce and train until the last step is done, or `stop` is set.

        Raises: Interrupted after `stop`; if a part failed, its exception alone.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._producer = self._tasks.create_task(self.produce(), name="produce")
                self._tasks.create_task(self.train(), name="train")
        except BaseExceptionGroup as group:
            if self._committing is not None:
                # What was trained before the failure is not lost with it. If this fails, too, the failure is its reason.
                await asyncio.wait({self._committing})
            # A user can act on one reason: the first failure; the others are its consequences.
            raise first_reason(group) from group
        finally:
            if self._committing is not None:
                self._committing.cancel()

    # ---------------------------------------------------------------------------------------------------- rollouts

    async def produce(self) -> None:
        """Request every sample as soon as it is admitted."""
        settings, buffer = self.settings, self._buffer
        async with asyncio.TaskGroup() as calls:
            while admitted := await buffer.admit():
                requests = [
                    sample_request(
                        settings,
                        self.prompts,
                        each,
                        buffer.min_version(each),
                        self._schedules.at(each // settings.batch_size),
                    )
                    for each in admitted
                ]
                calls.create_task(self._fill(requests))

    async def _fill(self, requests: Sequence[SampleRequest]) -> None:
        """Sample the requests into the buffer, scoring each group as soon as it finishes."""
        drawn = draw_scored(self.sampler, self.scorer, requests, on_sampled=self._buffer.sampled)
        async with aclosing(drawn) as stream:
            async for rollouts in stream:
                self.hooks.on_rollouts()
                tokens = sum(rollout.num_targets for rollout in rollouts)
                self.totals.tokens_generated += tokens
                self.totals.tokens_scored += tokens
                await self._buffer.put(rollouts)

    # ---------------------------------------------------------------------------------------------------- training

    async def train(self) -> None:
        """Train batch after batch, each as soon as its last rollout has arrived."""
        settings = self.settings
        for step in range(self.start_step, settings.steps):
            started = time.perf_counter()
            try:
                ready, text = await self._awaited_inputs(step)
            except Stopped:
                await self._interrupt(step)
            report, metrics = await self._step(step, started, ready, text)
            done = step + 1
            tell = partial(self._tell, report, metrics)
            if self.hooks.evaluate is not None and settings.evaluate_every and done % settings.evaluate_every == 0:
                self._evaluating = self._tasks.create_task(self._evaluate(self.hooks.evaluate, done, tell), name="evaluate")
            else:
                tell({})
            self.reporter.samples(ready.rollouts, done)
            due = settings.checkpoint_every and done % settings.checkpoint_every == 0
            if done < settings.steps and due:
                await self._open_checkpoint(done)
            elif done < settings.steps:
                # Training may not go on before the disk has room.
                await self._save_early(done)
            if self.stop.is_set() and done < settings.steps:
                await self._interrupt(done)
        await self._evaluated()
        await self._committed()
        if self._saved < settings.steps:
            await self._save(settings.steps)

    def _tell(self, report: StepReport, metrics: Mapping[str, Any], heldout: Mapping[str, float]) -> None:
        """Write a step's line. Args: heldout: numbers of its version's evaluation, if there was one."""
        self.reporter.step(report, {**metrics, **{f"heldout/{name}": value for name, value in heldout.items()}})

    async def _evaluate(
        self,
        measure: Callable[[int], Awaitable[dict[str, float]]],
        version: int,
        tell: Callable[[Mapping[str, float]], None],
    ) -> None:
        try:
            found = await first_of(measure(version), self.hurry.wait())
        except Stopped:
            self.reporter.event("evaluation_cut", step=version)
            found = {}
        tell(found)

    async def _evaluated(self) -> None:
        """Wait for an evaluation that runs beside a step; it is cut if a checkpoint is needed at once."""
        running = self._evaluating
        if running is None:
            return
        while not running.done() and self._early is None and not self.hurry.is_set():
            await asyncio.wait({running}, timeout=EARLY_S)
            if not running.done():
                await self._is_needed_early()
        await running

    async def _awaited_inputs(self, step: int) -> tuple[ReadyBatch, TrainBatch | None]:
        """The inputs of a step; checkpoints that are needed early are written meanwhile. Raises: Stopped."""
        inputs, stopping = asyncio.ensure_future(self._inputs(step)), asyncio.ensure_future(self.stop.wait())
        try:
            while not inputs.done():
                await asyncio.wait({inputs, stopping}, timeout=EARLY_S, return_when=asyncio.FIRST_COMPLETED)
                if inputs.done():
                    break
                if stopping.done():
                    raise Stopped
                if step > self._saved:
                    await self._save_early(step)
            return inputs.result()
        finally:
            inputs.cancel()
            stopping.cancel()

    async def _save_early(self, step: int) -> None:
        """Write a checkpoint if one is needed though none is due."""
        if await self._is_needed_early():
            # The step's own may be about to be completed.
            await self._evaluated()
            await self._committed()
            if step > self._saved:
                await self._save(step)

    async def _is_needed_early(self) -> bool:
        """True if a checkpoint is needed; the hook tells every notice once, and it holds until there is a newer checkpoint."""
        if self._early is None:
            self._early = await self.hooks.save_early()
            if self._early == "now":
                self.hurry.set()
        return self._early is not None

    async def _inputs(self, step: int) -> tuple[ReadyBatch, TrainBatch | None]:
        """The rollouts and the pretraining text of a step, produced concurrently."""
        text = None if self.hooks.text is None else asyncio.ensure_future(self.hooks.text(step + 1))
        try:
            return await self._buffer.batch(step, self.hooks.on_wait), None if text is None else await text
        finally:
            if text is not None:
                text.cancel()

    async def _step(
        self, step: int, started: float, ready: ReadyBatch, text: TrainBatch | None
    ) -> tuple[StepReport, dict[str, Any]]:
        """Train one batch, publish the resulting version, and record it; returns the ranks' report and the step's metrics.

        Args: started: start of the wait for the batch.
        """
        rollouts, done = ready.rollouts, step + 1
        dropped, values = self.hooks.filters(rollouts), self._schedules.at(step)
        rewards = self.hooks.rewards(rollouts)
        advantages = None if rewards is None else rewards.advantages
        batch = rollouts_to_batch(rollouts, done, dropped, self.hooks.weights(rollouts), advantages)
        try:
            report = await self.student.train_step(batch, text, values)
        except TrainingError:
            # The step before is whole, and so is its checkpoint once its line is written.
            await self._evaluated()
            raise
        trained = time.perf_counter()
        # Replicas load a version as soon as there is one: those that are still asked for the one before must not see it.
        await self._evaluated()
        evaluated = time.perf_counter()
        ids = [rollout.sample_id for rollout in rollouts]
        if report.left_out:
            self._leave_out(done, report.left_out)
            dropped = dict.fromkeys(ids, NOT_FINITE)
        facts = {
            **sample_outcomes(rollouts),
            "trained_tokens": report.num_target_tokens,
            **training_columns(batch, report.shards),
        }
        wrong = self._difference(ledger_line(done, ids, dropped, facts), report)
        if wrong is not None:
            # With the line, `kdray verify` says the same.
            self.ledger.append(done, ids, dropped, facts)
            raise wrong
        measured = batch_metrics(rollouts, trained_version=step)
        # Before anything is admitted that depends on this step's signals.
        self._schedules.observe(done, measured)
        await self.student.publish(done)
        await self._buffer.published(done)
        now = time.perf_counter()
        # A checkpoint of the step before is about to be what the files say up to there.
        await self._files_kept.wait()
        self._saving_s += time.perf_counter() - now
        saving_s, self._saving_s = self._saving_s, 0.0
        self._recent.append((report.num_target_tokens, now - started))
        self.ledger.append(done, ids, dropped, facts)
        self.totals.prompts_consumed += len(rollouts) // self.settings.samples_per_prompt
        self.totals.trained_tokens += report.num_target_tokens
        return report, {
            **measured,
            **filter_metrics(dropped, len(rollouts)),
            **({} if rewards is None else rewards.metrics()),
            **{f"schedule/{name}": value for name, value in values.items()},
            "tokens_per_s": sum(tokens for tokens, _ in self._recent) / sum(seconds for _, seconds in self._recent),
            "wait_rollout_s": ready.wait_rollout_s,
            "wait_teacher_s": ready.wait_teacher_s,
            "wait_sync_s": now - evaluated,
            "wait_evaluation_s": evaluated - trained,
            "wait_checkpoint_s": saving_s,
            "queue_age_s": ready.queue_age_s,
            **self.hooks.pool_metrics(),
        }

    def _leave_out(self, step: int, reason: str) -> None:
        """Count a batch that the ranks left out. Raises: TrainingError if there were too many of late."""
        most = self.settings.max_skipped
        recent = [left_out for left_out in self._left_out if left_out > step - SKIP_WINDOW]
        if len(recent) >= most:
            raise TrainingError(
                f"{reason}. training.on_not_finite=skip left out {len(recent)} batches of the last {SKIP_WINDOW} steps already "
                f"(steps {', '.join(map(str, recent))}), which is training.max_skipped={most}: lower training.learning_rate or "
                "training.gradient_clipping, and continue with --resume"
            )
        self._left_out.append(step)
        self.reporter.event("batch_left_out", step=step, rule=NOT_FINITE, reason=reason)

    def _difference(self, line: Mapping[str, Any], report: StepReport) -> TrainingError | None:
        """Compare what the ranks trained with what they were given, before any replica gets their weights.

        Returns: an error that names step and ranks; None if they agree, or the student keeps no record.
        """
        settings, step = self.settings, report.step
        if not report.shards:
            return None
        passes = 0 if report.left_out else settings.inner_epochs
        updates = (step - len(self._left_out)) * settings.updates_per_step
        found = differences(line, settings.batch_size, passes, updates)
        if not found:
            return None
        return TrainingError(
            f"step {step}: {'; '.join(found)}. These are not the weights of this run: continue from the last checkpoint with "
            "--resume, and report it with the run folder if it happens again"
        )

    async def _save(self, step: int) -> None:
        """Write a checkpoint and wait for it, after everything that runs beside a step."""
        await self._evaluated()
        started = time.perf_counter()
        await self._committed()
        await self.student.save_checkpoint(step)
        self._saving_s += time.perf_counter() - started
        self._note_saved(step)

    async def _open_checkpoint(self, step: int) -> None:
        """Have the student set its state aside; it becomes a checkpoint beside the next step."""
        started = time.perf_counter()
        await self._committed()
        opened = await self.student.open_checkpoint(step)
        self._saving_s += time.perf_counter() - started
        self._files_kept.clear()
        self._committing = asyncio.create_task(self._commit(step, opened, self._evaluating), name="commit")
        self._tasks.create_task(self._committed(), name="committed")

    async def _commit(self, step: int, opened: OpenCheckpoint, evaluating: asyncio.Task[None] | None) -> None:
        """Complete a checkpoint, unless the evaluation of its step fails: its line is then missing."""
        if evaluating is not None:
            await asyncio.wait({evaluating})
            if evaluating.cancelled() or evaluating.exception() is not None:
                return
        await opened.keep_files()
        self._files_kept.set()
        await opened.commit()
        self._note_saved(step)

    async def _committed(self) -> None:
        """Wait for a checkpoint that is completed beside a step; whoever waits may be cancelled, and it goes on."""
        if self._committing is not None:
            await asyncio.shield(self._committing)

    def _note_saved(self, step: int) -> None:
        self._saved, self._early = step, None
        if not self.stop.is_set():
            self.hurry.clear()
        self.reporter.event("checkpoint", step=step)

    async def _interrupt(self, step: int) -> NoReturn:
        """Write a checkpoint, unless this step already has one, and end; samples in flight are drawn again after a resume."""
        if self._producer is not None:
            self._producer.cancel()
        await self._evaluated()
        await self._committed()
        if step > self._saved or step == 0:
            await self._save(step)
        self.reporter.event("interrupted", step=step)
        raise Interrupted(f"stopped at step {step} after writing a checkpoint; continue with --resume")
