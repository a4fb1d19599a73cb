"""Readers of JSONL, Parquet and hub datasets, which yield (location, row) pairs lazily.

All raise DataError with the setting, the file and the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdray.errors import DataError

_ROWS = 1024


def jsonl_records(path: Path, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows of a file with one JSON object per line. Args: setting: the one that names `path`, for messages."""
    _must_exist(path, setting)
    if not path.is_file():
        raise DataError(f"{setting}={path}: is a folder; name a file with one JSON object a line")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 text: {error.reason} at byte {error.start}") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: not valid JSON: {error.msg} at column {error.colno}; every line must be one JSON object"
                ) from error
            # Valid JSON that Python cannot load: too deep a nesting, a number of thousands of digits.
            except RecursionError as error:
                raise DataError(f"{place}: nested too deep; every line must be one JSON object of texts") from error
            except ValueError as error:
                raise DataError(f"{place}: not valid JSON: {error}; remove the line") from error
            if not isinstance(record, dict):
                raise DataError(f"{place}: expected a JSON object, found {kind(record)}")
            yield place, record


def parquet_records(path: Path, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows of a Parquet file, or of all Parquet files below a folder in order of their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _must_exist(path, setting)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{setting}={path}: the folder holds no .parquet file")
    for name in files:
        try:
            with pq.ParquetFile(name) as file:
                row = 0
                for batch in file.iter_batches(batch_size=_ROWS):
                    for record in batch.to_pylist():
                        row += 1
                        yield f"{name} row {row}", record
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name}: cannot be read as Parquet: {error}") from error


def hub_records(
    name: str, subset: str | None, split: str, revision: str | None, setting: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows of a dataset that the `datasets` library loads. Args: setting: the one that names `split`."""
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split, revision=revision)
    # Raised for an unknown name, subset, split or revision, a missing network, or missing access.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{setting}={split}: {name} (subset {subset}) could not be loaded: {error}") from error
    for index, record in enumerate(table):
        yield f"{name} {split} row {index + 1}", record


def check_text(text: str, where: str) -> None:
    """Check for lone surrogates, which truncated or doubly escaped text contains. Raises: DataError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text[error.start]!r} at character {error.start + 1} is half of a character; remove or repair the row"
        ) from error


def _must_exist(path: Path, setting: str) -> None:
    try:
        there = path.exists()
    except OSError as error:
        raise DataError(f"{setting}={path!s:.100}: {error.strerror}; name another file") from error
    if not there:
        raise DataError(f"{setting}={path}: no such file (relative paths count from {Path.cwd()})")


def names(record: dict[str, Any]) -> str:
    """Describe the columns of a row, for messages."""
    return f"columns {', '.join(map(str, record))}" if record else "no columns"


def kind(value: Any) -> str:
    """Describe the type and value of `value`, for messages."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"
