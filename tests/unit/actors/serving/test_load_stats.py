"""The counters that sizes are decided by, against sums made the long way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.serving.load_stats import Awaited, TimeShare, Workload


def test_a_time_share_forgets_what_is_older_than_its_window() -> None:
    share = TimeShare(now=0.0, window_s=10.0)
    share.switch(True, 2.0)
    assert share.seconds(5.0) == pytest.approx(3.0)
    share.switch(False, 6.0)
    assert share.seconds(11.0) == pytest.approx(4.0)
    assert share.seconds(14.0) == pytest.approx(2.0)
    assert share.seconds(17.0) == 0.0
    share.switch(True, 20.0, already_s=3.0)
    assert share.seconds(20.0) == pytest.approx(3.0)
    assert share.seconds(100.0) == pytest.approx(10.0)


def test_a_young_time_share_counts_from_its_start() -> None:
    share = TimeShare(now=100.0, window_s=30.0)
    share.switch(True, 101.0)
    assert share.share(100.0) == 0.0
    assert share.share(104.0) == pytest.approx(0.75)
    assert share.share(200.0) == 1.0


@given(st.lists(st.floats(0.01, 5.0), max_size=20), st.floats(0.0, 20.0))
def test_a_time_share_is_the_overlap_with_the_window(lengths: list[float], later: float) -> None:
    """On and off in turn; measured on a fine grid instead."""
    share, now, edges = TimeShare(0.0, window_s=10.0), 0.0, [0.0]
    for index, length in enumerate(lengths):
        share.switch(index % 2 == 0, now)
        now += length
        edges.append(now)
    share.switch(False, now)
    end = now + later
    step = 0.001
    at = end - 10.0 + (np.arange(10_000) + 0.5) * step
    turns = np.searchsorted(edges, at, side="right")
    on = ((turns % 2 == 1) & (turns < len(edges))).sum()
    assert share.seconds(end) == pytest.approx(on * step, abs=0.05)


def test_work_is_counted_from_begin_to_end() -> None:
    work = Workload(slots=8, now=0.0)
    assert work.stats(3.0) == {"queue_age_s": 0.0, "ongoing": 0.0, "idle_s": 3.0, "busy": 0.0}
    first = work.begin(4, 10.0)
    second = work.begin(3, 12.0)
    work.done(first, 1, 50, 15.0)
    assert work.stats(15.0) == {"queue_age_s": 0.0, "ongoing": 6.0, "idle_s": 0.0, "busy": pytest.approx(5 / 15)}
    work.end(first, 20.0)
    assert work.stats(20.0)["ongoing"] == 3.0
    assert work.stats(20.0)["idle_s"] == 0.0
    work.end(second, 25.0)
    stats = work.stats(40.0)
    assert (stats["ongoing"], stats["idle_s"]) == (0.0, 15.0)
    assert stats["busy"] == pytest.approx(0.5), "15 s of the last 30"


def test_only_what_exceeds_the_slots_queues() -> None:
    work = Workload(slots=8, now=0.0)
    first = work.begin(5, 0.0)
    work.begin(3, 1.0)
    assert work.stats(9.0)["queue_age_s"] == 0.0, "eight run side by side"
    work.begin(2, 2.0)
    work.begin(2, 3.0)
    assert work.stats(9.0)["queue_age_s"] == 7.0, "the third call waits"
    work.done(first, 2, 10, 10.0)
    assert work.stats(10.0)["queue_age_s"] == 7.0, "the fourth call waits"
    work.end(first, 11.0)
    assert work.stats(11.0)["queue_age_s"] == 0.0


@pytest.mark.parametrize("read_every", [1.0, 7.0, 1000.0])
def test_a_steady_rate_is_measured_as_it_is_however_often_it_is_read(read_every: float) -> None:
    """600 tokens after each 3 s call; the pauses between calls do not count."""
    work, now, next_read = Workload(slots=8, now=0.0), 0.0, 0.0
    for _ in range(200):
        call = work.begin(2, now)
        now += 3.0
        work.done(call, 2, 600, now)
        work.end(call, now)
        now += 2.0
        if now >= next_read:
            work.tokens_per_s(now)
            next_read = now + read_every
    # The newest answer has not faded yet, while the 3 s before it have: half a call too much.
    assert work.tokens_per_s(now) == pytest.approx(200.0, rel=0.03)


def test_the_rate_follows_a_change_and_survives_idleness() -> None:
    work, now = Workload(slots=8, now=0.0), 0.0
    assert work.tokens_per_s(5.0) is None
    for rate in (100, 400):
        for _ in range(120):
            call = work.begin(1, now)
            now += 2.0
            work.done(call, 1, 2 * rate, now)
            work.end(call, now)
    # The old rate counts e^-(240 / 60) by now.
    expected = 400 - 300 * math.exp(-4)
    assert work.tokens_per_s(now) == pytest.approx(expected, rel=0.02)
    assert work.tokens_per_s(now + 10_000) == pytest.approx(expected, rel=0.02)


def test_a_pool_is_awaited_for_what_it_was_asked_and_the_trainer_misses() -> None:
    changes: list[bool] = []
    awaited = Awaited(changes.append)
    awaited.asked([1, 2, 3], 0.0)
    awaited.misses([3, 4], 10.0)
    assert changes == [True]
    awaited.answered([1, 2], 12.0)
    assert changes == [True]
    assert awaited.take_s(13.0) == pytest.approx(3.0)
    awaited.answered([3], 15.0)
    assert changes == [True, False], "the trainer still waits, but for another pool's answer"
    assert awaited.take_s(20.0) == pytest.approx(2.0)
    awaited.asked([4], 30.0)
    awaited.misses([], 34.0)
    awaited.answered([4], 40.0)
    assert changes == [True, False, True, False]
    assert awaited.take_s(50.0) == pytest.approx(4.0)
    assert awaited.take_s(60.0) == 0.0


def test_a_sample_asked_for_twice_is_awaited_until_both_are_answered() -> None:
    changes: list[bool] = []
    awaited = Awaited(changes.append)
    awaited.misses([7], 0.0)
    awaited.asked([7], 1.0)
    awaited.asked([7], 2.0)
    awaited.answered([7], 3.0)
    assert awaited.owes
    awaited.answered([7], 5.0)
    assert changes == [True, False]
    assert not awaited.owes
    assert awaited.take_s(9.0) == pytest.approx(4.0)


def test_what_nobody_asks_for_is_forgotten_all_the_same() -> None:
    share = TimeShare(0.0, window_s=10.0)
    for second in range(1000):
        share.switch(True, float(second))
        share.switch(False, second + 0.5)
    assert len(share._ended) <= 11
    assert share.share(1000.0) == 0.5
