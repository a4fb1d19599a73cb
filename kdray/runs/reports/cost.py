"""Seconds of a run by stage, and what a million trained tokens cost in time of the run, of replicas and of the trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kdray.runs.reports.steps import TRAINING, WAITS, Steps
from kdray.runs.tracking.trackers import DISTILL

_BEGIN = {"start": "preparation", "starting": "engines start", "serving": "student starts"}
_END = ("finished", "failed", "interrupted")
_EVALUATION = "evaluation"


@dataclass(frozen=True)
class Stage:
    """Part of a run's time."""

    name: str
    begin: datetime
    end: datetime

    @property
    def seconds(self) -> float:
        return (self.end - self.begin).total_seconds()


def stages(events: Sequence[Mapping[str, Any]], steps: Steps) -> list[Stage]:
    """Stages in the order in which they ran, from events and steps' times, without the time between a stop and a resume.

    A supervised phase ends with its model's evaluation, where no event tells them apart.
    """
    found: list[Stage] = []
    name: str | None = None
    begin = now = None
    trained = None if steps.last_time is None else datetime.fromisoformat(steps.last_time)
    for event in events:
        if "time" not in event:
            continue
        now, kind = datetime.fromisoformat(event["time"]), event.get("kind")
        following = _following(event, name)
        evaluated = kind == "evaluation" and name == DISTILL
        # Whatever was trained before it: the last evaluation begins after the last step.
        if evaluated and begin is not None and trained is not None and begin <= trained <= now:
            found.append(Stage(DISTILL, begin, trained))
            name, begin = _EVALUATION, trained
        if following is _SAME:
            continue
        if name is not None and begin is not None and kind != "start":
            found.append(Stage(name, begin, now))
        name, begin = following, now
    if name is not None and begin is not None:
        latest = [] if steps.latest_time is None else [datetime.fromisoformat(steps.latest_time)]
        end = max([begin, *([now] if now else []), *latest])
        found.append(Stage(name, begin, end))
    return [stage for stage in found if stage.seconds > 0.0]


_SAME = "same"


def _following(event: Mapping[str, Any], name: str | None) -> str | None:
    """Stage that begins with an event; None where the run ends."""
    kind = event.get("kind")
    if kind in _END:
        return None
    if kind in _BEGIN:
        return _BEGIN[kind]
    if kind == "phase":
        return str(event.get("name"))
    # Checks of the signals come between a supervised phase and the first evaluation.
    return _EVALUATION if kind in ("parity", "signals") and name not in (DISTILL, _EVALUATION, None) else _SAME


def seconds_by_stage(ran: Sequence[Stage], steps: Steps) -> list[tuple[str, float]]:
    """(stage, seconds); distillation is followed by its parts, indented."""
    totals: dict[str, float] = defaultdict(float)
    for stage in ran:
        totals[stage.name] += stage.seconds
    rows = []
    for name, seconds in totals.items():
        rows.append((name, seconds))
        if name == DISTILL and steps.last_step is not None:
            parts = {TRAINING: "trained"} | WAITS
            known = [(words, steps.totals.get(metric, 0.0)) for metric, words in parts.items()]
            rows += [(f"{DISTILL}: {words}", spent) for words, spent in known]
            rest = seconds - sum(spent for _, spent in known)
            rows.append((f"{DISTILL}: everything else", max(rest, 0.0)))
    return rows


def replica_seconds(events: Sequence[Mapping[str, Any]], end: datetime) -> dict[str, float]:
    """Seconds of all replicas of each pool together, from its changes of size to the end of the run."""
    totals: dict[str, float] = defaultdict(float)
    held: dict[str, tuple[datetime, float]] = {}
    for event in events:
        if event.get("kind") == "replicas":
            now = datetime.fromisoformat(event["time"])
            since, count = held.get(event["pool"], (now, 0.0))
            totals[event["pool"]] += count * (now - since).total_seconds()
            held[event["pool"]] = (now, event["now"])
    for pool, (since, count) in held.items():
        totals[pool] += count * max((end - since).total_seconds(), 0.0)
    return dict(totals)


def costs(events: Sequence[Mapping[str, Any]], steps: Steps, tokens: int | None) -> list[tuple[str, float, float | None]]:
    """(what, seconds, seconds for a million trained tokens) of a run.

    Args: tokens: response tokens that distillation trained on; None if they are not known.
    """
    ran = stages(events, steps)
    rows = seconds_by_stage(ran, steps)
    if not ran:
        return []
    rows.append(("all stages", sum(stage.seconds for stage in ran)))
    rows += [(f"replicas of {pool}, added up", spent) for pool, spent in replica_seconds(events, ran[-1].end).items()]
    return [(what, seconds, seconds * 1e6 / tokens if tokens else None) for what, seconds in rows]
