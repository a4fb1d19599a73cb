"""Growth of a series of measurements per hour, with an interval: a robust straight line, and the verdict from it.

A step at the start, or the sawtooth of checkpoints and garbage collection, is no growth; half a MiB a minute is, though it is
lost in the noise of any two stretches. The line is that of Theil and Sen: the median of the slopes between all pairs of points,
which single outliers do not move. Values that follow each other are not independent; those of blocks nearly are, so the line
and its interval are of the blocks' medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import theilslopes

LEVEL = 0.95
BLOCKS = 24
"""Medians of blocks that a line is fitted to."""
_FEWEST = 8
"""Fewest blocks from which a verdict is drawn."""


@dataclass(frozen=True)
class Slope:
    """Growth per hour."""

    per_hour: float
    low: float
    high: float
    level: float
    """Median of the series."""

    def grows(self, allowed_per_hour: float) -> bool:
        """True if the whole interval is above what is allowed."""
        return self.low > allowed_per_hour

    def is_flat(self, allowed_per_hour: float) -> bool:
        """True if the whole interval is below what is allowed; where neither holds, the series is too short to tell."""
        return self.high <= allowed_per_hour


def slope(seconds: Sequence[float], values: Sequence[float], warm_up: float = 0.2) -> Slope | None:
    """Slope of values over time; None if there are too few. Args: warm_up: share of the series that is left out first."""
    first = int(len(values) * warm_up)
    hours, kept = np.asarray(seconds[first:]) / 3600.0, np.asarray(values[first:])
    hours, kept = hours[np.isfinite(kept)], kept[np.isfinite(kept)]
    if len(kept) < _FEWEST:
        return None
    blocks = min(BLOCKS, len(kept))
    when = np.array([np.median(block) for block in np.array_split(hours, blocks)])
    what = np.array([np.median(block) for block in np.array_split(kept, blocks)])
    found, _, low, high = theilslopes(what, when, LEVEL)
    return Slope(float(found), float(low), float(high), float(np.median(kept)))


def combined(slopes: Sequence[Slope]) -> Slope:
    """Slope over independent series of the same thing, such as parts with other processes; narrow intervals count for more."""
    widths = np.array([max(each.high - each.low, 1e-6) for each in slopes])
    weights = widths**-2.0
    mean = float(np.average([each.per_hour for each in slopes], weights=weights))
    # Intervals need not lie around their slope: each end by itself.
    below = float(np.sqrt(np.average([(each.per_hour - each.low) ** 2 for each in slopes], weights=weights) / len(slopes)))
    above = float(np.sqrt(np.average([(each.high - each.per_hour) ** 2 for each in slopes], weights=weights) / len(slopes)))
    return Slope(mean, mean - below, mean + above, slopes[-1].level)
