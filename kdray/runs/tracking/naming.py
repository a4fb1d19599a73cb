"""Names under which other services know a run: of its numbers, settings and events, and its id."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdray.runs.folder import TRACKER_IDS, write_atomically
from kdray.runs.tracking.trackers import DISTILL

_writing = threading.Lock()


def numbers(metrics: Mapping[str, float], phase: str) -> dict[str, float]:
    """Finite metrics by name, with a prefix `<phase>/` for any phase but distillation.

    What describes a part of the run keeps its path as in metrics.jsonl: `teacher/main/staleness_0/importance_weight_ess`.
    """
    prefix = "" if phase == DISTILL else f"{phase}/"
    return {f"{prefix}{name}": float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}


def flat(tree: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every leaf of nested mappings; lists are leaves, and empty mappings have none."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, separator, f"{prefix}{name}{separator}")
        else:
            yield f"{prefix}{name}", value


def described(kind: str, fields: Mapping[str, Any]) -> str:
    """An event as a line of text."""
    return " ".join([kind, *(f"{name}={value}" for name, value in fields.items())])


class KeptId:
    """Id of the run at a service, kept in the run folder so that a resumed run is continued there."""

    def __init__(self, folder: Path, service: str, *where: str | None) -> None:
        """Args: where: what the id belongs to, such as a server and a project. A run that is sent elsewhere gets another id."""
        # As a digest: an address may have come with a password, from the environment.
        digest = hashlib.sha256(json.dumps(where).encode()).hexdigest()[:8]
        self._path = folder / TRACKER_IDS
        self._key = f"{service}-{digest}"

    def read(self) -> str | None:
        found = self._all().get(self._key)
        return found if isinstance(found, str) else None

    def write(self, run_id: str) -> None:
        # Every tracker has a thread of its own.
        with _writing:
            write_atomically(self._path, json.dumps(self._all() | {self._key: run_id}, indent=2) + "\n")

    def _all(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        held = json.loads(self._path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise ValueError(f"{self._path}: expected a JSON object, found {type(held).__name__}; remove the file")
        return held
