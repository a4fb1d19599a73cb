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
from kdray.runs.reports.steps import Curve, Point

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#8a8a8a")

_SMOOTH_FROM = 100
"""Points from which on a curve is drawn as its running mean, with the points behind it."""
_LEGEND_WIDTH = 36
"""Characters of a name that fit a line of the legend on a narrow screen."""


def curves(named: Mapping[str, Curve], unit: str, title: str) -> Markup | None:
    """Draw one line for each name over steps; None if there is no value at all."""
    figure = go.Figure()
    told = []
    for place, (name, curve) in enumerate((name, found) for name, found in named.items() if found.first is not None):
        colour = COLOURS[place % len(COLOURS)]
        line = {"color": colour, "width": 2, "dash": "solid" if place < len(COLOURS) else "dash"}
        if curve.num_points < _SMOOTH_FROM:
            # A single point would be invisible as a line.
            mode = "lines+markers" if curve.num_points < _SMOOTH_FROM // 2 else "lines"
            _add(figure, curve.points(), name, mode=mode, line=line)
        else:
            raw = {"color": colour, "width": 1}
            _add(figure, curve.points(), name, mode="lines", line=raw, opacity=0.3, legendgroup=name, showlegend=False)
            _add(figure, curve.running_mean(), name, mode="lines", line=line, legendgroup=name)
        told.append(f"{name}: {described(curve)}")
    if not figure.data:
        return None
    # Each of the long names has lines of the legend to itself.
    layout(figure, x="step", y=unit, height=320 + 36 * sum("<br>" in line.name for line in figure.data))
    return drawn(figure, f"{title}, {unit}, over steps. {'; '.join(told)}.")


def described(curve: Curve) -> str:
    """First, last, least and greatest value of a curve that has some, in words."""
    assert curve.first is not None
    assert curve.last is not None
    (first_step, first), (last_step, last) = curve.first, curve.last
    if first_step == last_step:
        return f"{show(first)} at step {first_step}"
    least, greatest = curve.span
    return f"{show(first)} at step {first_step}, {show(last)} at step {last_step}, between {show(least)} and {show(greatest)}"


def _add(figure: go.Figure, points: Sequence[Point], name: str, **style: Any) -> None:
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
