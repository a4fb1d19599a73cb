"""Files that only grow, as segments in a storage: every byte of them is sent once.

A segment is the file `segments/<name>/<begin>-<end>-<generation>-<digest>` with the bytes from `begin` to before `end`. A
driver's generation is above all that it finds, and it begins where its own file no longer is what the storage has, as after a
resume from an earlier step. Its first segment there cuts off what older generations have from that place on, even if that is
never deleted, or is written later by a driver that has lost the run: a chain of segments never goes back to an older
generation. So the chain is at every moment the file of one driver, as of one of its calls of `send`.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdray.errors import DataError
from kdray.runs.storage import Storage, part_chunks

SEGMENTS = "segments"
"""Folder of a storage with the segments of all files."""

_AT_ONCE = 64
"""Segments that are fetched together, and lie on the disk twice meanwhile."""
_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-([0-9a-f]{16})")


@dataclass(frozen=True, order=True)
class Segment:
    """Part of a file, as its name in the storage describes it."""

    begin: int
    end: int
    generation: int
    digest: str
    """First 16 digits of the SHA-256 of its bytes."""

    @property
    def name(self) -> str:
        return f"{self.begin:014d}-{self.end:014d}-{self.generation:014d}-{self.digest}"


def segments_of(keys: Iterable[str]) -> dict[str, list[Segment]]:
    """Return the segments among the keys of a storage, by the name of the file that they are of."""
    found: defaultdict[str, list[Segment]] = defaultdict(list)
    for key in keys:
        folder, _, last = key.rpartition("/")
        if folder.startswith(f"{SEGMENTS}/") and (match := _NAME.fullmatch(last)):
            begin, end, generation = (int(number) for number in match.groups()[:3])
            found[folder.removeprefix(f"{SEGMENTS}/")].append(Segment(begin, end, generation, match[4]))
    return dict(found)


def chain(segments: Iterable[Segment]) -> list[Segment]:
    """Return the segments that make up the file, in order; those that newer generations have replaced are left out."""
    begins: defaultdict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        begins[segment.begin].append(segment)
    found: list[Segment] = []
    at = generation = 0
    while here := [each for each in begins.get(at, []) if each.generation >= generation]:
        newest = max(here, key=lambda each: (each.generation, each.end))
        if newest.end == at:
            # Cut off by a driver that has sent nothing more.
            break
        found.append(newest)
        at, generation = newest.end, newest.generation
    return found


class GrowingFile:
    """A local file that grows, and its segments in a storage."""

    def __init__(self, storage: Storage, name: str, path: Path) -> None:
        """Args: name: of the file in the run folder."""
        self._storage = storage
        self._name = name
        self._path = path
        self._sent: int | None = None
        """Bytes that the storage has; None as long as that was not looked at."""
        self._generation = 0

    def send(self, found: Sequence[Segment]) -> int:
        """Upload what was appended since the last call; return the number of bytes.

        Args: found: segments in the storage, which only the first call needs. Raises: StorageError.
        """
        # Before the bytes are read: lines appended meanwhile are sent the next time.
        size = self._path.stat().st_size
        if self._sent is not None and size >= self._sent:
            sent = self._put(self._sent, size) if size > self._sent else 0
        else:
            sent = self._continue(found, size)
        self._sent = size
        return sent

    def _continue(self, found: Sequence[Segment], size: int) -> int:
        """Send from where the storage's file and the local one differ, and delete what the storage has beyond that."""
        kept = matching(chain(found), self._path, size)
        begin = kept[-1].end if kept else 0
        gone = [each for each in found if each not in kept]
        newest = max((each.generation for each in found), default=0)
        # The time, too: two drivers that find the same differ.
        self._generation = max(newest + 1, time.time_ns() // 1_000_000)
        sent = self._put(begin, size) if size > begin or gone else 0
        for each in sorted(gone, reverse=True):
            self._storage.delete(f"{SEGMENTS}/{self._name}/{each.name}")
        return sent

    def _put(self, begin: int, end: int) -> int:
        segment = Segment(begin, end, self._generation, digest_of(self._path, begin, end))
        self._storage.put_part(self._path, begin, end, f"{SEGMENTS}/{self._name}/{segment.name}")
        return end - begin


def matching(segments: Sequence[Segment], path: Path, size: int) -> list[Segment]:
    """Return the first segments of a chain whose bytes are those of the first `size` bytes of a local file."""
    found = []
    for each in segments:
        if each.end > size or digest_of(path, each.begin, each.end) != each.digest:
            break
        found.append(each)
    return found


def digest_of(path: Path, begin: int, end: int) -> str:
    """Digest of a part of a file, as in a segment's name."""
    sha256 = hashlib.sha256()
    for chunk in part_chunks(path, begin, end):
        sha256.update(chunk)
    return sha256.hexdigest()[:16]


def fetch_segments(storage: Storage, files: Mapping[str, Path], found: Mapping[str, Sequence[Segment]]) -> None:
    """Put files together from their segments; each appears at its path when it is whole.

    Args: files: path to write, by name; found: segments of each. Raises: StorageError; DataError naming a damaged segment.
    """
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = chain(found[name])
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with tempfile.TemporaryDirectory(prefix=".segments-", dir=path.parent) as folder, temporary.open("wb") as target:
                _append_parts(storage, name, parts, Path(folder), target.write)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _append_parts(storage: Storage, name: str, parts: Sequence[Segment], folder: Path, write: Callable[[bytes], int]) -> None:
    for first in range(0, len(parts), _AT_ONCE):
        some = {f"{SEGMENTS}/{name}/{each.name}": each for each in parts[first : first + _AT_ONCE]}
        files = {key: folder / each.name for key, each in some.items()}
        for key, digest in storage.get_files(files).items():
            if digest.sha256[:16] != some[key].digest:
                raise DataError(f"{storage.url}/{key}: does not hold what was written; restore it from a copy")
            for chunk in part_chunks(files[key], 0, digest.size):
                write(chunk)
            files[key].unlink()
