"""Trackers of a run, which receive every step and event; their failures never end the run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kdray.config import Config
from kdray.config.plugins import implemented
from kdray.runs.folder import plain

DISTILL = "distill"
"""Name of the phase that metrics.jsonl covers."""

_SECRET = ("KEY", "TOKEN", "PASSWORD", "SECRET")
_SHORTEST_SECRET = 8
"""Characters of a secret; shorter values are words such as `true`."""


class Tracker(Protocol):
    """Tracker that a tracker's settings build. Calls block the run; see
    `kdray.runs.tracking.background` for one that waits for a service."""

    def start(self, config: Config, folder: Path) -> None:
        """Called when the run starts or resumes; on a resume, the folder contains the tracker's earlier files."""
        ...

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """Log metrics of an optimizer step, counted from 1 in every phase (sft, distill, finetune, control).

        A resumed run repeats the steps after its checkpoint. Values may be None or non-finite.
        """
        ...

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Log an event, as in `events.jsonl`: `start`, `phase`, `evaluation`, `checkpoint`, faults, `finished`.

        Called from any thread.
        """
        ...

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Called when the run ends. Args: summary: content of summary.json; None if the run ended before writing it."""
        ...


class Trackers:
    """Trackers of a run, in order; one that fails is reported once and skipped from then on."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Args: folder: the run's folder."""
        self._config = config
        self._folder = folder
        self._running: dict[str, Tracker] = {}
        self._report: Callable[..., None] = lambda kind, **fields: None

    def start(self, report: Callable[..., None]) -> None:
        """Build and start every tracker. Args: report: writes an event; called like `RunReporter.event`."""
        self._report = report
        for number, settings in enumerate(self._config.run.trackers):
            # Two trackers of one type may differ in their settings only.
            name = settings.type if settings.type not in self._running else f"{settings.type}-{number}"
            try:
                tracker = implemented(settings)
                tracker.start(self._config, self._folder)
                self._running[name] = tracker
            # As in `_each`.
            except Exception as error:
                self._fail(name, "start", error)

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._each("log", step, metrics, phase)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._each("event", kind, plain(fields))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self._each("close", summary)
        self._running = {}

    def _each(self, verb: str, *arguments: Any) -> None:
        for name, tracker in list(self._running.items()):
            try:
                # It may have failed on the event that reported another tracker's failure.
                if name in self._running:
                    getattr(tracker, verb)(*arguments)
            # An unreachable dashboard, or a bug in a plugin's tracker, only loses that tracker's curves.
            except Exception as error:
                self._fail(name, verb, error)

    def _fail(self, name: str, verb: str, error: Exception) -> None:
        self._running.pop(name, None)
        self._report("tracker_failed", tracker=name, during=verb, reason=_without_secrets(f"{type(error).__name__}: {error}"))


def _without_secrets(text: str) -> str:
    """The text without secrets of the environment: a service's error may quote its key, or an address with a password."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and any(word in name.upper() for word in _SECRET):
            text = text.replace(value, "***")
    return re.sub(r"//[^/@\s]+@", "//***@", text)
