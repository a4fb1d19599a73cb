"""Steps of a run as its pages show them: read from metrics.jsonl a line at a time, in memory that does not grow with the run.

Short runs are shown as they are. In a long one, neighbours are put together, two by two whenever there are too many: a curve
keeps the least and greatest point of each part and its mean, the time line the seconds of each part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from kdray.runs.lines.streams import stream

HELD_BACK = ("wait_evaluation_s", "wait_checkpoint_s")
"""Waits for what runs beside the steps."""

CURVES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "nats per token", ("loss",)),
    ("Divergence from the teacher", "nats per token", ("reverse_kl", "forward_kl")),
    ("Trainer against replicas", "nats per token", ("rollout_gap", "parity_gap")),
    ("Rewards", "1", ("reward", "reward_contrast")),
    ("Response tokens", "tokens", ("response_tokens",)),
    ("Importance weights", "weight", ("importance_weight_mean", "importance_weight_ess")),
    ("Staleness", "steps", ("staleness_mean", "staleness_max")),
    ("Speed", "tokens per second", ("tokens_per_s",)),
    ("Teacher replicas", "replicas", ("teacher_replicas",)),
    ("Waits", "seconds per step", ("wait_rollout_s", "wait_teacher_s", "wait_sync_s", *HELD_BACK)),
)
"""Title, unit and metrics of each plot of curves."""

OPTIONAL = ("Rewards",)
"""Plots that are left out if no step has a value: runs without what they show are no less whole."""

WAITS = {
    "wait_rollout_s": "waited for rollouts",
    "wait_teacher_s": "waited for teachers' scores",
    "wait_sync_s": "waited for the copy of its weights",
    "wait_evaluation_s": "waited for evaluations",
    "wait_checkpoint_s": "waited for checkpoints",
}
TRAINING = "train_step_s"

_DRAWN = frozenset(name for _, _, names in CURVES for name in names)
_PREFIXES = ("teacher/", "heldout/")
"""Of the same metrics for a single teacher, or on the held-out prompts, which are measured at some steps only."""
_WINDOWS = 40
_MOST_PARTS = 1024
"""Parts of a curve, of which each is drawn as two points: browsers handle only a few thousand points well."""
_MOST_BINS = 120

Point = tuple[int, float | None]


class _Part:
    """Neighbouring points of a curve; those without a value count for nothing."""

    __slots__ = ("count", "greatest", "last_step", "least", "total")

    def __init__(self, step: int, value: float | None) -> None:
        self.least = self.greatest = (step, value)
        self.last_step = step
        self.total, self.count = (0.0, 0) if value is None else (value, 1)

    def join(self, other: _Part) -> None:
        """Take in the points that follow."""
        self.last_step = other.last_step
        if other.count:
            if not self.count or _value(other.least) < _value(self.least):
                self.least = other.least
            if not self.count or _value(other.greatest) > _value(self.greatest):
                self.greatest = other.greatest
            self.total += other.total
            self.count += other.count


def _value(point: Point) -> float:
    value = point[1]
    assert value is not None, "asked of parts with values alone"
    return value


class Curve:
    """Values of a metric over steps. First, last, least and greatest are exact whatever is put together."""

    def __init__(self, points: Iterable[Point] = ()) -> None:
        self.num_points = 0
        self.first: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None
        self._last_point: Point | None = None
        self._parts: list[_Part] = []
        self._width, self._in_last = 1, 0
        for step, value in points:
            self.add(step, value)

    def add(self, step: int, value: float | None) -> None:
        self.num_points += 1
        self._last_point = (step, value)
        if value is not None:
            self.last = (step, value)
            self.first = self.first or self.last
        part = _Part(step, value)
        if self._parts and self._in_last < self._width:
            self._parts[-1].join(part)
            self._in_last += 1
            return
        if len(self._parts) == _MOST_PARTS:
            for left, right in zip(self._parts[::2], self._parts[1::2], strict=True):
                left.join(right)
            self._parts = self._parts[::2]
            self._width *= 2
        self._parts.append(part)
        self._in_last = 1

    @property
    def span(self) -> tuple[float, float]:
        """Least and greatest value."""
        known = [part for part in self._parts if part.count]
        return min(_value(part.least) for part in known), max(_value(part.greatest) for part in known)

    def points(self) -> list[Point]:
        """Every point of a short run; least and greatest of each part, in their order, and the last of a long one."""
        found: list[Point] = []
        for part in self._parts:
            found += dict.fromkeys(sorted((part.least, part.greatest), key=lambda point: point[0]))
        if self._last_point is not None and found[-1] != self._last_point:
            found.append(self._last_point)
        return found

    def running_mean(self) -> list[Point]:
        """Mean over a fortieth of the points, which ends at each of them; points without a value are left out."""
        known = [part for part in self._parts if part.count]
        window = max(1, len(known) // _WINDOWS)
        means: list[Point] = []
        total, count = 0.0, 0
        for index, part in enumerate(known):
            total, count = total + part.total, count + part.count
            if index >= window:
                total, count = total - known[index - window].total, count - known[index - window].count
            means.append((part.last_step, total / count))
        return means


class _Bin:
    """Steps that follow each other: when the last one ended, and seconds by what was done."""

    __slots__ = ("end", "seconds")

    def __init__(self, end: str, seconds: dict[str, float]) -> None:
        self.end, self.seconds = end, seconds

    def join(self, other: _Bin) -> None:
        """Take in the steps that follow."""
        self.end = other.end
        for name, spent in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


class Steps:
    """What the pages show of the lines of metrics.jsonl. Lines without a step are passed over."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.last_step: int | None = None
        self.curves: dict[str, Curve] = {}
        self.totals: dict[str, float] = defaultdict(float)
        """Sums over all steps, of what a step's seconds were spent on."""
        self.last_time: str | None = None
        """When the last line was written; ISO-8601 in UTC, so that texts compare as times do."""
        self.latest_time: str | None = None
        self._begin: str | None = None
        self._bins: list[_Bin] = []
        self._width, self._in_last = 1, 0
        self._kinds: dict[str, tuple[bool, bool]] = {}
        for line in lines:
            self.add(line)

    @classmethod
    def read(cls, path: Path) -> Steps:
        """Read a file of metrics; there are no steps if there is no file. Raises: DataError naming file and line."""
        return cls(line for line, _ in stream(path, dict[str, Any]))

    def add(self, line: Mapping[str, Any]) -> None:
        if "step" not in line:
            return
        step = line["step"]
        self.last_step = step if self.last_step is None else max(step, self.last_step)
        seconds: dict[str, float] = {}
        for name, value in line.items():
            kinds = self._kinds.get(name)
            if kinds is None:
                kinds = self._kinds[name] = (_is_drawn(name), _is_spent(name))
            drawn, spent = kinds
            if drawn:
                if name not in self.curves:
                    self.curves[name] = Curve()
                self.curves[name].add(step, value)
            if spent:
                seconds[name] = value or 0.0
                self.totals[name] += value or 0.0
        if "time" in line:
            self._add_time(line["time"], seconds)

    def _add_time(self, time: str, seconds: dict[str, float]) -> None:
        self.last_time = time
        self.latest_time = max(time, self.latest_time or time)
        if self._begin is None:
            # When the first step began is in no line.
            self._begin = time
            return
        new = _Bin(time, seconds)
        if self._bins and self._in_last < self._width:
            self._bins[-1].join(new)
            self._in_last += 1
            return
        if len(self._bins) == _MOST_BINS:
            for left, right in zip(self._bins[::2], self._bins[1::2], strict=True):
                left.join(right)
            self._bins = self._bins[::2]
            self._width *= 2
        self._bins.append(new)
        self._in_last = 1

    def shares(self) -> dict[str, list[tuple[str, float]]]:
        """(time, share of the time around it) of what the trainer did, by what it did, over bins of equally many steps.

        Waits of single teachers are named where there are several of them.
        """
        if self._begin is None or not self._bins:
            return {}
        teachers = sorted(name for name in self.totals if name.startswith(_PREFIXES))
        names = {TRAINING: "trained"} | WAITS
        if len(teachers) > 1:
            names = {name: words for name, words in names.items() if name not in ("wait_rollout_s", "wait_teacher_s")}
            names |= {name: f"waited for {name.split('/')[1]}" for name in teachers}
        found: dict[str, list[tuple[str, float]]] = {words: [] for words in names.values()}
        begin = datetime.fromisoformat(self._begin)
        for each in self._bins:
            end = datetime.fromisoformat(each.end)
            lasted = (end - begin).total_seconds()
            for name, words in names.items():
                share = min(each.seconds.get(name, 0.0) / lasted, 1.0) if lasted > 0 else 0.0
                found[words].append((each.end, share))
            begin = end
        return found

    def curves_of(self, names: Iterable[str]) -> dict[str, Curve]:
        """Curves of metrics, and of the same metrics of single teachers and on held-out prompts."""
        names = tuple(names)
        others = sorted(name for name in self.curves if name.startswith(_PREFIXES) and name.split("/")[-1] in names)
        return {name: self.curve(name) for name in (*names, *others)}

    def curve(self, name: str) -> Curve:
        """The curve of a metric; an empty one if no step has it."""
        return self.curves.get(name) or Curve()


def _is_drawn(name: str) -> bool:
    return name in _DRAWN or (name.startswith(_PREFIXES) and name.split("/")[-1] in _DRAWN)


def _is_spent(name: str) -> bool:
    return name == TRAINING or name in WAITS or (name.startswith("teacher/") and name.endswith("/wait_s"))
