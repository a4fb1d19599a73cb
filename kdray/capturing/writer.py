"""Writer of a capture: answers are stored as they arrive, each once, and become shards.

    answer --> journal (one write each) --rows of SHARD_BYTES--> shard by rename --> manifest --> journal cleared

A process may be killed between any two of these. When the folder is opened again, work continues from the journal up to its
last whole frame, minus the rows that a shard already has. Every row has a key, the hash of everything that determines the
answer, so that the folder can be extended by more prompts, samples or seeds, and holds nothing twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdray.capturing.format import (
    MANIFEST,
    Manifest,
    check_same_teacher,
    check_unmixed,
    digest,
    find_shards,
    read_manifest,
    write_manifest,
    write_shard,
)
from kdray.capturing.journal import Journal
from kdray.errors import ConfigError, DataError
from kdray.rollouts.arrow import ROLLOUT_SCHEMA, rollouts_to_table, row_writers, upgraded, writer_columns
from kdray.rollouts.columns import rollout_columns, with_columns
from kdray.runs.folder import RunFolder, read_lines
from kdray.runs.lines.streams import drop_torn_line
from kdray.teachers.fingerprint import Fingerprint
from kdray.types import WRITERS, Rollout, SampleRequest

CAPTURE_SCHEMA = ROLLOUT_SCHEMA.append(pa.field("key", pa.binary(16), nullable=False)).append(pa.field("seed", pa.uint64()))
"""Schema of rollouts, each with its key and, if the teacher sampled it, the seed of its sampling."""

SHARD_BYTES = 64 * 2**20
"""In-memory size of the rows of a shard: what a restart reads again, and the maximum that a reader of the folder lags
behind."""


@dataclass(frozen=True)
class CaptureKeySpec:
    """Part of the key that all answers of a folder share: what is known of their origin before the teacher starts."""

    tokenizer: str
    vocab_size: int
    asked_with: Mapping[str, Any]
    """See `kdray.capturing.format.Manifest`."""

    @property
    def digest(self) -> bytes:
        """Hash of all fields."""
        text = json.dumps([self.tokenizer, self.vocab_size, self.asked_with], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


class CaptureFolder:
    """A capture being written, as a context manager: one process at a time has it open."""

    def __init__(self, path: Path, spec: CaptureKeySpec, shard_bytes: int = SHARD_BYTES) -> None:
        self.path = path
        self._spec = spec
        self._digest = spec.digest
        self._shard_bytes = shard_bytes
        self._manifest = Manifest(None, spec.tokenizer, spec.vocab_size, 0, dict(spec.asked_with), 0, complete=False)
        self._begun = False
        self._events = RunFolder(path)
        self._held: set[bytes] = set()

    def __enter__(self) -> CaptureFolder:
        """Open the folder, creating it if missing.

        Raises: DataError if it holds other answers than these, or no capture; ConfigError if another process is writing it.
        """
        before = self._before()
        self.path.mkdir(parents=True, exist_ok=True)
        # Held by this process alone, and released by the system however the process ends.
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"capture {self.path}: another process writes to it; wait for its end") from None
        try:
            for name in (".part-*", f".{MANIFEST}.*", ".journal.*"):
                for leftover in self.path.glob(name):
                    leftover.unlink()
            drop_torn_line(self._events.events)
            if before is not None:
                self._manifest, self._begun = before, True
            self._held = self._sealed_keys()
            self._journal = Journal(self.path / "journal", CAPTURE_SCHEMA, upgraded)
            if self._journal.num_rows and not self._begun:
                raise DataError(f"capture {self.path}: a journal without its {MANIFEST}; restore that, or remove the journal")
            self._recover()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()
        self._lock.close()

    # ------------------------------------------------------------------------------------------------ what is there

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Fingerprint of the teacher of the stored answers; None if there are none yet, or it is a black box."""
        return self._manifest.fingerprint

    @property
    def held(self) -> int:
        """Number of stored answers."""
        return len(self._held)

    @property
    def asked(self) -> int:
        """Number of answers requested from the teacher, over all starts."""
        if not self._events.events.exists():
            return 0
        return sum(event["answers"] for event in read_lines(self._events.events) if event["kind"] == "asked")

    def key(self, request: SampleRequest, reference: np.ndarray | None = None) -> bytes:
        """Key of the answer to a request: hash of teacher, tokenizer, sampling and recorded signals, prompt, and seed.

        Args: reference: [T] ids of the data's reference answer, in place of a sampled one.
        """
        what = [b"drawn", str(request.seed).encode()] if reference is None else [b"data", reference.astype("<i4").tobytes()]
        content = hashlib.blake2b(self._digest, digest_size=16)
        for part in (request.prompt_ids.astype("<i4").tobytes(), *what):
            content.update(len(part).to_bytes(8, "little") + part)
        return content.digest()

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def draws(self) -> Counter[bytes]:
        """Number of answers sampled by the teacher, by the digest of the prompt's ids."""
        found: Counter[bytes] = Counter()
        names = {shard: ["prompt_ids", *writer_columns(pq.read_schema(shard))] for shard in self._shards()}
        tables = [pq.read_table(shard, columns=columns) for shard, columns in names.items()]
        for part in (*tables, pa.Table.from_batches(self._journal.batches, CAPTURE_SCHEMA)):
            drawn = row_writers(part) == WRITERS.index("teacher")
            ids = part.column("prompt_ids").filter(pa.array(drawn)).to_pylist()
            found.update(digest(np.array(row)) for row in ids)
        return found

    # --------------------------------------------------------------------------------------------------- what is added

    def begin(self, fingerprint: Fingerprint | None) -> None:
        """Set the teacher before it is called. Raises: DataError if the folder has another teacher's answers."""
        now = replace(self._manifest, fingerprint=fingerprint, complete=False)
        if self._begun:
            check_same_teacher(self.path, self._manifest, now)
        # The first fingerprint remains the reference: small rounding differences must not accumulate into a drift.
        self._manifest = replace(self._manifest, complete=False) if self._begun else now
        self._begun = True
        write_manifest(self.path, self._manifest)

    def note(self, kind: str, **fields: Any) -> None:
        """Add a line to events.jsonl. `asked` with `answers`, written before they are requested, is what `asked` counts."""
        self._events.append_event(kind, **fields)

    def add(self, answers: Sequence[tuple[bytes, int | None, Rollout]]) -> None:
        """Store answers (key, seed, rollout): they survive a kill once this returns. An existing answer stays unchanged.

        Raises: DataError if a student wrote part of one.
        """
        check_unmixed(self.path, [rollout for _, _, rollout in answers])
        new: dict[bytes, tuple[int | None, Rollout]] = {}
        for key, seed, rollout in answers:
            if key not in self._held:
                new.setdefault(key, (seed, rollout))
        if not new:
            return
        # Signals of a student that happens to run next to the teacher are not part of the teacher's answer.
        of_student = {column.name: None for column in rollout_columns() if column.of_student}
        rows = [with_columns(rollout, of_student) for _, rollout in new.values()]
        table = rollouts_to_table(rows)
        table = table.append_column(CAPTURE_SCHEMA.field("key"), pa.array(list(new), pa.binary(16)))
        table = table.append_column(CAPTURE_SCHEMA.field("seed"), pa.array([seed for seed, _ in new.values()], pa.uint64()))
        self._journal.append(table)
        self._held.update(new)
        if self._journal.num_bytes >= self._shard_bytes:
            self.flush_shard()

    def flush_shard(self) -> None:
        """Write the journal's rows as a shard."""
        if self._journal.num_rows:
            table = pa.Table.from_batches(self._journal.batches, CAPTURE_SCHEMA)
            write_shard(self.path, table.sort_by("sample_id"))
        rows = sum(pq.read_metadata(shard).num_rows for shard in self._shards())
        self._manifest = replace(self._manifest, rollouts=rows, asked=self.asked)
        write_manifest(self.path, self._manifest)
        self._journal.clear()

    def complete(self) -> Manifest:
        """Mark the capture as complete. Returns: the manifest."""
        self._manifest = replace(self._manifest, complete=True)
        self.flush_shard()
        return self._manifest

    # -------------------------------------------------------------------------------------------------------- opening

    def _before(self) -> Manifest | None:
        """The existing manifest, if it is of these same answers."""
        if not self.path.exists():
            return None
        if not (self.path / MANIFEST).is_file():
            strange = [entry for entry in self.path.iterdir() if not entry.name.startswith(".") and entry.name != "journal"]
            if strange:
                raise DataError(f"capture {self.path}: the folder holds {strange[0].name} and no capture; name another one")
            return None
        before = read_manifest(self.path)
        assert before is not None
        if not before.asked_with:
            raise DataError(f"capture {self.path}: not made by `kdray capture`; name another folder")
        there, wanted = ({"tokenizer": m.tokenizer, "vocab_size": m.vocab_size, **m.asked_with} for m in (before, self._spec))
        for name in [*there, *(name for name in wanted if name not in there)]:
            if there.get(name) != wanted.get(name):
                raise DataError(
                    f"capture {self.path}: its answers were asked with {name}={there.get(name)!r}, not {wanted.get(name)!r}: "
                    "one capture holds the answers of one teacher, asked in one way; set it back, or write to another folder"
                )
        return before

    def _shards(self) -> list[Path]:
        return find_shards(self.path) if any(self.path.glob("*.parquet")) else []

    def _sealed_keys(self) -> set[bytes]:
        held: set[bytes] = set()
        for shard in self._shards():
            if "key" not in pq.read_schema(shard).names:
                raise DataError(f"{shard}: not made by `kdray capture`; move it out of the folder")
            held.update(pq.read_table(shard, columns=["key"]).column("key").to_pylist())
        return held

    def _recover(self) -> None:
        """Keep the journal's rows that no shard has: a kill came between a shard's rename and clearing the journal."""
        if self._journal.torn_bytes:
            self.note("torn", bytes=self._journal.torn_bytes)
        batches = self._journal.batches
        fresh = [[key not in self._held for key in batch.column("key").to_pylist()] for batch in batches]
        # Its file stays unchanged until the next shard: after a kill in between, the next start finds the same state.
        self._journal.batches = [batch.filter(pa.array(new)) for batch, new in zip(batches, fresh, strict=True) if any(new)]
        for batch in self._journal.batches:
            self._held.update(batch.column("key").to_pylist())
