"""Weights & Biases tracker."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdray.config import Config
from kdray.config.trackers import WandbTracker
from kdray.runs.tracking.background import Background
from kdray.runs.tracking.naming import KeptId, described, flat, numbers

if TYPE_CHECKING:
    import wandb

_UPLOAD_S = 60.0
"""Longest wait for the upload at the end; `wandb sync` sends the rest from the run folder."""


def tracker(settings: WandbTracker) -> Background:
    return Background(Wandb(settings))


class Wandb:
    """`kdray.runs.tracking.trackers.Tracker` of a run at Weights & Biases; it waits for the service, so see `Background`.

    Curves have their own steps (`step`, `<phase>/step`) as x axis and not the service's, which must not go back: phases count
    from 1, and a resumed run repeats steps.
    """

    def __init__(self, settings: WandbTracker) -> None:
        self._settings = settings
        self._known: set[str] = set()
        self._events: Counter[str] = Counter()

    def start(self, config: Config, folder: Path) -> None:
        # Before the import, which reads it: error reports to the service's makers are the user's choice.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        held = KeptId(folder, "wandb", self._settings.entity, self._settings.project)
        run_id = held.read()
        if run_id is None:
            run_id = secrets.token_hex(4)
            held.write(run_id)
        self._run: wandb.Run = wandb.init(
            entity=self._settings.entity,
            project=self._settings.project,
            name=self._settings.name or config.run.name,
            tags=self._settings.tags,
            mode=self._settings.mode,
            id=run_id,
            resume="allow",
            allow_val_change=True,
            dir=folder,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                silent=True,
                # Concurrent runs (mutual learning) have one each.
                reinit="create_new",
                finish_timeout=_UPLOAD_S,
                finish_timeout_raises=True,
            ),
        )

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        found = numbers({**metrics, "step": step}, phase)
        (axis,) = numbers({"step": step}, phase)
        for name in found.keys() - self._known - {axis}:
            self._run.define_metric(name, step_metric=axis)
        self._known |= found.keys()
        self._run.log(found)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._events[kind] += 1
        self._run.summary.update({f"events/{kind}": self._events[kind], "last_event": described(kind, fields)})

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self._run.summary.update({f"summary/{path}": value for path, value in flat(summary or {}, "/")})
        self._run.finish(exit_code=0 if summary is not None else 130 if self._events["stopped"] else 1)
