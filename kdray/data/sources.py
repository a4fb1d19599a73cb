"""Readers of data files and hub datasets, which yield (location, row) pairs lazily.

A file is read by its name: JSON lines, a JSON list, CSV, TSV or Parquet; text files may be compressed. Columns that the caller
does not want are not read where the file allows that: a row then holds UNREAD in their place.
All readers raise DataError with the setting, the file and the row.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from kdray.data.hub import check_dataset_on_hub
from kdray.errors import DataError

Records = Iterator[tuple[str, dict[str, Any]]]

_ROWS = 1024
_COMPRESSED = (".gz", ".bz2", ".zst")


class _Unread:
    """Placeholder for the value of a column that was not read."""

    def __repr__(self) -> str:
        return "(not read)"


UNREAD = _Unread()


def file_records(path: Path, setting: str, default: str, wanted: Collection[str] | None = None) -> Records:
    """Yield rows of a file in the format that its name says: `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` or `.parquet`.

    Text formats may also end in `.gz`, `.bz2` or `.zst`. `~` is the home folder.
    Args: setting: the one that names `path`, for messages; default: ending that other names are taken to have, "" to refuse
          them; wanted: columns to read, None for all.
    """
    path = path.expanduser()
    _must_exist(path, setting)
    ending = path.suffix.lower()
    if ending in _COMPRESSED:
        ending = Path(path.stem).suffix.lower()
    if path.is_dir():
        ending = default or ".parquet"
    reader = _BY_ENDING.get(ending) or _BY_ENDING.get(default)
    if reader is None:
        raise DataError(f"{setting}={path}: cannot tell its format; give a name that ends in one of {', '.join(_BY_ENDING)}")
    return reader(path, setting, wanted)


def jsonl_records(path: Path, setting: str, wanted: Collection[str] | None = None) -> Records:
    """Yield rows of a file with one JSON object per line. Args: setting: the one that names `path`, for messages."""
    _must_exist(path, setting)
    if not path.is_file():
        raise DataError(f"{setting}={path}: is a folder; name a file with one JSON object a line")
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 text: {error.reason} at byte {error.start}") from error
            if text.strip():
                yield place, _object(_loaded(text.rstrip("\r\n"), place, "every line must be one JSON object"), place)


def json_records(path: Path, setting: str, wanted: Collection[str] | None = None) -> Records:
    """Yield rows of a file that is one JSON list of objects; a file with one object per line is read as such."""
    if not path.is_file():
        raise DataError(f"{setting}={path}: is a folder; name a file")
    with _opened(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from jsonl_records(path, setting)
        return
    with _opened(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    for number, value in enumerate(_loaded(text, str(path), "the file must be a list of JSON objects"), start=1):
        yield f"{path} item {number}", _object(value, f"{path} item {number}")


def csv_records(path: Path, setting: str, wanted: Collection[str] | None = None, delimiter: str = ",") -> Records:
    """Yield rows of a CSV file with a header; every value is a text, an empty one is None."""
    if not path.is_file():
        raise DataError(f"{setting}={path}: is a folder; name a file")
    # The library's limit of 128 KiB a field is shorter than some conversations.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _opened(path) as binary:
        reader = csv.DictReader(io.TextIOWrapper(binary, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                place = f"{path} line {reader.line_num}"
                if None in row:
                    raise DataError(
                        f"{place}: {len(row[None])} values more than the header has columns; quote values with {delimiter!r}"
                    )
                yield place, {name: value or None for name, value in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} line {reader.line_num}: not CSV in UTF-8: {error}; repair the row") from error


def parquet_records(path: Path, setting: str, wanted: Collection[str] | None = None) -> Records:
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
                blank, columns = _selected(file.schema_arrow.names, wanted)
                for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                    # Without a column there are no rows to convert, only their number.
                    for record in batch.to_pylist() if columns else [{}] * batch.num_rows:
                        row += 1
                        yield f"{name} row {row}", blank | record
        # Values that Python cannot hold, such as dates beyond the year 9999, overflow.
        except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise DataError(f"{name}: cannot be read as Parquet: {error}") from error


def hub_records(
    name: str, subset: str | None, split: str, revision: str | None, setting: str, wanted: Collection[str] | None = None
) -> Records:
    """Yield rows of a dataset that the `datasets` library loads. Args: setting: the one that names `split`."""
    import datasets

    check_dataset_on_hub(name, revision, f"{setting.rpartition('.')[0]}.name")
    try:
        table = datasets.load_dataset(name, subset, split=split, revision=revision)
    # Raised for an unknown name, subset, split or revision, a missing network, missing access, or a dataset that is a program.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{setting}={split}: {name} (subset {subset}) could not be loaded: {error}") from error
    blank, columns = _selected(table.column_names, wanted)
    for index, record in enumerate(table.select_columns(columns) if columns else [{}] * len(table)):
        yield f"{name} {split} row {index + 1}", blank | record


_BY_ENDING: dict[str, Callable[[Path, str, Collection[str] | None], Records]] = {
    ".jsonl": jsonl_records,
    ".ndjson": jsonl_records,
    ".json": json_records,
    ".csv": csv_records,
    ".tsv": lambda path, setting, wanted: csv_records(path, setting, wanted, "\t"),
    ".parquet": parquet_records,
}


def _selected(names: list[str], wanted: Collection[str] | None) -> tuple[dict[str, Any], list[str]]:
    """Return (a row of UNREAD, so that messages can list all columns; the columns to read)."""
    return dict.fromkeys(names, UNREAD), [name for name in names if wanted is None or name in wanted]


def _opened(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its name says so."""
    import pyarrow as pa

    if path.suffix.lower() not in _COMPRESSED:
        return path.open("rb")
    return io.BufferedReader(_Decompressed(pa.input_stream(str(path), compression="detect"), path))


class _Decompressed(io.RawIOBase):
    """Stream of a compressed file. Raises: DataError for damaged content."""

    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__()
        self._stream, self._path = stream, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except OSError as error:
            raise DataError(f"{self._path}: cannot be decompressed: {error}; restore the file") from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _loaded(text: str, place: str, rule: str) -> Any:
    """Parse JSON. Raises: DataError that states the place and the `rule` that it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise DataError(f"{place}: not valid JSON: {error.msg} at {line}column {error.colno}; {rule}") from error
    # Valid JSON that Python cannot load: too deep a nesting, a number of thousands of digits.
    except RecursionError as error:
        raise DataError(f"{place}: nested too deep; {rule} of texts") from error
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON: {error}; remove the line") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object, found {kind(value)}; every line must be one JSON object")
    return value


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
