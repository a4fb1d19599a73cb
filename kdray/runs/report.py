"""Report of a run as a single HTML file that opens without a network. All values are read from the run folder.

Works on a run that is still going or has crashed: data not available yet is reported as missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdray.data.dataset import ROWS_DROPPED
from kdray.errors import DataError
from kdray.runs.folder import RunFolder, write_atomically
from kdray.runs.lines.events import read_events
from kdray.runs.metrics import METRICS
from kdray.runs.reports.cost import costs
from kdray.runs.reports.figures import curves
from kdray.runs.reports.pages import page, show
from kdray.runs.reports.samples import heldout, training_samples
from kdray.runs.reports.steps import CURVES, OPTIONAL, Steps
from kdray.runs.reports.timeline import timeline
from kdray.runs.results.comparison import OUTCOMES, headlines, show_interval
from kdray.runs.results.harness import read_results, rows

_APART = (
    *("versions", "plugins"),
    *("verdict", "gap_closed", "teacher_left_out", "warnings", "intervals", "differences", "resampling"),
)
"""Entries of summary.json that have places of their own."""

_MAX_EVENTS = 1000


def write_report(run_folder: Path) -> Path:
    """Write report.html into the run folder and return its path.

    Raises: DataError if the folder has no files of a run, or one of them cannot be read.
    """
    folder = RunFolder(Path(run_folder))
    if not any(path.exists() for path in (folder.config, folder.metrics, folder.events, folder.summary)):
        raise DataError(f"{run_folder}: not a run folder (no config.yaml, no metrics.jsonl); give one such as runs/<name>")
    summary = folder.read_summary() if folder.summary.exists() else {}
    steps = Steps.read(folder.metrics)
    told = read_events(folder.events)
    events = told.kept
    outcome_columns = [name for name in OUTCOMES if isinstance(summary.get(name), dict)]
    installed = [summary.get(key) for key in ("versions", "plugins")]
    versions = {name: version for each in installed if isinstance(each, dict) for name, version in each.items()}
    shown_events = events[-_MAX_EVENTS:]
    answers, samples = heldout(folder), training_samples(folder.samples)
    tokens = summary.get("trained_tokens")
    html = page(
        "run.html",
        name=folder.path.resolve().name,
        last_step=steps.last_step,
        missing=[path.name for path in (folder.config, folder.metrics, folder.events, folder.summary) if not path.exists()],
        headlines=headlines(summary),
        gap=_gap(summary.get("gap_closed")),
        outcome_columns=outcome_columns,
        outcomes=_outcomes(summary, outcome_columns),
        pairs=list(summary.get("differences", {})),
        differences=_differences(summary.get("differences", {})),
        left_out=next((line for line in reversed(events) if line.get("kind") == ROWS_DROPPED), None),
        resampling=summary.get("resampling"),
        by_tasks=_by_tasks(measured := read_results(folder)),
        measured=list(measured),
        totals={key: show(value) for key, value in summary.items() if key not in (*outcome_columns, *_APART)},
        costs=[(what, f"{spent:,.1f}", _rounded(each)) for what, spent, each in costs(events, steps, tokens)],
        tokens=show(tokens) if tokens else None,
        versions={key: show(value) for key, value in versions.items()},
        timeline=timeline(steps, events),
        curves=_curves(steps),
        events=[
            (
                line.get("time", ""),
                line.get("kind", ""),
                ", ".join(f"{key}={show(value)}" for key, value in line.items() if key not in ("time", "kind")),
            )
            for line in shown_events
        ],
        num_events=told.counts.total(),
        heldout=answers,
        samples=samples,
        references=any(row.get("reference") for row in samples),
        shaded_tokens=any(row["pieces"] for row in samples) or any(each.pieces for asked in answers for each in asked.answers),
        config=folder.config.read_text(encoding="utf-8") if folder.config.exists() else None,
    )
    write_atomically(folder.report, html)
    return folder.report


def _rounded(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.0f}"


def _gap(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The share of the gap closed for its drawing, within 0 and 100%; None where it is undefined."""
    if not isinstance(found, Mapping) or found.get("value") is None:
        return None
    low, value, high = (min(max(found[key], 0.0), 1.0) * 100 for key in ("low", "value", "high"))
    return {
        "reference": found["reference"],
        "text": f"{found['value']:.0%}",
        "interval": f"{found['low']:.0%} to {found['high']:.0%}",
        "width": round(value, 2),
        "low": round(low, 2),
        "span": round(high - low, 2),
    }


def _outcomes(summary: Mapping[str, Any], columns: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Build rows of the before/after table: a metric, and its value in each column."""
    metrics = dict.fromkeys(metric for column in columns for metric in summary[column])
    return [
        (
            metric,
            [
                show(summary[column][metric]) + show_interval(summary.get("intervals"), column, metric)
                if metric in summary[column]
                else ""
                for column in columns
            ],
        )
        for metric in metrics
    ]


def _by_tasks(measured: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Build rows of the table of the harness's tasks: a metric of a task, and its value for each model."""
    columns = [rows(found) for found in measured.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def _differences(pairs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Build rows of the table of paired differences: a metric, and its difference in each pair of evaluations."""
    metrics = dict.fromkeys(metric for found in pairs.values() for metric in found)
    return [(metric, [_change(found.get(metric)) for found in pairs.values()]) for metric in metrics]


def _change(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:+.3g} ({found['low']:+.3g} to {found['high']:+.3g})"


def _curves(steps: Steps) -> list[tuple[str, Any, list[str], list[tuple[str, str]]]]:
    """Build (title, figure or None, names that no step has, (metric, meaning) of those drawn) for each plot."""
    found: list[tuple[str, Any, list[str], list[tuple[str, str]]]] = []
    for title, unit, names in CURVES:
        drawn = steps.curves_of(names)
        absent = [name for name, curve in drawn.items() if curve.first is None]
        figure = curves(drawn, unit, title)
        if figure is None and title in OPTIONAL:
            continue
        told = [(name, METRICS[name].meaning) for name in names if name not in absent and name in METRICS]
        found.append((title, figure, absent, told))
    return found
