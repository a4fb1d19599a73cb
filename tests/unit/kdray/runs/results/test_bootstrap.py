"""Intervals against scipy's bootstrap and against the theory, and pairing by prompt."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from kdray.runs.results import bootstrap
from kdray.runs.results.bootstrap import (
    RESAMPLES,
    Estimate,
    combined,
    difference,
    intervals,
    resampled_totals,
    share_of_gap,
)
from kdray.runs.results.draws import Ratio

RNG = np.random.default_rng(7)
SIZE = 200


def ratio_of(sums: np.ndarray, counts: np.ndarray | None = None, first: int = 0) -> Ratio:
    sums = np.asarray(sums, dtype=np.float64)
    return Ratio(np.arange(first, first + len(sums)), sums, np.ones(len(sums)) if counts is None else counts.astype(np.float64))


def bounds(found: Estimate | None) -> list[float]:
    assert found is not None
    return [found.low, found.high]


def by_scipy(statistic, *columns: np.ndarray) -> list[float]:
    found = scipy.stats.bootstrap(
        columns, statistic, paired=True, vectorized=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


LENGTHS = RNG.integers(1, 30, SIZE)
NATS = RNG.gamma(1.0, 1.0, SIZE) * LENGTHS
LATER_LENGTHS = LENGTHS + RNG.integers(0, 5, SIZE)
LATER_NATS = NATS * 0.6 + RNG.gamma(1.0, 0.2, SIZE)


def test_a_mean_over_tokens_has_the_interval_that_scipy_gives() -> None:
    (found,) = intervals([ratio_of(NATS, LENGTHS)], [False])
    assert found is not None
    assert found.value == pytest.approx(NATS.sum() / LENGTHS.sum())
    expected = by_scipy(lambda nats, tokens, axis: nats.sum(axis) / tokens.sum(axis), NATS, LENGTHS)
    assert bounds(found) == pytest.approx(expected, abs=0.05 * (expected[1] - expected[0]))


def test_a_difference_of_means_over_tokens_has_the_interval_that_scipy_gives() -> None:
    found = difference(ratio_of(LATER_NATS, LATER_LENGTHS), ratio_of(NATS, LENGTHS))
    expected = by_scipy(
        lambda a, b, c, d, axis: a.sum(axis) / b.sum(axis) - c.sum(axis) / d.sum(axis),
        *(LATER_NATS, LATER_LENGTHS, NATS, LENGTHS),
    )
    assert bounds(found) == pytest.approx(expected, abs=0.05 * (expected[1] - expected[0]))


def test_a_share_has_the_interval_of_the_theory() -> None:
    """1.96 sqrt(p (1 - p) / n), for the share of right answers."""
    right = np.arange(400) < 220
    (found,) = intervals([ratio_of(right)], [True])
    half = 1.96 * np.sqrt(0.55 * 0.45 / 400)
    assert bounds(found) == pytest.approx([0.55 - half, 0.55 + half], abs=0.004)


def test_a_share_of_none_or_all_has_the_exact_binomial_interval() -> None:
    """No resample of equal answers differs from them, and a width of 0 would be a lie."""
    none, all_, tokens = intervals([ratio_of(np.zeros(50)), ratio_of(np.ones(50)), ratio_of(np.zeros(50))], [True, True, False])
    exact = scipy.stats.binomtest(0, 50).proportion_ci(method="exact")
    assert bounds(none) == pytest.approx([exact.low, exact.high])
    assert bounds(all_) == pytest.approx([1 - exact.high, 1.0])
    assert bounds(tokens) == [0.0, 0.0]


def test_equal_differences_of_shares_have_an_exact_interval() -> None:
    """Of 50 prompts without a change, changes among all prompts may be as many as 0 of 50 right ones allow, either way."""
    most = scipy.stats.binomtest(0, 50).proportion_ci(method="exact").high
    some = np.arange(50) < 20
    unchanged = difference(ratio_of(some), ratio_of(some), share=True)
    assert bounds(unchanged) == pytest.approx([-most, most])
    all_learned = difference(ratio_of(np.ones(50)), ratio_of(np.zeros(50)), share=True)
    assert bounds(all_learned) == pytest.approx([1.0 - 2.0 * most, 1.0])
    assert bounds(difference(ratio_of(some), ratio_of(some))) == [0.0, 0.0], "nats have no range"
    one_changed = ratio_of(np.arange(50) < 21)
    assert bounds(difference(one_changed, ratio_of(some), share=True)) == bounds(difference(one_changed, ratio_of(some)))


def gap_of(after: np.ndarray, before: np.ndarray, teacher: np.ndarray) -> Estimate:
    gap = difference(ratio_of(teacher), ratio_of(before), share=True)
    assert gap is not None
    found = share_of_gap(ratio_of(after), ratio_of(before), ratio_of(teacher), gap)
    assert found is not None
    return found


def test_the_share_of_a_gap_has_a_width_where_no_response_changed() -> None:
    none, teacher = np.zeros(128), np.arange(128) < 64
    found = gap_of(none, none, teacher)
    gap = difference(ratio_of(teacher), ratio_of(none), share=True)
    assert gap is not None
    reach = scipy.stats.binomtest(0, 128).proportion_ci(confidence_level=0.975, method="exact").high / gap.low
    assert found == Estimate(0.0, pytest.approx(-reach), pytest.approx(reach))
    closed = gap_of(teacher, none, teacher)
    assert closed == Estimate(1.0, pytest.approx(1.0 - reach), pytest.approx(1.0 + reach)), "as the teacher at every prompt"
    changed = np.arange(128) < 30
    free = combined([ratio_of(changed), ratio_of(none), ratio_of(teacher)], lambda a, b, t: (a - b) / (t - b))
    assert gap_of(changed, none, teacher) == free, "where responses differ, the bootstrap's"


def test_the_share_of_a_gap_holds_what_is_true_as_often_as_it_says() -> None:
    """A student that is right once in 60 prompts, measured on 60: in a third of the measurements it has no right response."""
    rng, hits, flat = np.random.default_rng(3), 0, 0
    for _ in range(60):
        before, after, teacher = np.zeros(60), rng.random(60) < 1 / 60, rng.random(60) < 0.8
        if not after.any():
            found = gap_of(after, before, teacher)
            flat += 1
            hits += found.low <= (1 / 60) / 0.8 <= found.high
    assert flat > 10
    assert hits >= 0.95 * flat


def test_pairing_takes_out_what_the_prompts_have_in_common() -> None:
    """The variance of a paired difference is that of the differences, not the sum of both."""
    hard = RNG.normal(0, 10, SIZE)
    change = RNG.normal(0.5, 1, SIZE)
    found = difference(ratio_of(hard + change), ratio_of(hard))
    half = 1.96 * change.std() / np.sqrt(SIZE)
    assert bounds(found) == pytest.approx([change.mean() - half, change.mean() + half], abs=0.15 * half)


def test_pairs_are_found_by_prompt_whatever_their_order() -> None:
    values = RNG.normal(size=SIZE)
    shuffled = RNG.permutation(SIZE)
    other = Ratio(np.arange(SIZE)[shuffled], values[shuffled] - 2.0, np.ones(SIZE))
    found = difference(ratio_of(values), other)
    assert bounds(found) == pytest.approx([2.0, 2.0]), "every prompt differs by 2 from itself"


def test_only_prompts_of_both_are_compared() -> None:
    one, other = ratio_of(np.r_[np.full(10, 100.0), np.arange(50)]), ratio_of(np.r_[np.arange(50), np.full(7, -9.0)], first=10)
    found = difference(one, other)
    assert found == Estimate(0.0, 0.0, 0.0)
    assert difference(ratio_of(np.ones(5)), ratio_of(np.ones(5), first=9)) is None
    assert difference(ratio_of(np.ones(5)), ratio_of(np.ones(5), first=4)) is None, "one prompt has no spread"
    assert intervals([ratio_of(np.ones(1))], [True]) == [None]
    assert intervals([], []) == []


def test_a_prompt_without_tokens_keeps_its_place() -> None:
    """An empty response says nothing about a mean over tokens; the other evaluation's response to its prompt still counts."""
    empty = np.array([0.0, 3.0, 5.0])
    found = difference(ratio_of(empty, np.array([0, 1, 1])), ratio_of(np.array([9.0, 3.0, 5.0])))
    assert found is not None
    assert found.value == pytest.approx(8 / 2 - 17 / 3)


def test_the_same_numbers_give_the_same_interval_in_any_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.stack([NATS, LENGTHS], axis=-1)
    whole = resampled_totals(columns)
    assert whole.shape == (RESAMPLES, 2)
    assert (resampled_totals(columns) == whole).all()
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 7 * SIZE)
    assert resampled_totals(columns) == pytest.approx(whole)
    assert whole[:, 1].mean() == pytest.approx(LENGTHS.sum(), rel=0.01)


def test_a_formula_of_three_ratios_is_paired_too() -> None:
    before, after, teacher = (ratio_of(RNG.random(SIZE) < share) for share in (0.2, 0.5, 0.9))
    found = combined([after, before, teacher], lambda a, b, t: (a - b) / (t - b))
    expected = by_scipy(
        lambda a, b, t, axis: (a.mean(axis) - b.mean(axis)) / (t.mean(axis) - b.mean(axis)),
        *(each.sums for each in (after, before, teacher)),
    )
    assert bounds(found) == pytest.approx(expected, abs=0.05 * (expected[1] - expected[0]))
