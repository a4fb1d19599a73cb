"""Report of a run as a single HTML file that opens without a network. All values are read from the run folder.

Works on a run that is still going or has crashed: data not available yet is reported as missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pyarrow.parquet as pq
from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kdray.errors import DataError
from kdray.rollouts.arrow import old_writer
from kdray.runs.folder import RunFolder, read_lines, utc_now, write_atomically
from kdray.runs.results.comparison import OUTCOMES, headlines, show_interval

_APART = (
    *("versions", "plugins"),
    *("verdict", "gap_closed", "teacher_left_out", "warnings", "intervals", "differences", "resampling"),
)
"""Entries of summary.json that have places of their own."""

_CURVES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "nats per token", ("loss",)),
    ("Divergence from the teacher", "nats per token", ("reverse_kl", "forward_kl")),
    ("Trainer against replicas", "nats per token", ("rollout_gap", "parity_gap")),
    ("Rewards", "1", ("reward", "reward_contrast")),
    ("Response tokens", "tokens", ("response_tokens",)),
    ("Importance weights", "weight", ("importance_weight_mean", "importance_weight_ess")),
    ("Staleness", "steps", ("staleness_mean", "staleness_max")),
    ("Speed", "tokens per second", ("tokens_per_s",)),
    ("Teacher replicas", "replicas", ("teacher_replicas",)),
    ("Waits", "seconds per step", ("wait_rollout_s", "wait_teacher_s", "wait_sync_s")),
)
_STACKED = "Waits"
_OPTIONAL = ("Rewards",)
"""Plots that are left out if no step has a value: runs without what they show are no less whole."""
_TEACHER_EVENTS = ("scale", "scale_stuck", "retry", "hedge", "teacher_missing", "teacher_refused", "teacher_back")
"""Events marked in the timeline of the teachers."""
_MAX_POINTS = 2000
_MAX_EVENTS = 1000
_MAX_SAMPLE_FILES = 6
_MAX_SAMPLES_PER_FILE = 8


def write_report(run_folder: Path) -> Path:
    """Write report.html into the run folder and return its path.

    Raises: DataError if the folder has no files of a run, or one of them cannot be read.
    """
    folder = RunFolder(Path(run_folder))
    if not any(path.exists() for path in (folder.config, folder.metrics, folder.events, folder.summary)):
        raise DataError(f"{run_folder}: not a run folder (no config.yaml, no metrics.jsonl); give one such as runs/<name>")
    summary = folder.read_summary() if folder.summary.exists() else {}
    metrics = read_lines(folder.metrics) if folder.metrics.exists() else []
    events = read_lines(folder.events) if folder.events.exists() else []
    outcome_columns = [name for name in OUTCOMES if isinstance(summary.get(name), dict)]
    installed = [summary.get(key) for key in ("versions", "plugins")]
    versions = {name: version for each in installed if isinstance(each, dict) for name, version in each.items()}
    steps = [line["step"] for line in metrics if "step" in line]
    shown_events = events[-_MAX_EVENTS:]
    heldout_names, heldout = _heldout(folder.samples)
    html = _TEMPLATE.render(
        name=folder.path.resolve().name,
        written_at=utc_now(),
        last_step=max(steps, default=None),
        missing=[path.name for path in (folder.config, folder.metrics, folder.events, folder.summary) if not path.exists()],
        headlines=headlines(summary),
        outcome_columns=outcome_columns,
        outcomes=_outcomes(summary, outcome_columns),
        pairs=list(summary.get("differences", {})),
        differences=_differences(summary.get("differences", {})),
        resampling=summary.get("resampling"),
        totals={key: _show(value) for key, value in summary.items() if key not in (*outcome_columns, *_APART)},
        versions={key: _show(value) for key, value in versions.items()},
        plotly=Markup(get_plotlyjs()),
        timeline=_timeline(metrics, events),
        curves=_curves(metrics),
        events=[
            (
                line.get("time", ""),
                line.get("kind", ""),
                ", ".join(f"{key}={_show(value)}" for key, value in line.items() if key not in ("time", "kind")),
            )
            for line in shown_events
        ],
        num_events=len(events),
        heldout_names=heldout_names,
        heldout=heldout,
        samples=_samples(folder.samples),
        config=folder.config.read_text(encoding="utf-8") if folder.config.exists() else None,
    )
    write_atomically(folder.report, html)
    return folder.report


def _outcomes(summary: Mapping[str, Any], columns: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Build rows of the before/after table: a metric, and its value in each column."""
    metrics = dict.fromkeys(metric for column in columns for metric in summary[column])
    return [
        (
            metric,
            [
                _show(summary[column][metric]) + show_interval(summary.get("intervals"), column, metric)
                if metric in summary[column]
                else ""
                for column in columns
            ],
        )
        for metric in metrics
    ]


