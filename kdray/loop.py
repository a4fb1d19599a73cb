"""The distillation loop.

    prompts --admit--> sampler --rollouts--> (scorer) --scored--> RolloutBuffer --batch s--> student --version s + 1--+
                ^                                                                                                      |
                +---------------------------------- slots of the next batch <-----------------------------------------+

produce   consumes admitted sample ids, makes rollouts in the buffer; waits for published versions; never for the trainer
          itself, so that sampling step s + 1 overlaps training step s when max_staleness allows.
train     consumes one complete batch a step, makes the next student version; waits for the batch's slowest rollout.

The first task that fails cancels the others, and its error rises out of `distill`. The loop is given every collaborator and
imports no Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from kdray.data.dataset import PromptStream
from kdray.errors import Interrupted, first_reason
from kdray.interfaces import Reporter, Sampler, Scorer, StudentGroup
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.buffer import ReadyBatch, RolloutBuffer
from kdray.rollouts.draw import LoopSettings, draw_scored, sample_request
from kdray.rollouts.schedules import Schedules
from kdray.runs.ledger import Ledger, Totals, fates
from kdray.runs.metrics import batch_metrics, filter_metrics
from kdray.types import Rollout, SampleRequest, TrainBatch


async def distill(
    settings: LoopSettings,
    prompts: PromptStream,
    sampler: Sampler,
    scorer: Scorer | None,
    student: StudentGroup,
    reporter: Reporter,
    ledger: Ledger,
    totals: Totals,
    stop: asyncio.Event,
    start_step: int = 0,
    evaluate: Callable[[int], Awaitable[dict[str, float]]] | None = None,
    pool_metrics: Callable[[], dict[str, float]] = dict,
    text: Callable[[int], Awaitable[TrainBatch]] | None = None,
    on_wait: Callable[[Sequence[int]], None] = lambda missing: None,
    schedules: Schedules | None = None,
    filters: Callable[[Sequence[Rollout]], dict[int, str]] = lambda rollouts: {},
    weights: Callable[[Sequence[Rollout]], dict[int, float] | None] = lambda rollouts: None,
) -> None:
    """Run steps [start_step, settings.steps). Version `start_step` of the student is published already.

    Args: scorer: scores what the sampler did not; None where the sampler's rollouts come back scored.
          stop: set to end after the running step; a checkpoint is written.
          text: gives the pretraining text of an optimizer step, counted from 1; asked for beside the rollouts of that step.
          evaluate: called with a version after every `evaluate_every` steps; its numbers join the step's metrics.
          on_wait: called with the sample ids that training begins to wait for, and with none when the wait ends.
          schedules: values of settings that change from step to step.
          filters: gives the rule by which each rollout of a batch is left out of training, by sample id.
          weights: gives the weights of the rollouts of a batch in the loss, by sample id; None where all count alike.
    Raises: Interrupted after `stop`; what any part raised, alone, if one part failed.
    """
    buffer = RolloutBuffer(settings.batch_size, settings.max_staleness, settings.steps, start_step)
    schedules = schedules or Schedules({}, {}, settings.steps, settings.max_staleness)
    try:
        async with asyncio.TaskGroup() as tasks:
            producer = tasks.create_task(
                _produce(settings, buffer, prompts, sampler, scorer, totals, schedules), name="produce"
            )
            tasks.create_task(
                _train(
                    settings,
                    buffer,
                    student,
                    reporter,
                    ledger,
                    totals,
                    stop,
                    start_step,
                    evaluate,
                    pool_metrics,
                    text,
                    on_wait,
                    schedules,
                    filters,
                    weights,
                    producer,
                ),
                name="train",
            )
    except BaseExceptionGroup as group:
        # One reason is what a user can act on: the first failure; the others are its consequences.
        raise first_reason(group) from group


async def _produce(
    settings: LoopSettings,
    buffer: RolloutBuffer,
    prompts: PromptStream,
    sampler: Sampler,
    scorer: Scorer | None,
    totals: Totals,
    schedules: Schedules,
) -> None:
    async with asyncio.TaskGroup() as calls:
        while admitted := await buffer.admit():
            requests = [
                sample_request(settings, prompts, each, buffer.min_version(each), schedules.at(each // settings.batch_size))
                for each in admitted
            ]
            calls.create_task(_fill(buffer, sampler, scorer, requests, totals))


async def _fill(
    buffer: RolloutBuffer,
    sampler: Sampler,
    scorer: Scorer | None,
    requests: Sequence[SampleRequest],
    totals: Totals,
) -> None:
    """Draw the requests into the buffer, scoring each group as soon as it ends."""
    async with aclosing(draw_scored(sampler, scorer, requests, on_sampled=buffer.sampled)) as stream:
        async for rollouts in stream:
            tokens = sum(rollout.num_targets for rollout in rollouts)
            totals.tokens_generated += tokens
            totals.tokens_scored += tokens
            await buffer.put(rollouts)


async def _train(
    settings: LoopSettings,
    buffer: RolloutBuffer,
    student: StudentGroup,
    reporter: Reporter,
    ledger: Ledger,
    totals: Totals,
    stop: asyncio.Event,
    start_step: int,
    evaluate: Callable[[int], Awaitable[dict[str, float]]] | None,
    pool_metrics: Callable[[], dict[str, float]],
    text: Callable[[int], Awaitable[TrainBatch]] | None,
    on_wait: Callable[[Sequence[int]], None],
    schedules: Schedules,
    filters: Callable[[Sequence[Rollout]], dict[int, str]],
    weights: Callable[[Sequence[Rollout]], dict[int, float] | None],
    producer: asyncio.Task[None],
) -> None:
    saved = start_step
    for step in range(start_step, settings.steps):
        started = time.perf_counter()
        wanted = await _unless(stop, _both(buffer.batch(step, on_wait), text(step + 1) if text is not None else None))
        if wanted is None:
            await _interrupt(student, reporter, step, saved, producer)
        ready, windows = wanted
        rollouts = ready.rollouts
        dropped = filters(rollouts)
        values = schedules.at(step)
        batch = rollouts_to_batch(rollouts, step + 1, dropped, weights(rollouts))
        report = await student.train_step(batch, windows, values)
        trained = time.perf_counter()
        measured = batch_metrics(rollouts, trained_version=step)
        # Before anything can be admitted that this step's signals decide.
        schedules.observe(step + 1, measured)
        await student.publish(step + 1)
        await buffer.published(step + 1)
        now = time.perf_counter()
        facts = {**fates(rollouts), "trained_tokens": report.num_target_tokens}
        ledger.append(step + 1, [rollout.sample_id for rollout in rollouts], dropped, facts)
        totals.prompts_consumed += len(rollouts) // settings.samples_per_prompt
        totals.trained_tokens += report.num_target_tokens
        metrics: dict[str, Any] = {
            **measured,
            **filter_metrics(dropped, len(rollouts)),
            **{f"schedule/{name}": value for name, value in values.items()},
            "tokens_per_s": report.num_target_tokens / (now - started),
            "wait_rollout_s": ready.wait_rollout_s,
            "wait_teacher_s": ready.wait_teacher_s,
            "wait_sync_s": now - trained,
            **pool_metrics(),
        }
        done = step + 1
        if evaluate is not None and settings.evaluate_every and done % settings.evaluate_every == 0:
            metrics |= {f"heldout/{name}": value for name, value in (await evaluate(done)).items()}
        reporter.step(report, metrics)
        reporter.samples(rollouts, done)
        if settings.checkpoint_every and done % settings.checkpoint_every == 0 and done < settings.steps:
            await student.save_checkpoint(done)
            saved = done
            reporter.event("checkpoint", step=done)
        if stop.is_set() and done < settings.steps:
            await _interrupt(student, reporter, done, saved, producer)
    if saved < settings.steps:
        await student.save_checkpoint(settings.steps)
        reporter.event("checkpoint", step=settings.steps)


async def _interrupt(student: StudentGroup, reporter: Reporter, step: int, saved: int, producer: asyncio.Task[None]) -> None:
    """Write a checkpoint, unless that of this step is there, and end; what was in flight is drawn again after a resume."""
    producer.cancel()
    if step > saved or step == 0:
        await student.save_checkpoint(step)
        reporter.event("checkpoint", step=step)
    reporter.event("interrupted", step=step)
    raise Interrupted(f"stopped at step {step} after writing a checkpoint; continue with --resume")


async def _both(ready: Awaitable[ReadyBatch], text: Awaitable[TrainBatch] | None) -> tuple[ReadyBatch, TrainBatch | None]:
    """The rollouts and the text of a step, made side by side."""
    windows = None if text is None else asyncio.ensure_future(text)
    try:
        return await ready, None if windows is None else await windows
    finally:
        if windows is not None:
            windows.cancel()


async def _unless(stop: asyncio.Event, wanted: Awaitable[Any]) -> Any:
    """What `wanted` gives, or None if `stop` is set first."""
    work = asyncio.ensure_future(wanted)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        stopped.cancel()
        if not work.done():
            work.cancel()
