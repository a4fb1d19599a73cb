"""Figure of a run's time: its stages, who waited for whom during distillation, replicas, scaling and faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.subplots import make_subplots

from kdray.runs.reports.cost import Stage, stages
from kdray.runs.reports.figures import COLOURS, drawn, layout
from kdray.runs.reports.pages import show
from kdray.runs.reports.steps import Steps

_ORDINARY = (
    *("start", "starting", "serving", "replicas", "phase", "parity", "signals", "evaluation", "checkpoint", "stored"),
    *("finished", "teacher_not_measured", "closing"),
)
"""Events that every run has: the stages and the replicas show them."""
_MOST_MARKS = 300
_HAPPENED = "events"


def timeline(steps: Steps, events: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Draw the figure; None without replicas, stages or anything that happened."""
    timed = [event for event in events if "time" in event]
    ran = stages(timed, steps)
    replicas = [event for event in timed if event.get("kind") == "replicas"]
    marks = [event for event in timed if event.get("kind") not in _ORDINARY][-_MOST_MARKS:]
    shares = steps.shares()
    if not (ran or replicas or shares):
        return None
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.4, 0.35, 0.25])
    told = [f"{stage.name} {stage.seconds:.0f} s" for stage in ran]
    _add_stages(figure, ran)
    if marks:
        figure.add_scatter(
            x=[mark["time"] for mark in marks],
            y=[_HAPPENED] * len(marks),
            text=[", ".join(f"{key}={show(value)}" for key, value in mark.items() if key != "time") for mark in marks],
            hoverinfo="text+x",
            name="scaling and faults",
            mode="markers",
            marker={"symbol": "diamond", "size": 10, "color": COLOURS[1]},
            row=1,
            col=1,
        )
        kinds = [str(mark["kind"]) for mark in marks]
        told += [f"{kind} {kinds.count(kind)} times" for kind in dict.fromkeys(kinds)]
        # All at once: plotly looks through the whole figure whenever a line is added.
        line = {"color": COLOURS[1], "width": 1, "dash": "dot"}
        across = {"type": "line", "y0": 0, "y1": 1, "line": line, "opacity": 0.5}
        places = [(f"x{number}", f"y{number} domain") for number in ("", "2", "3")]
        figure.update_layout(
            shapes=[
                {**across, "x0": mark["time"], "x1": mark["time"], "xref": x, "yref": y} for mark in marks for x, y in places
            ]
        )
    for place, (name, points) in enumerate(shares.items()):
        if not any(share for _, share in points):
            continue
        figure.add_scatter(
            x=[time for time, _ in points],
            y=[share for _, share in points],
            name=name,
            mode="lines",
            line={"color": COLOURS[place % len(COLOURS)], "width": 1},
            stackgroup="trainer",
            row=2,
            col=1,
        )
    times = [event["time"] for event in timed] + ([steps.latest_time] if steps.latest_time else [])
    _add_replicas(figure, replicas, max(times))
    layout(figure, x="", y="", height=580, hovermode="closest")
    figure.update_layout(legend={"y": -0.12, "traceorder": "normal"})
    # Few and upright: turned ones would reach into the legend on a phone.
    figure.update_xaxes(nticks=4, tickangle=0)
    figure.update_yaxes(title="trainer", tickformat=".0%", range=[0, 1], row=2, col=1)
    figure.update_yaxes(title="replicas", rangemode="tozero", dtick=1 if _most(replicas) < 8 else None, row=3, col=1)
    return drawn(figure, f"Stages of the run, what its trainer did, and replicas, over time. {'; '.join(told)}.")


def _add_stages(figure: go.Figure, ran: Sequence[Stage]) -> None:
    for name in dict.fromkeys(stage.name for stage in ran):
        spans = [stage for stage in ran if stage.name == name]
        figure.add_scatter(
            x=[time for stage in spans for time in (stage.begin.isoformat(), stage.end.isoformat(), None)],
            y=[name] * (3 * len(spans)),
            text=[f"{name}: {stage.seconds:.0f} s" for stage in spans for _ in range(3)],
            hoverinfo="text",
            mode="lines",
            line={"width": 14, "color": COLOURS[0]},
            showlegend=False,
            row=1,
            col=1,
        )
    figure.update_yaxes(autorange="reversed", row=1, col=1)


def _add_replicas(figure: go.Figure, changes: Sequence[Mapping[str, Any]], end: str) -> None:
    for place, pool in enumerate(dict.fromkeys(event["pool"] for event in changes)):
        of_pool = [event for event in changes if event["pool"] == pool]
        figure.add_scatter(
            x=[*(event["time"] for event in of_pool), end],
            y=[*(event["now"] for event in of_pool), of_pool[-1]["now"]],
            name=f"replicas of {pool}",
            mode="lines",
            line={"shape": "hv", "color": COLOURS[(place + 5) % len(COLOURS)], "width": 2},
            row=3,
            col=1,
        )


def _most(changes: Sequence[Mapping[str, Any]]) -> int:
    return max((event["now"] for event in changes), default=0)
