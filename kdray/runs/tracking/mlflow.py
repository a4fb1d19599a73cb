"""MLflow tracker."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdray.config import Config
from kdray.config.trackers import MlflowTracker
from kdray.runs.folder import utc_now
from kdray.runs.tracking.background import Background
from kdray.runs.tracking.naming import KeptId, described, flat, numbers

_BATCH = 100
"""Parameters in a request, and its limit on metrics is higher."""
_LONGEST_TEXT = 500
"""Characters of a parameter or tag that every version of the server takes."""


def tracker(settings: MlflowTracker) -> Background:
    return Background(Mlflow(settings))


class Mlflow:
    """`kdray.runs.tracking.trackers.Tracker` of a run at an MLflow server or in a local database.

    Every call waits for the server, so see `Background`.
    """

    def __init__(self, settings: MlflowTracker) -> None:
        self._settings = settings
        self._events: Counter[str] = Counter()

    def start(self, config: Config, folder: Path) -> None:
        # Before the import, which reads it: usage reports to the makers are the user's choice.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Notices about the tables of a new database; the terminal is the run's.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.entities import Param, RunStatus
        from mlflow.tracking import MlflowClient

        local = f"sqlite:///{config.run.output.absolute()}/mlflow.db"
        uri = self._settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        self._client = MlflowClient(uri)
        held = KeptId(folder, "mlflow", uri, self._settings.experiment)
        run_id = held.read()
        if run_id is not None:
            self._id = run_id
            self._client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
            return
        self._id = self._client.create_run(
            self._experiment(), run_name=self._settings.name or config.run.name, tags={**self._settings.tags}
        ).info.run_id
        held.write(self._id)
        # Of the start alone: the service lets no parameter change. What a resume changes is an event.
        settings = flat(config.model_dump(mode="json"), ".")
        parameters = [Param(_key(path), str(value)[:_LONGEST_TEXT]) for path, value in settings]
        for first in range(0, len(parameters), _BATCH):
            self._client.log_batch(self._id, params=parameters[first : first + _BATCH])

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._log(numbers(metrics, phase), step)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        self._events[kind] += 1
        last = f"{utc_now()} {described(kind, fields)}"[:_LONGEST_TEXT]
        tags = {_key(f"events.{kind}"): str(self._events[kind]), "last_event": last}
        self._client.log_batch(self._id, tags=[RunTag(name, value) for name, value in tags.items()])

    def close(self, summary: Mapping[str, Any] | None) -> None:
        leaves = dict(flat(summary or {}, "/"))
        measured = {f"summary/{path}": float(value) for path, value in leaves.items() if isinstance(value, int | float)}
        self._log(measured, step=0)
        for path, value in leaves.items():
            if isinstance(value, str):
                self._client.set_tag(self._id, _key(f"summary.{path}"), value[:_LONGEST_TEXT])
        status = "FINISHED" if summary is not None else "KILLED" if self._events["stopped"] else "FAILED"
        self._client.set_terminated(self._id, status)

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._settings.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:
            # Another run may have made it meanwhile.
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def _log(self, found: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(_key(name), value, now, step) for name, value in found.items()])


def _key(name: str) -> str:
    """A name of the characters that the service takes."""
    return re.sub(r"[^\w\-. /]", "_", name)
