"""Steps read as a stream: exact for short runs, extremes and means of long ones, and memory that does not grow."""

from __future__ import annotations

import json
import math
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from kdray.errors import DataError
from kdray.runs.reports.steps import Curve, Steps

START = datetime(2031, 1, 1, tzinfo=UTC)


def at(second: float) -> str:
    return (START + timedelta(seconds=second)).isoformat(timespec="milliseconds")


def test_a_short_curve_is_drawn_as_it_is_with_its_gaps() -> None:
    points = [(step, None if step == 3 else step / 7) for step in range(1, 1025)]
    curve = Curve(points)
    assert curve.points() == points
    known = np.array([step / 7 for step, value in points if value is not None])
    means = [known[max(0, index - 24) : index + 1].mean() for index in range(len(known))]
    assert [step for step, _ in curve.running_mean()] == [step for step, value in points if value is not None]
    np.testing.assert_allclose([mean for _, mean in curve.running_mean()], means, rtol=1e-12)


@pytest.mark.parametrize("steps", [1025, 5003, 60_000])
def test_a_long_curve_keeps_every_extreme_and_its_mean(steps: int) -> None:
    values = np.random.default_rng(steps).standard_normal(steps)
    values[steps // 3], values[steps // 2] = 40.0, -40.0
    curve = Curve((step, None if step % 11 == 5 else float(values[step - 1])) for step in range(1, steps + 1))
    known = {step: values[step - 1] for step in range(1, steps + 1) if step % 11 != 5}
    drawn = curve.points()
    assert len(drawn) <= 2049
    assert len(drawn) > 900
    assert [step for step, _ in drawn] == sorted({step for step, _ in drawn})
    assert all(known[step] == value for step, value in drawn if value is not None), "points of the run, not between them"
    assert {curve.span[0], curve.span[1]} == {min(known.values()), max(known.values())}
    assert curve.span in [(min(y for _, y in drawn if y is not None), max(y for _, y in drawn if y is not None))]
    assert (curve.first, curve.last) == ((1, known[1]), (max(known), known[max(known)]))
    assert curve.num_points == steps
    assert drawn[-1] == (steps, None if steps % 11 == 5 else values[-1])
    # Whatever is put together, a running mean is one over about a fortieth of the steps that end there.
    for step, mean in curve.running_mean()[::50]:
        if step > steps // 20:
            window = [known[each] for each in range(step - steps // 40 + 1, step + 1) if each in known]
            assert mean == pytest.approx(np.mean(window), abs=4 * 2.0 / math.sqrt(len(window)))


def test_shares_of_time_are_those_of_all_steps_between() -> None:
    steps = Steps({"step": step, "time": at(2.0 * step), "train_step_s": 0.5, "wait_rollout_s": 1.0} for step in range(1, 1001))
    shares = steps.shares()
    assert {share for _, share in shares["trained"]} == {0.25}
    assert {share for _, share in shares["waited for rollouts"]} == {0.5}
    assert {share for _, share in shares["waited for teachers' scores"]} == {0.0}
    assert 60 <= len(shares["trained"]) <= 120
    assert shares["trained"][-1][0] == at(2000.0)
    assert steps.totals["train_step_s"] == 500.0


def test_the_first_half_of_a_run_may_have_waited_and_the_second_trained() -> None:
    lines = (
        {"step": step, "time": at(float(step)), "train_step_s": float(step > 4096), "wait_sync_s": float(step <= 4096)}
        for step in range(8193)
    )
    trained = [share for _, share in Steps(lines).shares()["trained"]]
    half = len(trained) // 2
    assert (trained[:half], trained[half:]) == ([0.0] * half, [1.0] * half)


def test_curves_of_single_teachers_and_of_held_out_prompts_are_found() -> None:
    lines = [{"step": 1, "loss": 1.0, "teacher/b/reverse_kl": 0.5, "unknown": 3.0}, {"step": 2, "heldout/reverse_kl": 0.25}]
    steps = Steps([*lines, {"note": "no step"}])
    assert list(steps.curves_of(("reverse_kl",))) == ["reverse_kl", "heldout/reverse_kl", "teacher/b/reverse_kl"]
    assert steps.curve("heldout/reverse_kl").points() == [(2, 0.25)]
    assert steps.curve("reverse_kl").first is None
    assert "unknown" not in steps.curves
    assert steps.last_step == 2


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n[2]\n{"step": 3')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: .*remove the line"):
        Steps.read(file)
    file.write_text('{"step": 1}\n{"step": 3')
    assert Steps.read(file).last_step == 1, "a torn last line is passed over"
    assert Steps.read(tmp_path / "none").last_step is None


def peak(path: Path, steps: int) -> int:
    """Bytes that reading so many steps takes at most."""
    line = {"time": at(1.0), "loss": 0.5, "reverse_kl": 1.5, "wait_rollout_s": 0.25} | {f"other_{n}": n / 7 for n in range(10)}
    with path.open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step} | line) + "\n")
    tracemalloc.start()
    try:
        steps_read = Steps.read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        assert steps_read.last_step == steps


def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    short, long = peak(tmp_path / "short", 2_000), peak(tmp_path / "long", 6_000)
    assert long < 1.1 * short, (short, long)
    assert long < 2_000_000
