"""Confidence intervals of held-out metrics by the bootstrap over prompts.

Prompts are resampled with replacement, with all of their responses: responses to one prompt are not independent. Evaluations
of one run share their prompts, so a resample takes the same prompts of each, and differences are paired. Percentile intervals;
the seed is fixed, so that the same numbers give the same intervals. Source: Efron and Tibshirani 1993, chapters 6 and 13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdray.runs.results.draws import Ratio

LEVEL = 0.95
RESAMPLES = 5000
_SEED = 20230616
_CHUNK_ELEMENTS = 2_000_000
"""Size of the matrix of multiplicities that is held at a time: resamples by prompts."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0.0 or self.high < 0.0


def resampled_totals(columns: np.ndarray) -> np.ndarray:
    """Totals of columns [n, c] in every resample of their rows, [RESAMPLES, c]; the same rows for every call with n rows."""
    num_rows = len(columns)
    rng = np.random.default_rng(_SEED)
    chunk = max(1, _CHUNK_ELEMENTS // num_rows)
    parts = []
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        chosen = rng.integers(num_rows, size=(size, num_rows)) + num_rows * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        parts.append(times.astype(np.float64) @ columns)
    return np.concatenate(parts)


def intervals(ratios: Sequence[Ratio], share: Sequence[bool]) -> list[Estimate | None]:
    """Estimate ratios over the same prompts; None for a ratio that fewer than two prompts tell anything about.

    Args: share: ratios in [0, 1]. If such a one is 0 or 1, no resample can differ from it: its interval is the exact binomial
          one of as many prompts (Clopper and Pearson 1934).
    """
    if not ratios:
        return []
    resamples = _quotients(ratios)
    return [_estimate(ratio, resamples[:, at], of) for at, (ratio, of) in enumerate(zip(ratios, share, strict=True))]


def combined(ratios: Sequence[Ratio], formula: Callable[..., np.ndarray]) -> Estimate | None:
    """Estimate a function of ratios over the prompts that all of them have; each resample takes the same prompts of all.

    Args: formula: called with the value of every ratio, as arrays over resamples.
    Returns: None if fewer than two prompts tell anything about one of the ratios.
    """
    prompt_ids = ratios[0].prompt_ids
    for ratio in ratios[1:]:
        prompt_ids = np.intersect1d(prompt_ids, ratio.prompt_ids)
    paired = [ratio.at(prompt_ids) for ratio in ratios]
    if min(ratio.num_prompts for ratio in paired) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(formula(*(np.array(ratio.value) for ratio in paired)))
        low, high = _bounds(formula(*_quotients(paired).T))
    return Estimate(value, low, high)


def differences(one: Mapping[str, Ratio], other: Mapping[str, Ratio]) -> dict[str, Estimate]:
    """Estimate `one` - `other` for every metric of both evaluations, paired over the prompts that both have.

    A metric about which fewer than two of these prompts tell anything is left out.
    """
    paired: dict[str, tuple[Ratio, Ratio]] = {}
    for name in (name for name in one if name in other):
        prompt_ids = np.intersect1d(one[name].prompt_ids, other[name].prompt_ids)
        pair = one[name].at(prompt_ids), other[name].at(prompt_ids)
        if min(ratio.num_prompts for ratio in pair) >= 2:
            paired[name] = pair
    if not paired:
        return {}
    resamples = _quotients([ratio for pair in paired.values() for ratio in pair])
    changes = resamples[:, ::2] - resamples[:, 1::2]
    return {
        name: Estimate(first.value - second.value, *_bounds(changes[:, at]))
        for at, (name, (first, second)) in enumerate(paired.items())
    }


def difference(one: Ratio, other: Ratio) -> Estimate | None:
    """Estimate `one` - `other` as `differences` does; None if fewer than two shared prompts tell anything."""
    return differences({"": one}, {"": other}).get("")


def _quotients(ratios: Sequence[Ratio]) -> np.ndarray:
    """Values of ratios over the same prompts in every resample, [RESAMPLES, ratios]; NaN where nothing counts."""
    totals = resampled_totals(np.stack([column for ratio in ratios for column in (ratio.sums, ratio.counts)], axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[:, ::2] / totals[:, 1::2]


def _estimate(ratio: Ratio, resamples: np.ndarray, share: bool) -> Estimate | None:
    if ratio.num_prompts < 2:
        return None
    value = ratio.value
    low, high = _bounds(resamples)
    if share and value in (0.0, 1.0):
        reach = ((1.0 - LEVEL) / 2.0) ** (1.0 / ratio.num_prompts)
        low, high = (0.0, 1.0 - reach) if value == 0.0 else (reach, 1.0)
    return Estimate(value, low, high)


def _bounds(resamples: np.ndarray) -> tuple[float, float]:
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.nanquantile(resamples, [tail, 1.0 - tail])
    return float(low), float(high)
