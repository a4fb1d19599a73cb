"""Concurrent runs whose students teach each other (mutual learning); most runs are alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.driver_actor import ActorWatch, on_driver_node
from actors.freed_memory import keep_returning
from actors.serving.scaling_board import ScalingBoard
from actors.weights.store import WeightStore
from actors.weights.transfer import TransferStore
from cluster.interrupt import Grace, on_interrupt
from cluster.parts import ConcurrentRuns, RunStores
from cluster.runner import Runner, RunPlan
from kdray.errors import Interrupted, LeaseLost, TrainingError, ended_with
from kdray.runs.context import Checked
from kdray.runs.lease import Lease
from kdray.runs.watchdog import Watchdog
from kdray.teachers.peers import MAIN_STUDENT

_CLOSING = "the end of the run's parts"
_NAMED_S = 5.0
"""Time in which a lost actor is named by the watch over all."""


async def run_together(plans: Mapping[str, RunPlan], lease: Lease, watchdog: Watchdog) -> dict[str, dict[str, Any]]:
    """Run one run, or several whose students teach each other; returns their summaries, by name.

    The first signal stops all after a checkpoint, a second one immediately. Weight stores outlive every run: a student that has
    finished keeps teaching.
    Args: lease: of the first run's folder, which the others' are in; watchdog: ends them all if none of them advances.
    """
    main = asyncio.current_task()
    assert main is not None
    actors: list[Any] = []
    # Not beyond the run: the process may be a notebook's.
    returning = keep_returning()
    cluster = next(iter(plans.values())).checked.config.cluster
    beside = ConcurrentRuns(list(plans), cluster.stuck_after_s)

    def make(kind: type[Any]) -> Any:
        actors.append(on_driver_node(kind, max_concurrency=1000).remote())
        beside.actors.add(f"actor {len(actors)} of the run ({kind.__name__})", actors[-1])
        return actors[-1]

    try:
        stores = _stores({name: plan.checked for name, plan in plans.items()}, make)
        runners = {name: Runner(name, plan, stores[name], beside) for name, plan in plans.items()}
        reporters = [runner.reporter for runner in runners.values()]
        watchdog.advanced_at = lambda: max(beside.answered_at, *(each.advanced_at for each in reporters))
        watchdog.waits_for = beside.waits_for
        watchdog.on_event = reporters[0].event
        with on_interrupt(partial(_interrupt, runners.values(), cluster.grace_s, main.cancel)):
            return await _all_of(runners, lease, watchdog, beside.actors)
    finally:
        returning.set()
        beside.actors.close()
        for each in actors:
            ray.kill(each)


def _interrupt(runners: Collection[Runner], grace_s: float | None, end: Callable[[], object]) -> None:
    """Have all runs stop after a checkpoint; at once, if they were asked before, or a checkpoint does not fit into the time.

    Args: end: ends them all at once.
    """

    def over(reason: str) -> None:
        for runner in runners:
            runner.reporter.event("interrupted", reason=reason)

    first = not any(runner.stop.is_set() for runner in runners)
    no_room = None
    if first and grace_s is not None:
        no_room = Grace(grace_s, over).begin(max(runner.pace.time_to_stop() for runner in runners))
    # All of them, before anything is written: a full disk must not keep one from hearing it.
    for runner in runners:
        runner.stop.set()
        if grace_s is not None:
            runner.hurry.set()
    if not first or no_room is not None:
        end()
    for runner in runners:
        with contextlib.suppress(OSError, LeaseLost):
            runner.reporter.event("interrupt_requested", **({} if no_room is None else {"without_checkpoint": no_room}))


async def _all_of(
    runners: Mapping[str, Runner], lease: Lease, watchdog: Watchdog, actors: ActorWatch
) -> dict[str, dict[str, Any]]:
    tasks = {name: asyncio.create_task(_run(runner, actors)) for name, runner in runners.items()}
    # End by their errors alone: a driver may wait for long without writing anything, or calling anybody.
    watching = {asyncio.create_task(each.watch()) for each in (lease, watchdog, actors)}
    try:
        running: set[asyncio.Task[Any]] = set(tasks.values())
        while running:
            ended, running = await asyncio.wait({*running, *watching}, return_when=asyncio.FIRST_COMPLETED)
            running -= watching
            for error in (task.exception() for task in ended):
                # An interrupted run has its checkpoint; the others are still writing theirs.
                if error is not None and not isinstance(error, Interrupted):
                    raise error
        summaries = {name: task.result() for name, task in tasks.items()}
        # With 1: report and results are still to be written.
        watchdog.must_end(_CLOSING)
        return summaries
    except asyncio.CancelledError as error:
        watchdog.must_end(_CLOSING, exit_code=130)
        raise Interrupted("stopped at once, without a new checkpoint") from error
    except BaseException as error:
        watchdog.must_end(_CLOSING, exit_code=ended_with(error))
        for runner in runners.values():
            # A full disk may be the cause; that error is the one to report.
            with contextlib.suppress(OSError, LeaseLost):
                runner.reporter.event("stopped" if isinstance(error, Interrupted) else "failed", reason=str(error))
        raise
    finally:
        for task in (*tasks.values(), *watching):
            task.cancel()
        await asyncio.gather(*tasks.values(), *watching, return_exceptions=True)


async def _run(runner: Runner, actors: ActorWatch) -> dict[str, Any]:
    try:
        return await runner.run()
    except RayActorError as error:
        # Whoever called it met it first. The watch says which it was.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(actors.watch(), _NAMED_S)
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"a process of the run was lost: {reason}; continue from the last checkpoint with --resume"
        ) from error


def _stores(runs: Mapping[str, Checked], make: Callable[[type[Any]], Any]) -> dict[str, RunStores]:
    """Stores of every run. Args: make: starts an actor of a class."""
    weights = {
        name: make(WeightStore if run.config.training.weight_transfer == "object_store" else TransferStore)
        for name, run in runs.items()
    }
    found = {}
    for name, run in runs.items():
        average, teachers = None, {}
        for teacher, settings in run.config.teachers.items():
            if settings.follows_student:
                average = teachers[teacher] = make(WeightStore)
            elif settings.learns:
                teachers[teacher] = weights["" if name and teacher == MAIN_STUDENT else teacher]
        board = make(ScalingBoard) if _is_autoscaled(run) else None
        found[name] = RunStores(weights[name], board, average, teachers)
    return found


def _is_autoscaled(run: Checked) -> bool:
    engines = [*run.config.served_teachers.values(), *([run.config.rollout.pool] if run.route.student_pool else [])]
    return any(engine.autoscaling is not None for engine in engines)
