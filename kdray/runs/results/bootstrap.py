"""Confidence intervals of held-out metrics by the bootstrap over prompts.

Prompts are resampled with replacement, with all of their responses: responses to one prompt are not independent. Evaluations
of one run share their prompts, so a resample takes the same prompts of each, and differences are paired. Percentile intervals;
the seed is fixed, so that the same numbers give the same intervals. Source: Efron and Tibshirani 1993, chapters 6 and 13.

Where all prompts say the same, no resample differs from it, and the bootstrap would give an interval of no width. Shares have
an exact one instead: of n prompts without an exception, the share of exceptions among all prompts is at most 1 - tail^(1/n)
(Clopper and Pearson 1934, for 0 of n), and an exception can be no further away than the ends of the range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdray.runs.results.draws import Ratio

LEVEL = 0.95
RESAMPLES = 5000
_SEED = 20230616
_SAME = 1e-12
"""Difference below which numbers count as the same, for they are computed in different orders."""
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

    Args: share: ratios in [0, 1]. If all prompts have the same share, its interval is the exact one of as many prompts.
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


def share_of_gap(after: Ratio, before: Ratio, reference: Ratio, gap: Estimate) -> Estimate | None:
    """Estimate (after - before) / (reference - before) of shares, over the prompts that all of them have.

    Where it is c in every resample, as 0 if no response changed, e = after - before - c (reference - before) is 0 for every
    prompt. Its mean over all prompts then has an exact interval of level (1 + LEVEL) / 2, which is divided by the lower end of
    `gap`: wider than need be, and of at least LEVEL with both (Bonferroni).

    Args: gap: reference - before, an estimate above 0.
    Returns: None if fewer than two prompts tell anything about one of the ratios.
    """
    found = combined([after, before, reference], lambda a, b, r: (a - b) / (r - b))
    if found is None or not np.isclose(found.low, found.high, rtol=0.0, atol=_SAME):
        return found
    # The furthest that e can be from 0, for shares in [0, 1].
    furthest = max(1.0, found.value, 1.0 - found.value)
    num_prompts = min(ratio.num_prompts for ratio in (after, before, reference))
    reach = furthest * _unseen(num_prompts, (1.0 - LEVEL) / 4.0) / gap.low
    return Estimate(found.value, found.value - reach, found.value + reach)


def differences(
    one: Mapping[str, Ratio], other: Mapping[str, Ratio], share: Callable[[str], bool] = lambda name: False
) -> dict[str, Estimate]:
    """Estimate `one` - `other` for every metric of both evaluations, paired over the prompts that both have.

    A metric about which fewer than two of these prompts tell anything is left out.
    Args: share: metrics in [0, 1]. If all prompts have the same difference, its interval is the exact one.
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
    found = {}
    for at, (name, (first, second)) in enumerate(paired.items()):
        bounds = None
        if share(name):
            told = (first.counts > 0) & (second.counts > 0)
            by_prompt = first.sums[told] / first.counts[told] - second.sums[told] / second.counts[told]
            bounds = _unanimous_bounds(by_prompt, -1.0)
        found[name] = Estimate(first.value - second.value, *(bounds or _bounds(changes[:, at])))
    return found


def difference(one: Ratio, other: Ratio, share: bool = False) -> Estimate | None:
    """Estimate `one` - `other` as `differences` does; None if fewer than two shared prompts tell anything."""
    return differences({"": one}, {"": other}, lambda name: share).get("")


def _quotients(ratios: Sequence[Ratio]) -> np.ndarray:
    """Values of ratios over the same prompts in every resample, [RESAMPLES, ratios]; NaN where nothing counts."""
    totals = resampled_totals(np.stack([column for ratio in ratios for column in (ratio.sums, ratio.counts)], axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[:, ::2] / totals[:, 1::2]


def _estimate(ratio: Ratio, resamples: np.ndarray, share: bool) -> Estimate | None:
    if ratio.num_prompts < 2:
        return None
    told = ratio.counts > 0
    bounds = _unanimous_bounds(ratio.sums[told] / ratio.counts[told], 0.0) if share else None
    return Estimate(ratio.value, *(bounds or _bounds(resamples)))


def _unanimous_bounds(by_prompt: np.ndarray, least: float) -> tuple[float, float] | None:
    """Exact interval of the mean of values in [least, 1] if all are the same; None if they differ, or there are none."""
    if not len(by_prompt) or np.ptp(by_prompt) > _SAME:
        return None
    value, unseen = float(by_prompt[0]), _unseen(len(by_prompt), (1.0 - LEVEL) / 2.0)
    return value - unseen * (value - least), value + unseen * (1.0 - value)


def _unseen(num_prompts: int, tail: float) -> float:
    """Largest share of exceptions among all prompts of which as many would, with probability `tail`, show none."""
    return float(1.0 - tail ** (1.0 / num_prompts))


def _bounds(resamples: np.ndarray) -> tuple[float, float]:
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.nanquantile(resamples, [tail, 1.0 - tail])
    return float(low), float(high)
