"""The main result of the sweep at one look: differences between ways over seeds, with their intervals.

Drawn by `python -m benchmarks.evidence_in_process --figure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.evidence import DECIDING, REGIMES, differences, mean_interval

COMPARISONS = (
    ("mixing at 3e-3: with minus without", "MiniLLM", "MiniLLM, no mixing"),
    ("mixing at 3e-4: with minus without", "MiniLLM, rate 3e-4", "MiniLLM, no mixing, rate 3e-4"),
    (
        "mixing at 3e-4, without length normalisation: with minus without",
        "MiniLLM, no length norm, rate 3e-4",
        "MiniLLM, no mixing, no length norm, rate 3e-4",
    ),
    ("MiniLLM minus SFT alone", "MiniLLM", "SFT alone"),
    ("length normalisation at 3e-3: with minus without", "MiniLLM", "MiniLLM, no length norm"),
    ("length normalisation at 3e-4: with minus without", "MiniLLM, rate 3e-4", "MiniLLM, no length norm, rate 3e-4"),
)
"""What is shown, the way, and the way that it is compared with."""


def draw_differences(cells: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], target: Path) -> None:
    """A panel for each comparison: a row for a regime and a stage other than exploring, with three seeds at least.

    Args: cells: in one process; runs: those of the same cells that are runs, in rows of their own.
    """
    import matplotlib

    matplotlib.use("Agg")
    # Ids that do not change from one drawing to the next, and text that can be searched.
    matplotlib.rcParams.update({"svg.hashsalt": "evidence", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    found: list[list[tuple[str, list[float]]]] = []
    for _, way, other in COMPARISONS:
        rows = []
        for regime, stage, (kind, given) in product(REGIMES, DECIDING, (("", cells), (", by runs", runs))):
            gaps = differences(given, regime, way, stage).get(other, [])
            if len(gaps) > 2:
                rows.append((f"{regime}, {len(gaps)} {stage} seeds{kind}", gaps))
        found.append(rows[::-1])
    figure, axes = plt.subplots(
        len(found),
        1,
        figsize=(9, 1.5 + 0.4 * sum(len(rows) + 1 for rows in found)),
        sharex=True,
        gridspec_kw={"height_ratios": [max(1, len(rows)) for rows in found]},
    )
    for axis, (title, _, _), rows in zip(axes, COMPARISONS, found, strict=True):
        for place, (_, gaps) in enumerate(rows):
            mean, low, high = mean_interval(gaps)
            axis.plot(gaps, [place] * len(gaps), "o", color="C7", alpha=0.35, markersize=4)
            axis.plot([low, high], [place, place], "-", color="C0", linewidth=3)
            axis.plot([mean], [place], "|", color="C0", markersize=16, markeredgewidth=3)
        axis.axvline(0.0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.set_ylim(-0.6, max(0, len(rows) - 1) + 0.6)
        axis.set_title(title, fontsize=10, loc="left")
    axes[-1].set_xlabel("points of exact match: mean with 95% interval, and each seed")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
