"""When a call is slow: against the last ones, by size, and only where another overtook it."""

from __future__ import annotations

import pytest

from actors.serving.hedging import AT_LEAST_S, CallTimes, Patience


def times(took_s: float = 2.0, size: int = 10, count: int = 8) -> CallTimes:
    """Calls that were sent at 0 and answered after `took_s`."""
    return ended(CallTimes(factor=3.0), count, took_s, size=size)


def ended(made: CallTimes, count: int, took_s: float, size: int = 10, sent: float = 0.0, answered: bool = True) -> CallTimes:
    for _ in range(count):
        made.begin("ended", size, sent)
        made.end("ended", answered, sent + took_s)
    return made


def overtaken(made: CallTimes, call: str, size: int, sent: float) -> CallTimes:
    """A call that is sent, and a short one that is sent with it and answered."""
    made.begin(call, size, sent)
    made.begin("short", 10, sent)
    made.end("short", True, sent + 0.5)
    return made


def test_a_call_is_slow_after_so_many_times_the_slowest_of_the_last() -> None:
    made = overtaken(times(took_s=2.0), "a", 10, sent=100.0)
    assert not made.is_slow("a", 105.9)
    assert made.is_slow("a", 106.1)


def test_a_call_that_none_overtook_is_not_slow() -> None:
    made = times()
    made.begin("earlier", 10, 99.0)
    made.begin("a", 10, 100.0)
    made.end("earlier", True, 101.0)
    assert not made.is_slow("a", 115.0), "the whole pool is behind"
    made.begin("later", 10, 115.0)
    made.end("later", True, 116.0)
    assert made.is_slow("a", 116.1)


def test_a_call_is_slow_once_nothing_is_answered_any_more() -> None:
    """Every running call may have gone to the replica that stands still; then none can overtake another."""
    made = times(took_s=2.0)
    made.begin("earlier", 10, 99.5)
    made.begin("a", 10, 100.0)
    made.end("earlier", True, 101.0)
    assert not made.is_slow("a", 118.9), "one was answered at 101"
    assert made.is_slow("a", 119.1)


@pytest.mark.parametrize(("size", "after"), [(10, 6.0), (30, 18.0), (1, 6.0)])
def test_a_larger_call_is_given_more_time_and_a_smaller_one_not_less(size: int, after: float) -> None:
    made = overtaken(times(took_s=2.0, size=10), "a", size, sent=100.0)
    assert not made.is_slow("a", 100.0 + after - 0.1)
    assert made.is_slow("a", 100.0 + after + 0.1)


def test_nothing_is_slow_before_enough_is_known_or_within_a_moment() -> None:
    made = overtaken(times(count=6), "a", 10, sent=100.0)
    assert not made.is_slow("a", 1e6)
    quick = overtaken(times(took_s=0.01), "a", 10, sent=100.0)
    assert not quick.is_slow("a", 100.0 + AT_LEAST_S - 0.1)


def test_what_a_copy_answered_says_nothing_of_how_long_calls_take() -> None:
    made = ended(times(took_s=2.0), 40, took_s=40.0, sent=50.0, answered=False)
    assert overtaken(made, "a", 10, sent=100.0).is_slow("a", 106.1)


def test_the_last_calls_decide() -> None:
    made = ended(times(took_s=20.0), 32, took_s=1.0, sent=50.0)
    assert overtaken(made, "a", 10, sent=100.0).is_slow("a", 103.1)


def test_the_silence_of_a_call_is_measured_by_the_slowest_answer_and_its_size() -> None:
    patience = Patience(at_least_s=60.0)
    assert patience.silence_s(10**6) == 60.0, "nothing is known yet"
    patience.answered(100, 2.0)
    patience.answered(100, 1.0)
    assert patience.silence_s(100) == 60.0
    assert patience.silence_s(1000) == pytest.approx(10 * 2.0 * 10)
    patience.answered(10, 30.0)
    assert patience.silence_s(5) == pytest.approx(300.0), "a smaller one is as slow"
