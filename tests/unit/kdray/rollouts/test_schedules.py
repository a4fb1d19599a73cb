"""Scheduled values: courses over steps, values from signals, their lag, and a resume that decides alike."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import TypeAdapter

from kdray.config import parse_config
from kdray.config.schedules import ScheduleSettings
from kdray.errors import ConfigError, DataError
from kdray.rollouts.schedules import Schedules, of_section

BASE: dict[str, Any] = {
    "run": {"name": "x"},
    "student": {"model": {"type": "tiny"}},
    "teachers": {"t": {"model": {"type": "tiny"}}},
}


def schedules(own: float, max_staleness: int = 1, **setting: Any) -> Schedules:
    built = TypeAdapter(ScheduleSettings).validate_python(setting)
    return Schedules({"rollout.alpha": built}, {"rollout.alpha": own}, 10, max_staleness)


def course(made: Schedules, steps: int = 10) -> list[float]:
    return [made.at(step)["rollout.alpha"] for step in range(steps)]


def test_a_line_over_the_rest_of_the_run_or_over_its_own_steps():
    assert course(schedules(0.5, type="linear", to=0.0)) == pytest.approx([0.5 - 0.05 * step for step in range(10)])
    part = course(schedules(0.5, type="linear", to=0.1, start=2, steps=4))
    assert part == pytest.approx([0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])


def test_a_cosine_is_flat_at_both_ends_and_half_way_in_the_middle():
    values = course(schedules(1.0, type="cosine", to=0.0))
    assert values == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 10) for step in range(10)])


SIGNAL = {"type": "signal", "at_zero": 0.1, "at_full": 0.5, "full": 2.0, "smoothing": 0.5}


def test_a_signal_is_averaged_clipped_and_known_a_lag_later():
    made = schedules(0.3, **SIGNAL)
    values = []
    for step, measured in enumerate([4.0, 1.0, 0.0, 0.0]):
        values.append(made.at(step)["rollout.alpha"])
        made.observe(step + 1, {"reverse_kl": measured})
    # Averages after each step: 4, 2.5, 1.25, 0.625. Step s uses the one after s - 1 steps; before any, the setting's own.
    assert values == pytest.approx([0.3, 0.3, 0.5, 0.5])
    assert made.at(4)["rollout.alpha"] == pytest.approx(0.1 + 0.4 * 1.25 / 2.0)


def test_a_step_without_the_signal_keeps_the_average():
    made = schedules(0.3, max_staleness=0, **SIGNAL)
    made.observe(1, {"reverse_kl": 1.0})
    made.observe(2, {})
    assert made.at(2)["rollout.alpha"] == pytest.approx(0.3)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_resumed_run_decides_alike(max_staleness: int):
    signals = [3.0, 0.4, 1.9, 0.2, 1.1, 0.7, 2.2, 0.1]

    def run(made: Schedules, start: int, values: list[float]) -> list[float]:
        for step in range(start, len(signals)):
            values.append(made.at(step)["rollout.alpha"])
            made.observe(step + 1, {"reverse_kl": signals[step]})
        return values

    whole = run(schedules(0.3, max_staleness=max_staleness, **SIGNAL), 0, [])
    before = schedules(0.3, max_staleness=max_staleness, **SIGNAL)
    for step in range(5):
        before.observe(step + 1, {"reverse_kl": signals[step]})
    after = schedules(0.3, max_staleness=max_staleness, **SIGNAL)
    after.restore(json.loads(json.dumps(before.state())))
    assert run(after, 5, []) == pytest.approx(whole[5:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedules": {"loss.beta": {"type": "linear", "to": 0.5}}},
            "loss.beta: no number that can change; those are rollout",
        ),
        ({"schedules": {"training.steps": {"type": "linear", "to": 5}}}, "training.steps: no number that can change"),
        ({"schedules": {"rollout.alpha": {"type": "linear", "to": 1.5}}}, "at 1.5: rollout.alpha=1.5"),
        ({"schedules": {"rollout.alpha": {"type": "linear", "to": 1.0}}}, "at 1: rollout.alpha=1 with loss.type=minillm"),
        ({"schedules": {"rollout.alpha": {**SIGNAL, "at_full": -1.0}}}, "at -1: rollout.alpha"),
    ],
)
def test_a_course_that_leads_to_an_invalid_value_is_refused_at_start(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_config(BASE | {"training": changes})


def test_numbers_of_the_loss_may_change():
    course = {"loss.temperature": {"type": "linear", "to": 1.0}, "loss.soft_share": {"type": "cosine", "to": 1.0}}
    sections = {"loss": {"type": "hinton", "temperature": 4}, "rollout": {"alpha": 1}, "training": {"schedules": course}}
    config = parse_config(BASE | sections)
    assert config.scheduled("loss.temperature") == 4.0


def test_weights_of_features_may_change_where_there_are_any():
    course = {"training.features.hidden.weight": {"type": "linear", "to": 0.0}}
    training = {"features": {"hidden": {"weight": 0.5}}, "schedules": course}
    config = parse_config(BASE | {"training": training})
    assert config.scheduled("training.features.hidden.weight") == 0.5
    other = {"training.features.attention.weight": {"type": "linear", "to": 0.0}}
    with pytest.raises(ConfigError, match=r"features\.attention\.weight: no number.*, training\.features\.hidden\.weight"):
        parse_config(BASE | {"training": training | {"schedules": other}})
    with pytest.raises(ConfigError, match=r"features\.hidden\.weight at -1: .*training\.features\.hidden\.weight=-1"):
        parse_config(BASE | {"training": training | {"schedules": {next(iter(course)): {"type": "linear", "to": -1.0}}}})


def test_a_section_gets_its_values_by_its_own_names():
    values = {"rollout.alpha": 0.1, "loss.beta": 0.2, "training.features.hidden.weight": 0.3}
    assert of_section("loss", values) == {"beta": 0.2}
    assert of_section("training.features", values) == {"hidden.weight": 0.3}


def test_a_signal_that_never_comes_is_an_error_and_not_a_constant():
    with pytest.raises(
        DataError, match=r"schedules\.rollout\.alpha\.signal=reverse_kl: the rollouts of this run do not have it"
    ):
        schedules(0.3, **SIGNAL).observe(1, {"truncated": 0.0})


def test_both_ends_of_all_courses_count_together():
    """Each course alone is valid; where both have ended, the student's own samples would be the labels."""
    courses = {name: {"type": "linear", "to": 0.0} for name in ("rollout.alpha", "rollout.data_share")}
    sections = {"loss": {"type": "sequence"}, "rollout": {"alpha": 1, "data_share": 1}}
    for name, course in courses.items():
        if name == "rollout.data_share":
            parse_config(BASE | sections | {"training": {"schedules": {name: course}}})
    with pytest.raises(
        ConfigError, match=r"rollout\.alpha at 0, rollout\.data_share at 0: rollout\.alpha=0 with loss\.type=seq"
    ):
        parse_config(BASE | sections | {"training": {"schedules": courses}})
