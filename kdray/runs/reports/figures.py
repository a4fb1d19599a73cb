"""Figures of the pages, as HTML: curves over steps, each with a description in words.

Colours are told apart on light and dark ground and with colour blindness (Okabe and Ito 2008); the style sheet of the page
colours text and grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup, escape

from kdray.runs.reports.pages import show

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#8a8a8a")

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

_MAX_POINTS = 2000
_SMOOTH_FROM = 100
"""Points from which on a curve is drawn as its running mean, over a fortieth of the points, with the points behind it."""
_WINDOWS = 40
_LEGEND_WIDTH = 36
"""Characters of a name that fit a line of the legend on a narrow screen."""

Points = list[tuple[Any, Any]]


def thinned(points: Points) -> Points:
    """Subsample the points of a long run evenly, keeping the last, since browsers handle only a few thousand points well."""
    stride = -(-len(points) // _MAX_POINTS) or 1
    return [point for index, point in enumerate(points) if index % stride == 0 or index == len(points) - 1]


def smoothed(points: Points) -> Points:
    """Running mean over a window that ends at each point; points without a value are left out."""
    known = [(x, y) for x, y in points if y is not None]
    window = max(1, len(known) // _WINDOWS)
    means: Points = []
    total = 0.0
    for index, (x, y) in enumerate(known):
        total += y - (known[index - window][1] if index >= window else 0.0)
        means.append((x, total / min(index + 1, window)))
    return means


def points_of(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    """(step, value) of a metric, in every line that has it."""
    return [(line["step"], line[name]) for line in lines if name in line]


def curves(named: Mapping[str, Points], unit: str, title: str) -> Markup | None:
    """Draw one line for each name over steps; None if there is no value at all."""
    figure = go.Figure()
    told = []
    for place, (name, points) in enumerate((name, found) for name, found in named.items() if has_value(found)):
        colour = COLOURS[place % len(COLOURS)]
        line = {"color": colour, "width": 2, "dash": "solid" if place < len(COLOURS) else "dash"}
        if len(points) < _SMOOTH_FROM:
            # A single point would be invisible as a line.
            _add(figure, points, name, mode="lines+markers" if len(points) < _SMOOTH_FROM // 2 else "lines", line=line)
        else:
            raw = {"color": colour, "width": 1}
            _add(figure, thinned(points), name, mode="lines", line=raw, opacity=0.3, legendgroup=name, showlegend=False)
            _add(figure, thinned(smoothed(points)), name, mode="lines", line=line, legendgroup=name)
        told.append(f"{name}: {described(points)}")
    if not figure.data:
        return None
    # Each of the long names has lines of the legend to itself.
    layout(figure, x="step", y=unit, height=320 + 36 * sum("<br>" in line.name for line in figure.data))
    return drawn(figure, f"{title}, {unit}, over steps. {'; '.join(told)}.")


def has_value(points: Points) -> bool:
    return any(value is not None for _, value in points)


def described(points: Points) -> str:
    """First, last, least and greatest value of a curve, in words."""
    known = [(x, y) for x, y in points if y is not None]
    (first_x, first), (last_x, last) = known[0], known[-1]
    if len(known) == 1:
        return f"{show(first)} at step {first_x}"
    values = [y for _, y in known]
    span = f"between {show(min(values))} and {show(max(values))}"
    return f"{show(first)} at step {first_x}, {show(last)} at step {last_x}, {span}"


def _add(figure: go.Figure, points: Points, name: str, **style: Any) -> None:
    # A long name of several parts on two lines of the legend: a phone would cut it.
    shown = name if len(name) <= _LEGEND_WIDTH else "<br>".join(name.rsplit("/", 1))
    figure.add_scatter(x=[x for x, _ in points], y=[y for _, y in points], name=shown, **style)


def layout(figure: go.Figure, x: str, y: str, height: int = 320, **more: Any) -> None:
    """Give a figure the common look: no ground of its own, legend below, so that it collides with nothing on a phone."""
    axis = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.5)", "automargin": True}
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "top", "y": -0.28, "x": 0, "bgcolor": "rgba(0,0,0,0)"},
        **more,
    )
    # Close to its axis: further down it would lie on the legend.
    figure.update_xaxes(title={"text": x, "standoff": 6}, **axis)
    figure.update_yaxes(title=y, **axis)


def drawn(figure: go.Figure, words: str) -> Markup:
    """The figure as HTML. Args: words: say the same to those who do not see it."""
    config = {"displayModeBar": False, "responsive": True}
    html = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    return Markup(f'<div class="figure" role="img" aria-label="{escape(words)}">{html}</div>')