def _differences(pairs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Build rows of the table of paired differences: a metric, and its difference in each pair of evaluations."""
    metrics = dict.fromkeys(metric for found in pairs.values() for metric in found)
    return [(metric, [_change(found.get(metric)) for found in pairs.values()]) for metric in metrics]


def _change(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:+.3g} ({found['low']:+.3g} to {found['high']:+.3g})"


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any, list[str]]]:
    """Build (title, figure as HTML or None, names that no step has) for each plot."""
    lines = [line for line in metrics if "step" in line]
    curves: list[tuple[str, Any, list[str]]] = []
    for title, unit, names in _CURVES:
        # The same metric of a single teacher, or on the held-out prompts, which is measured at some steps only.
        prefixed = {key for line in lines for key in line if key.startswith(("teacher/", "heldout/"))}
        others = sorted(key for key in prefixed if key.split("/")[-1] in names)
        figure = go.Figure()
        absent = []
        for name in (*names, *others):
            points = _thinned([(line["step"], line[name]) for line in lines if name in line])
            if not any(value is not None for _, value in points):
                absent.append(name)
                continue
            # A single point would be invisible as a line.
            mode = "lines+markers" if len(points) < 50 else "lines"
            stack = "waits" if title == _STACKED and name in names else None
            figure.add_scatter(
                x=[step for step, _ in points], y=[value for _, value in points], name=name, mode=mode, stackgroup=stack
            )
        figure.update_layout(
            template="none",
            height=320,
            margin={"l": 60, "r": 20, "t": 10, "b": 40},
            xaxis_title="step",
            yaxis_title=unit,
            showlegend=True,
            legend={"orientation": "h", "y": 1.12},
        )
        html = None
        if title in _OPTIONAL and not figure.data:
            continue
        if figure.data:
            html = Markup(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))
        curves.append((title, html, absent))
    return curves


def _timeline(metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> Any:
    """Plot the replicas of every pool over time, their events, and the trainer's waits; None without data."""
    figure = go.Figure()
    pools = list(dict.fromkeys(line["pool"] for line in events if line.get("kind") == "replicas"))
    end = max((line["time"] for line in (*metrics, *events) if "time" in line), default=None)
    for pool in pools:
        changes = [line for line in events if line.get("kind") == "replicas" and line["pool"] == pool]
        figure.add_scatter(
            x=[*(line["time"] for line in changes), end],
            y=[*(line["now"] for line in changes), changes[-1]["now"]],
            name=f"replicas of {pool}",
            line={"shape": "hv"},
        )
    marked = [line for line in events if line.get("kind") in _TEACHER_EVENTS]
    if marked:
        figure.add_scatter(
            x=[line["time"] for line in marked],
            y=[line.get("now", 0) for line in marked],
            text=[", ".join(f"{key}={_show(value)}" for key, value in line.items() if key != "time") for line in marked],
            name="events",
            mode="markers",
            marker={"symbol": "diamond", "size": 9},
        )
    for name in sorted({key for line in metrics for key in line if key.startswith("teacher/") and key.endswith("/wait_s")}):
        points = _thinned([(line["time"], line[name]) for line in metrics if name in line and "time" in line])
        figure.add_scatter(
            x=[time for time, _ in points], y=[value for _, value in points], name=f"wait for {name.split('/')[1]}", yaxis="y2"
        )
    if not figure.data:
        return None
    figure.update_layout(
        template="none",
        height=360,
        margin={"l": 60, "r": 60, "t": 10, "b": 40},
        xaxis_title="time (UTC)",
        yaxis={"title": "replicas", "rangemode": "tozero"},
        yaxis2={"title": "seconds waited, a step", "overlaying": "y", "side": "right", "rangemode": "tozero"},
        legend={"orientation": "h", "y": 1.15},
    )
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def _thinned(points: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Subsample the points of a long run evenly, keeping the last, since browsers handle only a few thousand points well."""
    stride = -(-len(points) // _MAX_POINTS) or 1
    return [point for index, point in enumerate(points) if index % stride == 0 or index == len(points) - 1]


def _heldout(folder: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Read (names of the held-out evaluations, rows of (prompt, the student's answer in each))."""
    files = {name: folder / f"heldout-{name}.parquet" for name in OUTCOMES}
    answers = {name: _read(path) for name, path in files.items() if path.exists()}
    prompts = {row["prompt_id"]: _text(row, "prompt") for rows in answers.values() for row in rows}
    responses = {name: {row["prompt_id"]: _text(row, "response") for row in rows} for name, rows in answers.items()}
    return list(answers), [
        (prompt, [responses[name].get(prompt_id, "") for name in answers]) for prompt_id, prompt in prompts.items()
    ]


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Read a few files of training samples, evenly spaced from the first to the last."""
    files = sorted(folder.glob("step-*.parquet"))
    if len(files) > _MAX_SAMPLE_FILES:
        spacing = (len(files) - 1) / (_MAX_SAMPLE_FILES - 1)
        files = [files[round(index * spacing)] for index in range(_MAX_SAMPLE_FILES)]
    rows: list[dict[str, Any]] = []
    for path in files:
        for row in _read(path)[:_MAX_SAMPLES_PER_FILE]:
            texts = {column: _text(row, column) for column in ("prompt", "response")}
            rows.append(_with_writer(row) | texts | {"reverse_kl": _show(row["reverse_kl"])})
    return rows


def _with_writer(row: dict[str, Any]) -> dict[str, Any]:
    """Add the name of the writer to a sample, which older versions did not store."""
    if row.get("writer") is not None:
        return row
    writer = old_writer(row["alpha"])
    return row | {"writer": writer, "alpha": 0.0 if writer == "data" else row["alpha"]}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path}: not a readable Parquet file: {error}; remove it") from error


def _text(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a sample; if the run had no decoder, the ids of a response."""
    if row[column] is None:
        return str(row["token_ids"]) if column == "response" else "–"
    return row[column]


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False)


_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} – kdray</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dae0; } h3 { margin: 1.2rem 0 0; }
  table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; }
  th { font-weight: 600; border-bottom: 1px solid #d5dae0; } td.number { font-variant-numeric: tabular-nums; }
  .note { color: #646d78; } .headline { font-size: 1.15rem; margin: .4rem 0; }
  .text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
  pre { background: #f5f7f9; padding: 1rem; overflow-x: auto; }
</style>
<script>{{ plotly }}</script>
</head>
<body>
<h1>{{ name }}</h1>
{% for line in headlines %}
<p class="headline">{{ line }}</p>
{% endfor %}
<p class="note">kdray run{% if last_step is not none %}, {{ last_step }} steps recorded{% endif %};
written {{ written_at }}
{%- if missing %}; missing: {{ missing | join(", ") }}{% endif %}</p>

<h2>Results</h2>
{% if outcomes %}
<table id="outcomes">
<tr><th>held-out</th>{% for column in outcome_columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for metric, values in outcomes %}
<tr><td>{{ metric }}</td>{% for value in values %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% if resampling %}
<p class="note">In brackets: {{ "%.0f" | format(100 * resampling.level) }}% intervals, {{ resampling.method }},
{{ resampling.resamples }} resamples. A number without brackets has no interval.</p>
{% endif %}
{% else %}
<p class="note">Missing: summary.json has no before and after yet.</p>
{% endif %}
{% if differences %}
<h3>Differences, paired by prompt</h3>
<table id="differences">
<tr><th>held-out</th>{% for pair in pairs %}<th>{{ pair }}</th>{% endfor %}</tr>
{% for metric, values in differences %}
<tr><td>{{ metric }}</td>{% for value in values %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% if totals %}
<h3>Totals</h3>
<table id="totals">
{% for key, value in totals.items() %}
<tr><td>{{ key }}</td><td class="number">{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}

<h2>Curves</h2>
{% for title, figure, absent in curves %}
<h3>{{ title }}</h3>
{% if figure %}{{ figure }}{% endif %}
{% if absent %}<p class="note">Missing in metrics.jsonl: {{ absent | join(", ") }}.</p>{% endif %}
{% endfor %}

<h2>Teachers over time</h2>
{% if timeline %}{{ timeline }}{% else %}
<p class="note">Missing: no replicas in events.jsonl.</p>
{% endif %}

<h2>Events</h2>
{% if events %}
{% if num_events > events | length %}
<p class="note">The last {{ events | length }} of {{ num_events }}; all are in events.jsonl.</p>
{% endif %}
<table id="events">
<tr><th>time (UTC)</th><th>kind</th><th></th></tr>
{% for time, kind, fields in events %}
<tr><td>{{ time }}</td><td>{{ kind }}</td><td>{{ fields }}</td></tr>
{% endfor %}
</table>
{% else %}
<p class="note">Missing: no events.</p>
{% endif %}

<h2>Samples</h2>
{% if heldout %}
<h3>Held-out prompts</h3>
<table id="heldout">
<tr><th>prompt</th>{% for name in heldout_names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for prompt, responses in heldout %}
<tr><td class="text">{{ prompt }}</td>{% for text in responses %}<td class="text">{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% if samples %}
<h3>Training</h3>
<table id="samples">
<tr><th>step</th><th>prompt</th><th>response</th><th>finish</th><th>writer</th><th>alpha</th>
<th>reverse KL</th></tr>
{% for row in samples %}
<tr><td class="number">{{ row.step }}</td><td class="text">{{ row.prompt }}</td>
<td class="text">{{ row.response }}</td><td>{{ row.finish_reason }}</td>
<td>{{ row.writer }}</td><td class="number">{{ row.alpha }}</td><td class="number">{{ row.reverse_kl }}</td></tr>
{% endfor %}
</table>
{% else %}
<p class="note">Missing: no samples/step-*.parquet.</p>
{% endif %}

<h2>Config</h2>
{% if config is not none %}
<details><summary>resolved config.yaml</summary><pre>{{ config }}</pre></details>
{% else %}
<p class="note">Missing: no config.yaml.</p>
{% endif %}

<h2>Versions</h2>
{% if versions %}
<table id="versions">
{% for package, version in versions.items() %}
<tr><td>{{ package }}</td><td>{{ version }}</td></tr>
{% endfor %}
</table>
{% else %}
<p class="note">Missing: summary.json has no versions.</p>
{% endif %}
</body>
</html>
""")
