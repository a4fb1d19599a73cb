"""Count of how often each of many whole numbers occurs, in memory for the irregular ones alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise


class Occurrences:
    """How often numbers occur, kept as the places where that changes: those that follow each other in order take none."""

    def __init__(self) -> None:
        self._changes: defaultdict[int, int] = defaultdict(int)
        self.total = 0
        """Occurrences of all numbers."""

    def add(self, numbers: Sequence[int]) -> bool:
        """Count these; return True if each is one more than the one before it."""
        count = len(numbers)
        if count and numbers == range_list(numbers[0], count):
            self.add_run(numbers[0], count)
            return True
        self.total += count
        for number in numbers:
            self._change(number, 1)
            self._change(number + 1, -1)
        return not count

    def add_run(self, first: int, count: int) -> None:
        """Count `count` numbers, at least one, from `first` on."""
        self.total += count
        self._change(first, 1)
        self._change(first + count, -1)

    def _change(self, at: int, by: int) -> None:
        self._changes[at] += by
        if not self._changes[at]:
            del self._changes[at]

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield ranges that cover all numbers that occur, in order: first, end, and how often each number of them occurs."""
        times = 0
        for begin, end in pairwise(sorted(self._changes)):
            times += self._changes[begin]
            if times:
                yield begin, end, times

    def missing(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges from `begin` to before `end` of which no number occurs: first and end."""
        at = begin
        for first, last, _ in self.ranges():
            if at >= end:
                return
            if first > at:
                yield at, min(first, end)
            at = max(at, last)
        if at < end:
            yield at, end

    @property
    def repeated(self) -> int:
        """Occurrences beyond the first of each number."""
        return sum((times - 1) * (end - begin) for begin, end, times in self.ranges())


def range_list(first: int, count: int) -> list[int]:
    """Return `count` numbers from `first` on."""
    return list(range(first, first + count))
