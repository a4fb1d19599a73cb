"""Registry of replicas: each registers at its start, rejected if it is not the teacher of this run, or reports its failure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from actors.serving.start_failure import StartFailure
from kdray.teachers.fingerprint import Fingerprint, difference


class TeacherRegistry:
    """Fingerprint of each teacher of a run, from the first replica on; an actor.

    A rejected replica ends, so nothing of it is ever trained on; Ray Serve restarts it, and it registers again: a teacher whose
    weights are restored returns by itself.
    """

    def __init__(self, known: dict[str, dict[str, Any]]) -> None:
        """Args: known: fingerprints by teacher, of the run that is resumed; empty for a new one."""
        self._known = {name: Fingerprint.from_dict(values) for name, values in known.items()}
        self._refused: list[tuple[str, str]] = []
        self._failures: dict[str, list[StartFailure]] = {}
        self._longest_start_s: dict[str, float] = {}

    def enter(self, teacher: str, found: Fingerprint) -> str | None:
        """Register a replica, the first one of a teacher as the reference for the others; returns the reason if it is
        rejected."""
        reason = difference(self._known.setdefault(teacher, found), found)
        if reason is not None:
            self._refused.append((teacher, reason))
        return reason

    def known(self) -> dict[str, dict[str, Any]]:
        """Fingerprints by teacher, for the run folder."""
        return {name: fingerprint.to_dict() for name, fingerprint in self._known.items()}

    def refused(self, teacher: str) -> list[str]:
        """Reasons for which replicas of a teacher were rejected so far, oldest first."""
        return [reason for name, reason in self._refused if name == teacher]

    def started(self, pool: str, seconds: float) -> None:
        """Register the time that a replica of a pool took to start, seconds."""
        self._longest_start_s[pool] = max(seconds, self.longest_start_s(pool))

    def longest_start_s(self, pool: str) -> float:
        """The longest that a replica of a pool took to start, seconds; 0 if none has."""
        return self._longest_start_s.get(pool, 0.0)

    def failed(self, pool: str, failure: StartFailure) -> None:
        """Store why an engine of a pool did not start; of a pool's logs only the newest is kept."""
        earlier = [replace(each, log="") for each in self._failures.get(pool, [])]
        self._failures[pool] = [*earlier, failure]

    def failures(self, pool: str) -> list[StartFailure]:
        """Failed starts of a pool's engines so far, oldest first."""
        return self._failures.get(pool, [])
