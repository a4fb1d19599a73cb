"""Trackers of a run: told of every step and event, and never a reason for the run to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kdray.config import Config
from kdray.config.plugins import implemented
from kdray.runs.folder import plain

DISTILL = "distill"
"""Name of the phase that metrics.jsonl is about."""


class Tracker(Protocol):
    """What a tracker's settings make. The run waits for every call: slow work belongs in a thread of the tracker's own."""

    def start(self, config: Config, folder: Path) -> None:
        """The run begins, or goes on after an interruption, in which case its folder holds what the tracker left there."""
        ...

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """Numbers of one optimizer step, which counts from 1 anew in every phase (sft, distill, finetune, control).

        A resumed run repeats the steps after its checkpoint. Values may be None or not finite.
        """
        ...

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Whatever else happened, as `events.jsonl` has it: `start`, `phase`, `evaluation`, `checkpoint`, faults, `finished`.

        Comes from any thread.
        """
        ...

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The run ends. Args: summary: what summary.json holds; None where the run did not come that far."""
        ...


class Trackers:
    """The trackers of a run, in their order; one that fails is reported once and left out from then on."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Args: folder: the run's."""
        self._config = config
        self._folder = folder
        self._running: dict[str, Tracker] = {}
        self._report: Callable[..., None] = lambda kind, **fields: None

    def start(self, report: Callable[..., None]) -> None:
        """Make and start every tracker. Args: report: writes an event; called as `RunReporter.event` is."""
        self._report = report
        for number, settings in enumerate(self._config.run.trackers):
            # Two of one kind may be told apart by their settings alone.
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
                # It may have failed at an event that another one's failure was.
                if name in self._running:
                    getattr(tracker, verb)(*arguments)
            # A dashboard that is gone, or a bug in a tracker of others, costs its own curves and nothing else.
            except Exception as error:
                self._fail(name, verb, error)

    def _fail(self, name: str, verb: str, error: Exception) -> None:
        self._running.pop(name, None)
        self._report("tracker_failed", tracker=name, during=verb, reason=f"{type(error).__name__}: {error}")
