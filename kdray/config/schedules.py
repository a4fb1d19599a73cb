"""Schedules of settings during a run: by step, or following a measured metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdray.config.base import Fraction, NonNegative, Positive, PositiveFloat, Settings


class StepSchedule(Settings):
    """A ramp from the setting's initial value to another one, over steps."""

    SHAPES: ClassVar[dict[str, Callable[[float], float]]] = {
        "linear": lambda share: share,
        "cosine": lambda share: 0.5 - 0.5 * math.cos(math.pi * share),
    }
    """Progress towards `to` as a function of the elapsed share of the schedule."""

    type: Literal["linear", "cosine"]
    to: float
    """Final value, kept from then on."""
    start: NonNegative = 0
    """Step at which the schedule begins; until then the setting has its initial value."""
    steps: Positive | None = None
    """Length of the schedule in steps; None takes the rest of `training.steps`."""

    @property
    def extremes(self) -> tuple[float, ...]:
        """End points of the schedule's values, apart from the initial value."""
        return (self.to,)

    @property
    def follows(self) -> str | None:
        """Metric that the schedule depends on; None if it depends on steps alone."""
        return None

    def average(self, last: float | None, measured: float) -> float:
        """Moving average of the metric that it follows; a schedule of steps has none."""
        return measured

    def value(self, own: float, step: int, last_step: int, average: float | None) -> float:
        """Value at `step`. Args: own: initial value; last_step: of the run; average: of the metric that it follows."""
        length = last_step - self.start if self.steps is None else self.steps
        share = min(1.0, max(0.0, (step - self.start) / max(1, length)))
        return own + self.SHAPES[self.type](share) * (self.to - own)


class SignalSchedule(Settings):
    """A value in proportion to a metric of the training batches, such as the divergence of the student from its teacher."""

    type: Literal["signal"]
    signal: Literal["reverse_kl", "forward_kl", "truncated", "importance_weight_ess"] = "reverse_kl"
    """The metric to follow. Until its first measurement the setting has its initial value."""
    at_zero: float
    """Value when the signal is 0."""
    at_full: float
    """Value when the signal is `full` or more, with linear interpolation in between."""
    full: PositiveFloat
    """Signal level at which `at_full` is reached."""
    smoothing: Annotated[Fraction, Field(lt=1.0)] = 0.8
    """Weight of the old average in each update; 0 follows the last batch alone."""

    @property
    def extremes(self) -> tuple[float, ...]:
        """End points of the schedule's values."""
        return (self.at_zero, self.at_full)

    @property
    def follows(self) -> str | None:
        """Metric that the schedule depends on."""
        return self.signal

    def average(self, last: float | None, measured: float) -> float:
        """Moving average of the metric after one more step."""
        return measured if last is None else self.smoothing * last + (1.0 - self.smoothing) * measured

    def value(self, own: float, step: int, last_step: int, average: float | None) -> float:
        """As for `StepSchedule`; the initial value until the metric is known."""
        if average is None:
            return own
        return self.at_zero + min(1.0, max(0.0, average / self.full)) * (self.at_full - self.at_zero)


ScheduleSettings = Annotated[StepSchedule | SignalSchedule, Field(discriminator="type")]
