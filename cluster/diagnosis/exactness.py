"""Exactness trial of a pair of models: replicas against the trainer, from the first sample to the reloaded export.

Without Ray: one engine and one trainer in this process. The trial samples from the mixture, compares every recorded log p and
log q with forward passes of transformers, scores the same tokens by prefill, makes an optimizer update, publishes it to the
engine, samples again, and compares an export, loaded anew, with the model that was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from actors.serving.engine import TeacherEngine
from actors.serving.scoring.batch_sizes import batch_size_gap
from actors.serving.spec import EngineSpec
from actors.student.trainer import Phase, StudentTrainer
from kdray.config import ReverseKLLoss, TrainingSettings
from kdray.models.attention import attention_arguments
from kdray.rollouts.batching import rollouts_to_batch
from kdray.types import Rollout, SampleRequest

_PROMPTS, _NEW_TOKENS = 8, 40
_ALPHAS = (0.0, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Gaps:
    """Largest differences of a trial over all tokens, nats a token; of logits for `export`."""

    teacher: float
    """log p recorded while sampling, against transformers."""
    student: float
    """log q recorded while sampling, against the trainer's forward pass."""
    scored: float
    """log p by prefill, against log p recorded while sampling."""
    updated: float
    """log q after the update was published, against the trainer's forward pass."""
    moved: float
    """Mean change of log q by the update: a trial in which nothing moves shows nothing."""
    export: float
    """Logits of the exported student, loaded anew, against those of the trainer."""
    sizes: float
    """log p and log q recorded at every batch size up to that of the engine, against prefill: the largest mean."""

    def over(self, tolerance: float) -> dict[str, float]:
        """The gaps beyond a tolerance, by name; nan counts as beyond."""
        return {name: gap for name, gap in asdict(self).items() if name != "moved" and not gap <= tolerance}


async def try_pair(spec: EngineSpec, folder: Path, learning_rate: float = 3e-3, reference: Path | None = None) -> Gaps:
    """Run the trial.

    Args: spec: of a mixture engine; folder: existing, for the published weights and the export; reference: what transformers
    loads as the teacher, where it cannot load the engine's own files.
    Propagates the exceptions of loading, sampling, training and publication.
    """
    assert spec.student is not None, "a trial needs a teacher and a student"
    spec = replace(spec, max_num_batched_tokens=64)
    trainer = open_trainer(spec, learning_rate)
    engine = TeacherEngine(spec)
    try:
        await engine.start()
        sizes = [2**power for power in range(spec.max_num_seqs.bit_length())]
        sizes_gap = float(np.max([await batch_size_gap(engine, size) for size in sizes]))
        requests = _requests(spec.vocab_size, spec.max_model_len)
        first = [rollout async for part in engine.sample(requests) for rollout in part]
        scored = {rollout.sample_id: rollout async for part in engine.score(first) for rollout in part}
        teacher = _loaded(spec.model, spec.revision) if reference is None else _loaded(str(reference), None)
        before = [_log_probabilities(trainer.backend.module, rollout, spec.vocab_size) for rollout in first]
        teacher_gap = _largest(
            (_values(rollout.teacher_logprobs), _log_probabilities(teacher, rollout, spec.vocab_size)) for rollout in first
        )
        student_gap = _largest((_values(rollout.student_logprobs), q) for rollout, q in zip(first, before, strict=True))
        scored_gap = _largest(
            (_values(rollout.teacher_logprobs), _values(scored[rollout.sample_id].teacher_logprobs)) for rollout in first
        )
        for step in range(1, 4):
            trainer.train_step(rollouts_to_batch(first, step))
        after = [_log_probabilities(trainer.backend.module, rollout, spec.vocab_size) for rollout in first]
        await engine.update_student(publish(trainer, folder), 1)
        second = [rollout async for part in engine.sample(requests) for rollout in part]
        updated_gap = _largest(
            (_values(rollout.student_logprobs), _log_probabilities(trainer.backend.module, rollout, spec.vocab_size))
            for rollout in second
        )
    finally:
        await engine.close()
    export = folder / "export"
    trainer.export(export)
    return Gaps(
        teacher=teacher_gap,
        student=student_gap,
        scored=scored_gap,
        updated=updated_gap,
        moved=float(np.abs(np.concatenate(after) - np.concatenate(before)).mean()),
        export=_export_gap(trainer.backend.module, _loaded(str(export), None), first),
        sizes=sizes_gap,
    )


def open_trainer(spec: EngineSpec, learning_rate: float, precision: str = "fp32") -> StudentTrainer:
    """A trainer of the student that an engine with this spec holds, in this process. Args: precision: as in a recipe."""
    training = TrainingSettings.model_validate(
        {
            "backend": {"type": "torch"},
            "learning_rate": learning_rate,
            "batch_size": _PROMPTS,
            "micro_batch_size": _PROMPTS,
            "precision": precision,
        }
    )
    trainer = StudentTrainer(training, spec.vocab_size, spec.seed)
    loss = ReverseKLLoss(type="reverse_kl")
    assert spec.student is not None
    trainer.start_phase(Phase("trial", spec.student, spec.student_revision, loss, learning_rate, steps=3))
    return trainer


def _requests(vocab_size: int, max_model_len: int) -> list[SampleRequest]:
    """Prompts of random ids, from short ones to ones that take several prefill chunks."""
    rng = np.random.default_rng(0)
    longest = min(120, max_model_len - _NEW_TOKENS)
    lengths = np.linspace(5, longest, _PROMPTS).astype(int)
    return [
        SampleRequest(
            sample_id=index,
            prompt_id=index,
            prompt_ids=rng.integers(3, vocab_size, size=length).astype(np.int32),
            alpha=_ALPHAS[index % len(_ALPHAS)],
            seed=index + 1,
            max_new_tokens=_NEW_TOKENS,
        )
        for index, length in enumerate(lengths)
    ]


def _loaded(model: str, revision: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model,
        revision=revision,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        **attention_arguments(model, revision),
    ).eval()


def _logits(model: Any, rollout: Rollout) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.token_ids])).long()
    with torch.no_grad():
        return model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float().cpu()


def _log_probabilities(model: Any, rollout: Rollout, vocab_size: int) -> np.ndarray:
    """Log-probabilities of the response's tokens by a model of transformers, [T]."""
    rows = _logits(model, rollout)[len(rollout.prompt_ids) - 1 : -1, :vocab_size].log_softmax(-1)
    return rows.gather(-1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0].numpy()


def log_probabilities_of_ids(model: str, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities of every id but the first by transformers in float32, [len(ids) - 1]. Args: model: a folder."""
    given = torch.tensor(ids)
    with torch.no_grad():
        rows = _loaded(model, None)(input_ids=given[None]).logits[0, :-1].float().log_softmax(-1)
    return rows.gather(-1, given[1:, None])[:, 0].numpy()


def _values(column: np.ndarray | None) -> np.ndarray:
    assert column is not None
    return column


def _largest(pairs: Any) -> float:
    return float(max(np.abs(first - second).max() for first, second in pairs))


def publish(trainer: StudentTrainer, folder: Path) -> list[Path]:
    """Write the trainer's weights as replicas receive them; returns the files."""
    paths = []
    for index, bucket in enumerate(trainer.weight_buckets()):
        paths.append(folder / f"bucket-{index}.safetensors")
        save_file(bucket, paths[-1])
    return paths


def _export_gap(trained: Any, loaded: Any, rollouts: Sequence[Rollout]) -> float:
    return float(max((_logits(trained, each) - _logits(loaded, each)).abs().max() for each in rollouts))
