"""Pretraining text: documents of a source, split into windows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kdray.config import PretrainingSettings
from kdray.config.data import HubText, JsonlText, ParquetText, TaskText, TextSource
from kdray.data.sources import check_text, hub_records, jsonl_records, kind, names, parquet_records
from kdray.data.tasks import generate_examples
from kdray.errors import DataError
from kdray.types import Prompt

_SECTION = "training.pretraining.source"


def load_windows(settings: PretrainingSettings, tokenizer: Any, seed: int) -> list[Prompt]:
    """Load all windows of all documents; every document ends with the end-of-sequence token.

    Windows of a document overlap by one token, so that every token except a document's first is a target exactly once.
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
    """Yield the texts of a source in its order. Args: section: the setting that holds `source`, for messages."""
    return _DOCUMENTS[source.type](source, seed, section)


def _task_documents(source: TaskText, seed: int, section: str) -> Iterator[str]:
    for example in generate_examples(source.tasks, source.difficulty, source.size, seed):
        yield example.prompt + example.answer


def _column(
    records: Iterator[tuple[str, dict[str, Any]]], source: JsonlText | ParquetText | HubText, section: str
) -> Iterator[str]:
    """The column of each record that holds the document."""
    for where, record in records:
        if source.column not in record:
            raise DataError(f"{section}.column={source.column}: {where} has no such column; it has {names(record)}")
        text = record[source.column]
        if not isinstance(text, str):
            raise DataError(f"{where}, {source.column!r}: a document is a text, found {kind(text)}")
        check_text(text, f"{where}, {source.column!r}")
        yield text


def _hub_documents(source: HubText, seed: int, section: str) -> Iterator[str]:
    records = hub_records(source.name, source.subset, source.split, source.revision, f"{section}.split")
    return _column(records, source, section)


_DOCUMENTS: dict[str, Callable[[Any, int, str], Iterator[str]]] = {
    "task": _task_documents,
    "jsonl": lambda source, seed, section: _column(jsonl_records(source.path, f"{section}.path"), source, section),
    "parquet": lambda source, seed, section: _column(parquet_records(source.path, f"{section}.path"), source, section),
    "hub": _hub_documents,
}
"""Readers by the `type` of a text source; arguments: source, seed, section."""
