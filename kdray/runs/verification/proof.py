"""Result of verifying the files of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

SHOWN = 5
"""Maximum number of problems of one kind that are listed individually."""
_KEPT = 100
"""Maximum number that are kept; the others are counted."""


@dataclass
class Proof:
    """Result of verifying the files of a run."""

    state: str = "unfinished"
    """`finished`, `interrupted`, `failed`, or `unfinished`: still going, or killed."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(name, value) pairs."""
    notes: list[str] = field(default_factory=list)
    """Checks that were not possible, with the reason."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(kind, description with location) pairs: the first 100 of each kind."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of all problems, by kind."""

    def wrong(self, kind: str, what: str) -> None:
        """Add a problem."""
        self.counts[kind] += 1
        if self.counts[kind] <= _KEPT:
            self.problems.append((kind, what))

    def wrong_range(self, kind: str, begin: int, end: int, what: Callable[[int], str]) -> None:
        """Add a problem for every number from `begin` to before `end`."""
        told = min(end, begin + max(0, _KEPT - self.counts[kind]))
        for number in range(begin, told):
            self.wrong(kind, what(number))
        self.counts[kind] += end - told

    def described(self) -> list[str]:
        """Describe the problems, at most a few of each kind."""
        lines = []
        for kind, count in self.counts.items():
            lines += [f"{kind}: {what}" for one, what in self.problems if one == kind][:SHOWN]
            lines += [f"{kind}: {count - SHOWN} more"] if count > SHOWN else []
        return lines
