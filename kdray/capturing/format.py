"""Storage format of a capture: a teacher's recorded answers, their origin, and the signals that they contain.

A capture is a folder of Parquet shards of `kdray.rollouts.arrow.ROLLOUT_SCHEMA` and a `manifest.json`, which describes the
teacher and lists no files: the shards are the folder's `*.parquet`, named by the hash of their content. A single Parquet file
is a capture without a manifest. `kdray.capturing.writer` writes captures as answers arrive, `kdray.capturing.teacher` replays
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdray.config import ModelSource
from kdray.errors import DataError
from kdray.models.resolve import recorded_identity
from kdray.rollouts.arrow import ABSENT_IN_OLD_FILES, ROLLOUT_SCHEMA, rollouts_to_table, row_writers, writer_columns
from kdray.rollouts.columns import signal_columns
from kdray.runs.folder import write_atomically
from kdray.teachers.fingerprint import Fingerprint, difference
from kdray.types import WRITERS, Rollout

MANIFEST = "manifest.json"

Signal = Literal["text", "references", "sampled", "top_k", "hidden"]
"""`text`: responses sampled by the teacher. `references`: the data's reference answers, as scored by the teacher. The others
are signals that every row has; a teacher calls them `kdray.checks.capabilities.Capability`."""

SIGNAL_COLUMNS = signal_columns()

_GROUP_BYTES = 4 * 2**20
"""In-memory size of a written row group: prompts are requested in any order, and each may cost reading one."""


@dataclass(frozen=True)
class Manifest:
    """Origin of the answers in a capture."""

    fingerprint: Fingerprint | None
    """Fingerprint of the teacher; None for a black box."""
    tokenizer: str
    """`kdray.models.vocab.tokenizer_hash` of the capturing run's student tokenizer, whose ids prompts and answers use."""
    vocab_size: int
    """Ids that the recorded distributions cover."""
    rollouts: int
    """Rows of all shards, so that a missing shard is noticed."""
    asked_with: Mapping[str, Any] = field(default_factory=dict)
    """Written by `kdray capture`: model, sampling and recorded signals, the same for all answers; see `cluster.capture_run`."""
    asked: int = 0
    """Written by `kdray capture`: answers requested from the teacher over all starts, as of the newest shard."""
    complete: bool = True
    """True if everything that the newest `kdray capture` wanted is there."""


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a capture; None for a single file. Raises: DataError."""
    if not path.exists():
        raise DataError(f"capture {path}: no such file or folder; name the folder of a capture, or one Parquet file")
    if path.is_file():
        return None
    file = path / MANIFEST
    if not file.is_file():
        raise DataError(f"capture {path}: the folder has no {MANIFEST}; name the folder of a capture, or one Parquet file")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        unknown = sorted(values.keys() - {each.name for each in fields(Manifest)})
        given = values["fingerprint"]
        fingerprint = None if given is None else Fingerprint.from_dict(given)
        later = {name: values[name] for name in ("asked_with", "asked", "complete") if name in values}
        manifest = Manifest(fingerprint, values["tokenizer"], values["vocab_size"], values["rollouts"], **later)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not the manifest of a capture: {error!r}; capture again") from error
    if unknown:
        raise DataError(f"{file}: unknown entries {', '.join(unknown)}; name a capture of this version, or capture again")
    if not (isinstance(manifest.tokenizer, str) and type(manifest.vocab_size) is type(manifest.rollouts) is int):
        raise DataError(f"{file}: tokenizer must be a text, vocab_size and rollouts whole numbers; capture again")
    if not (isinstance(manifest.asked_with, dict) and type(manifest.asked) is int and type(manifest.complete) is bool):
        raise DataError(f"{file}: asked_with must be an object, asked a whole number, complete true or false; capture again")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest of the capture in folder `path`."""
    write_atomically(path / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def write_capture(
    path: Path, rollouts: Sequence[Rollout], fingerprint: Fingerprint | None, tokenizer: str, vocab_size: int
) -> Path:
    """Add one shard to the capture in folder `path`, created if missing, and update its manifest.

    Shard and manifest are written atomically, the shard first. Only one process at a time may write to a folder.
    Args: fingerprint, tokenizer, vocab_size: see `Manifest`. Returns: the shard.
    Raises: DataError if the capture is another teacher's, or a rollout is neither the teacher's alone nor the data's.
    """
    check_unmixed(path, rollouts)
    path.mkdir(parents=True, exist_ok=True)
    if (path / MANIFEST).exists():
        before = read_manifest(path)
        assert before is not None
        if before.asked_with:
            raise DataError(f"capture {path}: made by `kdray capture`, which alone adds to it; write to another folder")
        check_same_teacher(path, before, Manifest(fingerprint, tokenizer, vocab_size, 0))
    shard = write_shard(path, rollouts_to_table(rollouts))
    total = sum(pq.read_metadata(file).num_rows for file in find_shards(path))
    write_manifest(path, Manifest(fingerprint, tokenizer, vocab_size, total))
    return shard


def check_unmixed(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Raises: DataError if a student wrote part of a rollout."""
    for rollout in rollouts:
        if not {*rollout.writers} <= {"teacher", "data", "environment"}:
            raise DataError(
                f"capture {path}: sample {rollout.sample_id} was drawn at alpha {rollout.alpha:g}, so that a student wrote "
                "some of it; capture with rollout.alpha=1"
            )


def check_same_teacher(path: Path, before: Manifest, now: Manifest) -> None:
    """Raises: DataError with the first difference that makes `now`'s answers incompatible with the earlier ones."""
    reason = _another(before, now)
    if reason is not None:
        raise DataError(f"capture {path}: holds answers of another teacher: {reason}; write to another folder")


def _another(before: Manifest, now: Manifest) -> str | None:
    if before.tokenizer != now.tokenizer:
        return f"its tokenizer is {before.tokenizer}, not {now.tokenizer}"
    if before.vocab_size != now.vocab_size:
        return f"it has {before.vocab_size} ids, not {now.vocab_size}"
    if before.fingerprint is None or now.fingerprint is None:
        return None if before.fingerprint is now.fingerprint else "one of them is a black box"
    return difference(before.fingerprint, now.fingerprint)


def check_model(setting: str, manifest: Manifest | None, model: ModelSource, revision: str | None) -> None:
    """Raises: DataError if the capture was not made by this model, or does not record its model.

    Weights are compared if both are known, so that a folder may have moved; otherwise names and revisions.
    """
    if manifest is None:
        raise DataError(
            f"{setting}: one Parquet file does not say whose answers it holds; name a folder, or remove the setting"
        )
    about, said = manifest.asked_with, manifest.fingerprint
    recorded, there = (about["model"], about.get("revision")) if about else (said and said.model, said and said.revision)
    if recorded is None:
        raise DataError(f"{setting}: the capture does not say whose answers it holds; remove the setting, or capture again")
    known = recorded_identity(model)
    if known is None:
        raise DataError(f"{setting}.type=pruned: name the folder that the pruned model was built in")
    name, weights = known
    if weights is not None and about.get("weights") is not None:
        if weights != about["weights"]:
            raise DataError(
                f"{setting}={name}: the capture was made by {recorded}, whose weights are others ({about['weights']}, and here "
                f"{weights}); name that teacher, or capture this one"
            )
    elif (recorded, there) != (name, revision):
        shown, wanted = (one if of is None else f"{one} at {of}" for one, of in ((recorded, there), (name, revision)))
        raise DataError(f"{setting}={wanted}: the capture was made by {shown}; name that teacher, or capture this one")


def write_shard(path: Path, table: pa.Table) -> Path:
    """Write a table as a shard of the folder, named by its content: the same rows give the same file.

    File and name are synced to disk when this returns. The name appears atomically, with the whole content.
    """
    rows = max(1, table.num_rows * _GROUP_BYTES // max(1, table.nbytes))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows, compression="zstd", write_page_checksum=True)
    content = sink.getvalue()
    shard = path / f"part-{hashlib.blake2b(content, digest_size=16).hexdigest()}.parquet"
    # A name that no reader treats as a shard.
    temporary = path / f".{shard.name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, shard)
        sync_folder(path)
    finally:
        temporary.unlink(missing_ok=True)
    return shard


def sync_folder(path: Path) -> None:
    """Return once the names in a folder are synced to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_shards(path: Path) -> list[Path]:
    """The Parquet files of a capture. Raises: DataError if there is none, or one has another schema."""
    if not path.exists():
        raise DataError(f"capture {path}: no such file or folder; name the folder of a capture, or one Parquet file")
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not shards:
        raise DataError(f"capture {path}: the folder has no *.parquet; name the folder of a capture, or one Parquet file")
    for shard in shards:
        with reading(shard):
            schema = pq.read_schema(shard)
        for column in ROLLOUT_SCHEMA:
            if column.name in ABSENT_IN_OLD_FILES and column.name not in schema.names:
                continue
            found = schema.field(column.name).type if schema.names.count(column.name) == 1 else "absent"
            if found != column.type:
                raise DataError(
                    f"{shard}: column {column.name} is {found}, and rollouts have {column.type}; name a capture of this version"
                )
    return shards


@contextlib.contextmanager
def reading(shard: Path) -> Iterator[None]:
    """Convert errors caused by a damaged shard to a DataError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shard}: cannot be read as Parquet: {error}; restore it, or capture again") from error


def footer_digest(shard: Path) -> str:
    """Digest of a shard's size and footer, which has the place, size and statistics of every part of every column.

    Cheap however large the shard; a change that leaves all of these as they were is not noticed. Raises: DataError.
    """
    with reading(shard), shard.open("rb") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)
        return hashlib.sha256(str(size).encode() + file.read()).hexdigest()[:16]


def signals(path: Path) -> set[Signal]:
    """Signals of a capture: the source of its responses, and the signals that every row has, from the columns without nulls.

    Raises: DataError for a missing path, no Parquet files, or a schema that does not match.
    """
    shards = find_shards(path)
    columns = []
    for shard in shards:
        with reading(shard):
            columns.append(row_writers(pq.read_table(shard, columns=writer_columns(pq.read_schema(shard)))))
    writers = np.concatenate(columns)
    if not len(writers):
        return set()
    found: set[Signal] = {
        signal
        for signal, columns in SIGNAL_COLUMNS.items()
        if all(_never_null(shard, name) for shard in shards for name in columns)
    }
    references = writers == WRITERS.index("data")
    if references.any() and "sampled" in found:
        found.add("references")
    if not references.all():
        found.add("text")
    return found


def _never_null(path: Path, column: str) -> bool:
    with reading(path), pq.ParquetFile(path) as shard:
        metadata = shard.metadata
        leaves = [metadata.schema.column(index).path.split(".")[0] for index in range(metadata.num_columns)]
        if column not in leaves:
            # A file of an older version.
            return False
        leaf = leaves.index(column)
        for group in range(metadata.num_row_groups):
            counts = metadata.row_group(group).column(leaf).statistics
            # The count is of values, and an answer without tokens counts like a null: only zero is conclusive without reading.
            if counts is not None and counts.has_null_count and counts.null_count == 0:
                continue
            if shard.read_row_group(group, columns=[column]).column(0).null_count:
                return False
    return True


def digest(token_ids: np.ndarray) -> bytes:
    """16-byte digest of a sequence of ids."""
    return hashlib.blake2b(np.asarray(token_ids, dtype="<i4").tobytes(), digest_size=16).digest()
