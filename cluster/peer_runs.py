"""Jobs that run side by side, because their students teach each other; most runs are one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from typing import Any

import ray

from actors.driver_actor import beside_driver
from actors.serving.scaling_board import ScalingBoard
from actors.weights.store import WeightStore
from actors.weights.transfer import TransferStore
from cluster.runner import Job
from kdray.config import PeerTeacherSettings, SelfTeacherSettings
from kdray.errors import Interrupted
from kdray.teachers.peers import MAIN_STUDENT


async def run_together(jobs: Mapping[str, Job]) -> dict[str, dict[str, Any]]:
    """Run a job, or several whose students teach each other; their summaries, by name.

    The first signal asks all to stop after a checkpoint, a second one means now. Weight stores outlive every job: a student
    that is done goes on teaching.
    """
    main = asyncio.current_task()
    assert main is not None
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if any(job.stop.is_set() for job in jobs.values()):
            main.cancel()
        for job in jobs.values():
            job.stop.set()
            job.reporter.event("interrupt_requested")

    stores = []

    def store(kind: type[Any] = WeightStore) -> Any:
        stores.append(beside_driver(kind, max_concurrency=1000).remote())
        return stores[-1]

    for job in jobs.values():
        pools = [*job.config.served_teachers.values(), job.config.rollout.pool]
        if any(engine.autoscaling is not None for engine in pools):
            job.board = store(ScalingBoard)
        job.weights = store(WeightStore if job.config.training.weight_transfer == "object_store" else TransferStore)
    for name, job in jobs.items():
        job.beside = [other for other in jobs.values() if other is not job]
        for teacher, settings in job.config.teachers.items():
            if isinstance(settings, SelfTeacherSettings):
                job.average = job.teacher_weights[teacher] = store()
            elif isinstance(settings, PeerTeacherSettings):
                job.teacher_weights[teacher] = jobs["" if name and teacher == MAIN_STUDENT else teacher].weights
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    tasks = {name: asyncio.create_task(job.run()) for name, job in jobs.items()}
    try:
        running = set(tasks.values())
        while running:
            ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for error in (task.exception() for task in ended):
                # One that was interrupted has its checkpoint; the others are writing theirs.
                if error is not None and not isinstance(error, Interrupted):
                    raise error
        return {name: task.result() for name, task in tasks.items()}
    except asyncio.CancelledError as error:
        raise Interrupted("stopped at once, without a new checkpoint") from error
    except BaseException as error:
        for job in jobs.values():
            # A disk that is full may be the error; it is the one to tell.
            with contextlib.suppress(OSError):
                job.reporter.event("stopped" if isinstance(error, Interrupted) else "failed", reason=str(error))
        raise
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        for each in stores:
            ray.kill(each)
