"""Comparison of several runs in one page: the settings in which they differ, their results with intervals, their curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdray.config import strict_yaml
from kdray.errors import DataError
from kdray.runs.folder import RunFolder, write_atomically
from kdray.runs.metrics import METRICS
from kdray.runs.reports.figures import curves
from kdray.runs.reports.pages import page, show
from kdray.runs.reports.steps import CURVES, OPTIONAL, Steps
from kdray.runs.results.comparison import OUTCOMES, show_interval

_NOT_COMPARED = ("run.name", "run.output", "run.storage")
"""Settings in which any two runs differ."""
_TOTALS = ("steps", "trained_tokens", "wall_s", "restarts")


@dataclass(frozen=True)
class _Run:
    name: str
    settings: Mapping[str, Any]
    """By dotted name."""
    summary: Mapping[str, Any]
    steps: Steps


def write_comparison(runs: Mapping[str, Path], to: Path) -> Path:
    """Write a page about several runs; returns its path.

    Args: runs: folder of each run, by where it came from; to: the file, which is replaced.
    Raises: DataError if one is no run folder, or a file cannot be read or written.
    """
    if to.is_dir():
        raise DataError(f"--to {to}: is a folder; give a file, such as {to / 'comparison.html'}")
    found = [_read(source, path) for source, path in runs.items()]
    # Runs of one name in several places are told apart by the places.
    names = [run.name for run in found]
    outcomes = _outcomes(found)
    titles = names if len(set(names)) == len(names) else list(runs)
    html = page(
        "comparison.html",
        name=" / ".join(titles),
        titles=titles,
        sources=list(zip(titles, runs, strict=True)),
        verdicts=[(title, run.summary.get("verdict"), _gap(run)) for title, run in zip(titles, found, strict=True)],
        settings=_settings(found),
        outcomes=outcomes,
        apart=_apart(found) & {metric for metric, _ in outcomes},
        resampling=next((each for run in found if (each := run.summary.get("resampling"))), None),
        totals=[(name, [show(run.summary.get(name)) for run in found]) for name in _TOTALS],
        curves=_curves(dict(zip(titles, found, strict=True))),
        meanings=METRICS,
    )
    try:
        write_atomically(to, html)
    except OSError as error:
        raise DataError(f"--to {to}: cannot be written: {error.strerror}; give a file in a folder that is there") from error
    return to


def _read(source: str, path: Path) -> _Run:
    folder = RunFolder.open(path)
    try:
        # As it stands there: a recipe of another version of kdray can be compared, too.
        settings = dict(_flat(strict_yaml.load(folder.config.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{folder.config}: not valid YAML: {error}") from error
    summary = folder.read_summary() if folder.summary.exists() else {}
    # The copy of a stored run lies in a folder of another name.
    name = Path(source.rstrip("/")).name if "://" in source else folder.path.resolve().name
    return _Run(name, settings, summary, Steps.read(folder.metrics))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value)]


def _settings(runs: list[_Run]) -> list[tuple[str, list[str]]]:
    """Rows of the settings in which the runs differ; one that a run lacks is empty."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [show(run.settings[name]) if name in run.settings else "" for run in runs]
        if len(set(values)) > 1 and name not in _NOT_COMPARED:
            rows.append((name, values))
    return rows


def _outcomes(runs: list[_Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """(metric, rows of (evaluation, a cell for each run)) of every metric that a run has."""

    def numbers(run: _Run, evaluation: str) -> Mapping[str, Any]:
        found = run.summary.get(evaluation)
        return found if isinstance(found, dict) else {}

    metrics = dict.fromkeys(metric for run in runs for evaluation in OUTCOMES for metric in numbers(run, evaluation))
    found = []
    for metric in metrics:
        rows = []
        for evaluation in OUTCOMES:
            values = [numbers(run, evaluation).get(metric) for run in runs]
            if any(value is not None for value in values):
                cells = [
                    show(value) + show_interval(run.summary.get("intervals"), evaluation, metric) if value is not None else ""
                    for run, value in zip(runs, values, strict=True)
                ]
                rows.append((evaluation, cells))
        found.append((metric, rows))
    return found


def _apart(runs: list[_Run]) -> set[str]:
    """Metrics without an interval in any run, where others have one: counts, and numbers that have no mean over prompts."""
    with_interval = {name for run in runs for found in run.summary.get("intervals", {}).values() for name in found}
    everything = {name for run in runs for found in run.summary.values() if isinstance(found, dict) for name in found}
    return everything - with_interval if with_interval else set()


def _gap(run: _Run) -> str | None:
    gap = run.summary.get("gap_closed")
    if not isinstance(gap, Mapping) or gap.get("value") is None:
        return None
    return f"{gap['value']:.0%} ({gap['low']:.0%} to {gap['high']:.0%})"


def _curves(runs: Mapping[str, _Run]) -> list[tuple[str, str, Any]]:
    """(title, metric, figure or None) of every metric that is plotted, with a line for each run."""
    found = []
    for title, unit, names in CURVES:
        for name in names:
            trained = {run: each.steps.curve(name) for run, each in runs.items()}
            heldout = {f"{run}, held-out": each.steps.curve(f"heldout/{name}") for run, each in runs.items()}
            figure = curves(trained | heldout, unit, f"{title}: {name}")
            if figure is not None or title not in OPTIONAL:
                found.append((title, name, figure))
    return found
