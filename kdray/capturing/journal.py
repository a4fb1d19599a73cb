"""Append-only file of Arrow rows that survives `kill -9`: appended rows are there again at the next opening.

A frame is the length and the CRC-32 of the message that follows, and an Arrow IPC message: first the schema's, then a record
batch per append. A frame is written by one call, straight to the operating system; a kill can truncate the last one at any
byte, and a machine crash can leave anything after the last sync. So the file is valid up to its last whole frame, and the rest
is truncated.
"""

from __future__ import annotations

import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from kdray.errors import DataError

_HEADER = struct.Struct("<II")
"""Length of the message in bytes, and its CRC-32."""
_SYNC_S = 1.0
"""Maximum loss if the machine crashes, in seconds of work; a killed process loses nothing."""


class Journal:
    """Journal file, opened by one process at a time. Call `close` at the end."""

    def __init__(self, path: Path, schema: pa.Schema, upgrade: Callable[[pa.Table], pa.Table] = lambda rows: rows) -> None:
        """Open the journal at `path`, creating it if missing, and truncate a torn tail.

        Args: upgrade: adds the missing columns to rows of an older schema.
        Raises: DataError if it holds rows of another schema.
        """
        self.path = path
        self._schema = schema
        content = path.read_bytes() if path.exists() else b""
        whole = 0
        self.batches: list[pa.RecordBatch] = []
        """All rows of the journal."""
        found = schema
        for number, (end, message) in enumerate(_frames(content)):
            if number:
                self.batches.append(pa.ipc.read_record_batch(pa.py_buffer(message), found))
            elif message != schema.serialize().to_pybytes():
                found = self._older(message, upgrade)
            whole = end
        self.torn_bytes = len(content) - whole
        """Bytes truncated when it was opened."""
        if found != schema:
            whole = self._rewrite(upgrade(pa.Table.from_batches(self.batches, found)).select(schema.names))
        # Unbuffered: when `append` returns, the operating system has the bytes.
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole)
        self._synced = time.monotonic()
        if not whole:
            self._write(schema.serialize().to_pybytes())

    @property
    def num_rows(self) -> int:
        return sum(batch.num_rows for batch in self.batches)

    @property
    def num_bytes(self) -> int:
        """Size of the rows in memory."""
        return sum(batch.nbytes for batch in self.batches)

    def append(self, rows: pa.Table) -> None:
        """Add rows; once this returns, killing the process does not lose them."""
        for batch in rows.combine_chunks().to_batches():
            self._write(batch.serialize().to_pybytes())
            self.batches.append(batch)

    def clear(self) -> None:
        """Remove all rows: they are stored elsewhere."""
        self._file.truncate(0)
        self.batches = []
        self._write(self._schema.serialize().to_pybytes())

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def _older(self, message: bytes, upgrade: Callable[[pa.Table], pa.Table]) -> pa.Schema:
        """The older schema that a journal begins with. Raises: DataError if its rows cannot be upgraded to the current one."""
        try:
            found = pa.ipc.read_schema(pa.py_buffer(message))
            known = upgrade(found.empty_table()).schema
        except (pa.ArrowInvalid, KeyError):
            known = pa.schema([])
        if {field.name: field.type for field in known} != {field.name: field.type for field in self._schema}:
            raise DataError(
                f"{self.path}: holds rows of another version of kdray; let that version end the capture, or remove the file "
                "and ask for its rows again"
            )
        return found

    def _rewrite(self, rows: pa.Table) -> int:
        """Replace the file atomically by one with these rows. Returns: its size in bytes."""
        self.batches = rows.cast(self._schema).combine_chunks().to_batches()
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        with temporary.open("wb") as file:
            file.writelines(_framed(each.serialize().to_pybytes()) for each in (self._schema, *self.batches))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path)
        return self.path.stat().st_size

    def _write(self, message: bytes) -> None:
        frame = memoryview(_framed(message))
        while frame:
            frame = frame[self._file.write(frame) :]
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def _framed(message: bytes) -> bytes:
    return _HEADER.pack(len(message), zlib.crc32(message)) + message


def _frames(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(end offset, message) of every whole frame from the start on."""
    start = 0
    while start + _HEADER.size <= len(content):
        length, checksum = _HEADER.unpack_from(content, start)
        end = start + _HEADER.size + length
        message = content[start + _HEADER.size : end]
        # No message is empty: a file system leaves zeros for a frame that it had no time to write.
        if not length or end > len(content) or zlib.crc32(message) != checksum:
            return
        yield end, message
        start = end
