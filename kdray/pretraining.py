"""Pretraining text: documents to windows of ids, and the windows that are mixed into each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kdray.batching import examples_to_batch, rollouts_to_batch
from kdray.config import HubText, JsonlText, ParquetText, PretrainingSettings, TaskText, TextSource
from kdray.data import PromptStream
from kdray.errors import DataError
from kdray.interfaces import Scorer
from kdray.sources import check_text, hub_records, jsonl_records, kind, names, parquet_records
from kdray.tasks import generate_examples
from kdray.types import Prompt, Rollout, TrainBatch

_SECTION = "training.pretraining.source"


def load_windows(settings: PretrainingSettings, tokenizer: Any, seed: int) -> list[Prompt]:
    """All windows of all documents, each document closed by the end-of-sequence token.

    Windows of a document overlap by one token, so that every token but a document's first is a target exactly once.
    Raises: DataError with file, row and remedy.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the student tokenizer has no end-of-sequence token to close documents; set its eos_token")
    windows: list[Prompt] = []
    stride = settings.window_tokens - 1
    for document in documents(settings.source, seed, _SECTION):
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32)
        for start in range(0, max(1, len(ids) - 1), stride):
            window = ids[start : start + settings.window_tokens]
            if len(window) > 1:
                windows.append(Prompt(len(windows), window))
    if not windows:
        raise DataError(f"{_SECTION}: no document with a token in it")
    return windows


def documents(source: TextSource, seed: int, section: str) -> Iterator[str]:
    """The texts of a source, in its order. Args: section: the setting that holds `source`, for messages."""
    if isinstance(source, TaskText):
        for example in generate_examples(source.tasks, source.difficulty, source.size, seed):
            yield example.prompt + example.answer
        return
    if isinstance(source, JsonlText):
        records = jsonl_records(source.path, f"{section}.path")
    elif isinstance(source, ParquetText):
        records = parquet_records(source.path, f"{section}.path")
    else:
        assert isinstance(source, HubText)
        records = hub_records(source.name, source.subset, source.split, source.revision, f"{section}.split")
    for where, record in records:
        if source.column not in record:
            raise DataError(f"{section}.column={source.column}: {where} has no such column; it has {names(record)}")
        text = record[source.column]
        if not isinstance(text, str):
            raise DataError(f"{where}, {source.column!r}: a document is a text, found {kind(text)}")
        check_text(text, f"{where}, {source.column!r}")
        yield text


class PretrainingText:
    """The windows of every step, in an order that seed and step alone fix."""

    def __init__(self, windows: list[Prompt], settings: PretrainingSettings, seed: int, scorer: Scorer | None) -> None:
        """Args: scorer: the teacher whose columns `teacher_share` above 0 needs; None where it is 0."""
        self._windows = PromptStream(windows, seed)
        self._batch_size = settings.batch_size
        self._scorer = scorer

    async def batch(self, step: int) -> TrainBatch:
        """The windows of optimizer step `step`, counted from 1; the first token of a window is no target.

        Raises: EngineError where the teacher could not score them.
        """
        first = (step - 1) * self._batch_size
        windows = [self._windows.at(first + offset) for offset in range(self._batch_size)]
        if self._scorer is None:
            return examples_to_batch([(Prompt(w.prompt_id, w.token_ids[:1]), w.token_ids[1:]) for w in windows], step)
        wanted = [_as_rollout(window, position) for position, window in enumerate(windows)]
        scored = [rollout async for part in self._scorer.score(wanted) for rollout in part]
        return rollouts_to_batch(sorted(scored, key=lambda rollout: rollout.sample_id), step)


def _as_rollout(window: Prompt, position: int) -> Rollout:
    """A window as a teacher scores it: its first token is the prompt."""
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
    )
