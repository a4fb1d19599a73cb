"""An append-only file of Arrow rows that survives `kill -9`: what was appended is there again when it is opened next.

A frame is the length and the CRC-32 of what follows, and an Arrow IPC message: first the schema's, then a record batch for each
append. A frame is written by one call, straight to the operating system; a kill can cut the last one at any byte, and a machine
that goes down can leave anything behind the last sync. So the file counts up to its last whole frame, and the rest is cut off.
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
"""Bytes of the message, and their CRC-32."""
_SYNC_S = 1.0
"""Most that a machine that goes down can lose, in seconds of work; a process that is killed loses nothing."""


class Journal:
    """Opened by one process at a time; `close` at the end."""

    def __init__(self, path: Path, schema: pa.Schema, upgrade: Callable[[pa.Table], pa.Table] = lambda rows: rows) -> None:
        """Open the journal at `path`, new where there is none, and cut off a torn tail.

        Args: upgrade: gives rows of an older schema the columns that they lack.
        Raises: DataError where it holds rows of another schema.
        """
        self.path = path
        self._schema = schema
        content = path.read_bytes() if path.exists() else b""
        whole = 0
        self.batches: list[pa.RecordBatch] = []
        """All that it holds."""
        found = schema
        for number, (end, message) in enumerate(_frames(content)):
            if number:
                self.batches.append(pa.ipc.read_record_batch(pa.py_buffer(message), found))
            elif message != schema.serialize().to_pybytes():
                found = self._older(message, upgrade)
            whole = end
        self.torn_bytes = len(content) - whole
        """Bytes that were cut off when it was opened."""
        if found != schema:
            whole = self._rewrite(upgrade(pa.Table.from_batches(self.batches, found)).select(schema.names))
        # Unbuffered: what `append` returned from is the operating system's.
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
        """Of the rows, in memory."""
        return sum(batch.nbytes for batch in self.batches)

    def append(self, rows: pa.Table) -> None:
        """Add rows; from then on no kill of this process loses them."""
        for batch in rows.combine_chunks().to_batches():
            self._write(batch.serialize().to_pybytes())
            self.batches.append(batch)

    def clear(self) -> None:
        """Forget all rows: they are kept elsewhere."""
        self._file.truncate(0)
        self.batches = []
        self._write(self._schema.serialize().to_pybytes())

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def _older(self, message: bytes, upgrade: Callable[[pa.Table], pa.Table]) -> pa.Schema:
        """The older schema that a journal begins with. Raises: DataError where its rows cannot become those of this one."""
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
        """Replace the file by one of these rows, whole or not at all. Returns: its size in bytes."""
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
    """(where it ends, message) of every whole frame from the start on."""
    start = 0
    while start + _HEADER.size <= len(content):
        length, checksum = _HEADER.unpack_from(content, start)
        end = start + _HEADER.size + length
        message = content[start + _HEADER.size : end]
        # No message is empty: zeros are what a file system leaves of a frame that it had no time to write.
        if not length or end > len(content) or zlib.crc32(message) != checksum:
            return
        yield end, message
        start = end
