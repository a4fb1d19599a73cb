"""Real ranks of a student for tests: settings, batches with true columns of two models, the group and its weight stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.student.group import StudentGroup
from actors.student.trainer import Phase
from actors.weights.store import WeightStore
from kdray.config import MiniLLMLoss, TrainingSettings
from kdray.models.resolve import task_tokenizer
from kdray.models.saving import TokenizerSource
from kdray.rollouts.batching import rollouts_to_batch
from kdray.types import Rollout, TrainBatch
from tests.integration.conftest import VOCAB, TinyModels

STEPS = 4


def batches_of(tiny_models: TinyModels, teacher: Path, student: Path, count: int = STEPS) -> list[TrainBatch]:
    """Rollouts of unequal length with true columns of both models, 12 a step (so that 8 rows and 4 padding rows occur)."""
    rng = np.random.default_rng(0)
    batches = []
    for step in range(count):
        rollouts = []
        for index in range(16):
            prompt = rng.integers(2, VOCAB, size=rng.integers(1, 12)).astype(np.int32)
            response = rng.integers(1, VOCAB, size=rng.integers(1, 20)).astype(np.int32)
            p, q = (tiny_models.log_rows(folder, prompt, response) for folder in (teacher, student))
            at = torch.from_numpy(response).long().unsqueeze(1)
            ids = p.topk(8, dim=1).indices
            outside = p.scatter(1, ids, -torch.inf).logsumexp(1)
            log_p, log_q = p.gather(1, at).squeeze(1), q.gather(1, at).squeeze(1)
            rollouts.append(
                Rollout(
                    sample_id=step * 16 + index,
                    prompt_id=index,
                    prompt_ids=prompt,
                    token_ids=response,
                    mixture_logprobs=(0.2 * log_p.exp() + 0.8 * log_q.exp()).log().numpy(),
                    student_logprobs=log_q.numpy(),
                    student_versions=np.zeros(len(response), np.int32),
                    alpha=0.2,
                    finish_reason="length",
                    teacher="t",
                    teacher_logprobs=log_p.numpy(),
                    support_ids=ids.numpy().astype(np.int32),
                    support_logprobs=p.gather(1, ids).numpy(),
                    tail_logprobs=outside.numpy(),
                )
            )
        batches.append(rollouts_to_batch(rollouts, step + 1))
    return batches


def training_of(**settings: Any) -> TrainingSettings:
    values = {"batch_size": 16, "micro_batch_size": 4, "sft": {"batch_size": 16}, "cpus_per_rank": 1, "learning_rate": 3e-3}
    return TrainingSettings.model_validate(values | settings)


@asynccontextmanager
async def open_group(
    training: TrainingSettings, folder: Path, stored: str | None = None
) -> AsyncIterator[tuple[StudentGroup, Any]]:
    task_tokenizer().save_pretrained(folder / "tokenizer")
    weights, average = (ray.remote(WeightStore).options(num_cpus=0, max_concurrency=100).remote() for _ in range(2))
    checkpoints, storage = folder / "checkpoints", folder / "ray"
    ranks = StudentGroup(
        training, VOCAB, 0, TokenizerSource(str(folder / "tokenizer")), weights, checkpoints, storage, average, stored
    )
    await ranks.start()
    try:
        yield ranks, weights
    finally:
        await ranks.close()
        ray.kill(weights)
        ray.kill(average)


def phase_of(student: Path) -> Phase:
    return Phase("distill", str(student), None, MiniLLMLoss(), 3e-3, STEPS, warmup_steps=1, schedule="cosine")


async def curve_of(
    training: TrainingSettings, student: Path, batches: list[TrainBatch], folder: Path
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    async with open_group(training, folder) as (ranks, _):
        await ranks.start_phase(phase_of(student))
        reports = [await ranks.train_step(batch) for batch in batches]
    return [(report.loss, report.grad_norm) for report in reports]
