"""Trial of `kdray plan`: memory that one training step takes, as planned and as found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from actors.student.trainer import Phase, StudentTrainer
from cluster.diagnosis.meter import Storages
from cluster.planning.memory import Lengths, LossTensors, ModelShape, rank_memory
from kdray.config import ReverseKLLoss, RolloutSettings, TrainingSettings
from kdray.models.random_models import RandomModel
from kdray.rollouts.batching import rollouts_to_batch
from kdray.types import Rollout, TrainBatch

_TOLERANCE = 0.2
"""Largest share by which the plan may be off, as its tests ask on tensors alone."""
_TOP_K = 8


class _Peak:
    """Most bytes of new tensors inside the block: by the allocator of a GPU, or by a meter of operators on CPUs."""

    def __init__(self, on_gpu: bool) -> None:
        self.found = 0
        self._on_gpu = on_gpu
        self._meter = Storages()
        self._before = 0

    def __enter__(self) -> _Peak:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._meter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._on_gpu:
            self.found = torch.cuda.max_memory_allocated() - self._before
        else:
            self._meter.__exit__(*error)
            self.found = self._meter.peak


@dataclass(frozen=True)
class Footprint:
    """Trial of the memory of weights, gradients, optimizer, activations and loss."""

    precision: str
    """As in `training.precision`."""
    width: int = 256
    layers: int = 6
    vocab: int = 4096
    rows: int = 8
    prompt: int = 64
    response: int = 192
    gpus: int = 0
    only_on_gpus: bool = False

    async def run(self, folder: Path) -> dict[str, Any]:
        """Returns: `ok`; MiB as planned and as found, by the allocator of a GPU or a meter of new tensors on CPUs."""
        on_gpu = torch.cuda.is_available()
        model = str(RandomModel("llama", self.width, self.layers, rows=self.vocab, seed=2).write(folder / "student"))
        training = TrainingSettings.model_validate(
            {
                "backend": {"type": "torch"},
                "batch_size": self.rows,
                "micro_batch_size": self.rows,
                "precision": self.precision,
                "gpus_per_rank": float(on_gpu),
            }
        )
        loss = ReverseKLLoss(type="reverse_kl")
        shape = ModelShape.of(AutoConfig.from_pretrained(model, trust_remote_code=False))
        tensors = LossTensors.of(loss, RolloutSettings(teacher_top_k=_TOP_K, student_top_k=0))
        plan = rank_memory(shape, training, Lengths(self.prompt, self.response), loss=tensors)
        planned = plan.total - plan.base
        with _Peak(on_gpu) as peak:
            trainer = StudentTrainer(training, self.vocab, seed=0)
            trainer.start_phase(Phase("trial", model, None, loss, 1e-4, steps=2))
            # The optimizer has its moments from the first step on.
            for step in (1, 2):
                trainer.train_step(replace(self._batch(), step=step))
        mib = 2**20
        return {
            "ok": abs(planned / peak.found - 1) <= _TOLERANCE,
            "MiB planned": planned / mib,
            "MiB found": peak.found / mib,
            "planned / found": planned / peak.found,
        }

    def _batch(self) -> TrainBatch:
        rng = np.random.default_rng(0)
        flat = np.full(self.response, -np.log(self.vocab), dtype=np.float32)
        support = np.tile(np.arange(_TOP_K, dtype=np.int32), (self.response, 1))
        rollouts = [
            Rollout(
                sample_id=index,
                prompt_id=index,
                prompt_ids=rng.integers(3, self.vocab, self.prompt).astype(np.int32),
                token_ids=rng.integers(3, self.vocab, self.response).astype(np.int32),
                mixture_logprobs=flat,
                student_logprobs=flat,
                student_versions=np.zeros(self.response, dtype=np.int32),
                alpha=0.0,
                finish_reason="length",
                teacher="t",
                teacher_logprobs=flat,
                support_ids=support,
                support_logprobs=np.full(support.shape, -np.log(self.vocab), dtype=np.float32),
                tail_logprobs=np.full(self.response, np.log(1 - _TOP_K / self.vocab), dtype=np.float32),
            )
            for index in range(self.rows)
        ]
        return rollouts_to_batch(rollouts, 1)
