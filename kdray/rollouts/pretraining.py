"""Batches of pretraining text that are mixed into each step."""

from __future__ import annotations

import numpy as np

from kdray.config import PretrainingSettings
from kdray.data.dataset import PromptStream
from kdray.interfaces import Scorer
from kdray.rollouts.batching import examples_to_batch, rollouts_to_batch
from kdray.types import Prompt, Reference, Rollout, TrainBatch, written_by


class PretrainingText:
    """Windows of pretraining text for every step, in an order determined by seed and step alone."""

    def __init__(self, windows: list[Prompt], settings: PretrainingSettings, seed: int, scorer: Scorer | None) -> None:
        """Args: scorer: provides the teacher's columns for a `teacher_share` above 0; None if it is 0."""
        self._windows = PromptStream(windows, seed)
        self._batch_size = settings.batch_size
        self._scorer = scorer

    async def batch(self, step: int) -> TrainBatch:
        """Batch the windows of optimizer step `step`, counted from 1; the first token of a window is not a target.

        Raises: EngineError if the teacher could not score them.
        """
        first = (step - 1) * self._batch_size
        windows = [self._windows.at(first + offset) for offset in range(self._batch_size)]
        if self._scorer is None:
            return examples_to_batch([(window.prompt_id, _as_reference(window)) for window in windows], step)
        wanted = [_as_rollout(window, position) for position, window in enumerate(windows)]
        scored = [rollout async for part in self._scorer.score(wanted) for rollout in part]
        return rollouts_to_batch(sorted(scored, key=lambda rollout: rollout.sample_id), step)


def _as_reference(window: Prompt) -> Reference:
    ids = window.token_ids
    return Reference(ids[:1], ids[1:], np.ones(len(ids) - 1, dtype=bool))


def _as_rollout(window: Prompt, position: int) -> Rollout:
    """Convert a window to a rollout for scoring, with its first token as the prompt."""
    count = len(window.token_ids) - 1
    return Rollout(
        sample_id=position,
        prompt_id=window.prompt_id,
        prompt_ids=window.token_ids[:1],
        token_ids=window.token_ids[1:],
        mixture_logprobs=np.zeros(count, dtype=np.float32),
        student_logprobs=np.zeros(count, dtype=np.float32),
        student_versions=np.zeros(count, dtype=np.int32),
        alpha=0.0,
        finish_reason="length",
        writer=written_by("data", count),
    )
