"""Changes of a bucket of weights since the version before, exactly: the 16-bit words of its file that differ, and where.

A weight in bfloat16 changes only when an update moves it past the middle between two numbers, so that at small learning rates a
few percent change from one version to the next. A published bucket is therefore references to a whole one and to all changes
since, in order: whoever fetches it applies them, and has the file that would have been published whole, bit for bit. No replica
has to hold a particular version before, and what a node has fetched for older versions is still there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK = 255
"""Words of a block: numbers of changes in it, and their places, are bytes."""
CHANGES = 0.5
"""Size of all changes since the whole bucket, as a share of its own, beyond which it is published whole again."""


@dataclass(frozen=True)
class Delta:
    """Words of a file that changed."""

    counts: np.ndarray
    """uint8 [blocks]: changed words in each block."""
    places: np.ndarray
    """uint8 [changed]: their places in their blocks, in order."""
    values: np.ndarray
    """uint16 [changed]: the new words."""

    @classmethod
    def of(cls, differs: np.ndarray, words: np.ndarray) -> Delta:
        """The words where a file differs from the one before. Args: differs: bool [words]; words: uint16 [words], the new."""
        at = np.flatnonzero(differs)
        counts = np.bincount(at // _BLOCK, minlength=_blocks(len(words)))
        return cls(counts.astype(np.uint8), (at % _BLOCK).astype(np.uint8), words[at])

    @staticmethod
    def size(changed: int, words: int) -> int:
        """Bytes of a delta."""
        return 3 * changed + _blocks(words)

    def apply(self, data: np.ndarray) -> None:
        """Change a file in place. Args: data: uint8 [bytes], the file before. Raises: ValueError for one of another size."""
        words = _words(data)
        if _blocks(len(words)) != len(self.counts):
            raise ValueError(f"changes of {len(self.counts)} blocks do not belong to a file of {data.nbytes} bytes")
        firsts = np.arange(0, _BLOCK * len(self.counts), _BLOCK)
        words[np.repeat(firsts, self.counts) + self.places] = self.values


def _blocks(words: int) -> int:
    return -(-words // _BLOCK)


def _words(data: np.ndarray) -> np.ndarray:
    return data.view(np.uint16)


@dataclass(frozen=True)
class Sent:
    """Volume of a version, or of one of its buckets."""

    nbytes: int
    """Bytes that are new: a node that has the versions before fetches no more."""
    words: int = 0
    """16-bit words that were compared with those of the version before; 0 if there was none to compare with."""
    changed: int = 0
    """Of these, the ones that differ."""

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.nbytes + other.nbytes, self.words + other.words, self.changed + other.changed)

    def metrics(self) -> dict[str, float]:
        """The version's numbers, by name."""
        share = {"update_changed": self.changed / self.words} if self.words else {}
        return {"update_bytes": float(self.nbytes), **share}


class Chain:
    """A bucket in the publisher: what replicas need of it, and the file that the next version is compared with."""

    def __init__(self, full_every: int, put: Callable[[Any], Any]) -> None:
        """Args: full_every: versions after which it is published whole again, 1 compares nothing; put: gives a reference."""
        self._full_every = full_every
        self._put = put
        self._last: np.ndarray | None = None
        self._references: list[Any] = []
        self._changes = 0
        """Bytes of all changes since the whole bucket."""

    def add(self, data: np.ndarray) -> tuple[list[Any], Sent]:
        """Put the bucket's next version: the references that make it up, and what is new.

        Args: data: uint8 [bytes], the file; it belongs to the chain from now on.
        """
        differs = self._differs(data)
        words = 0 if differs is None else len(differs)
        changed = 0 if differs is None else int(np.count_nonzero(differs))
        size = Delta.size(changed, words)
        if differs is None or (changed and not self._has_room(size, data.nbytes)):
            # Here and below before anything is noted: a put that fails leaves the chain as it was.
            self._references = [self._put(data)]
            self._changes, size = 0, data.nbytes
        elif changed:
            self._references = [*self._references, self._put(Delta.of(differs, _words(data)))]
            self._changes += size
        else:
            size = 0
        if self._full_every > 1:
            self._last = data
        return self._references, Sent(size, words, changed)

    def _differs(self, data: np.ndarray) -> np.ndarray | None:
        """Words that differ from the version before; None if there is none of the same size, in whole words."""
        if self._last is None or self._last.nbytes != data.nbytes or data.nbytes % 2:
            return None
        return _words(self._last) != _words(data)

    def _has_room(self, size: int, whole: int) -> bool:
        return len(self._references) < self._full_every and self._changes + size <= CHANGES * whole
