"""Settings that change during a run: on a schedule of steps, or with what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdray.config.base import Fraction, NonNegative, Positive, PositiveFloat, Settings


class StepSchedule(Settings):
    """From the setting's own value to another one, over steps."""

    SHAPES: ClassVar[dict[str, Callable[[float], float]]] = {
        "linear": lambda share: share,
        "cosine": lambda share: 0.5 - 0.5 * math.cos(math.pi * share),
    }
    """Share of the way to `to`, by share of the course."""

    type: Literal["linear", "cosine"]
    to: float
    """Value at the end of the course, kept from then on."""
    start: NonNegative = 0
    """Step at which the course begins; until then the setting has its own value."""
    steps: Positive | None = None
    """Length of the course; None takes the rest of `training.steps`."""

    @property
    def extremes(self) -> tuple[float, ...]:
        """Values between which the course lies, the setting's own one aside."""
        return (self.to,)

    @property
    def follows(self) -> str | None:
        """The metric that the course depends on; None where steps alone decide."""
        return None

    def average(self, last: float | None, measured: float) -> float:
        """The moving average of the metric that it follows, of which a course of steps has none."""
        return measured

    def value(self, own: float, step: int, last_step: int, average: float | None) -> float:
        """The setting's value at `step`. Args: own: its own value; last_step: of the run; average: of the metric it follows."""
        length = last_step - self.start if self.steps is None else self.steps
        share = min(1.0, max(0.0, (step - self.start) / max(1, length)))
        return own + self.SHAPES[self.type](share) * (self.to - own)


class SignalSchedule(Settings):
    """In proportion to a signal of the training batches, such as how far the student is from its teacher."""

    type: Literal["signal"]
    signal: Literal["reverse_kl", "forward_kl", "truncated", "importance_weight_ess"] = "reverse_kl"
    """The metric to follow. Until the first one is known the setting has its own value."""
    at_zero: float
    """Value where the signal is 0."""
    at_full: float
    """Value where the signal is `full` or more; between, the value is a straight line."""
    full: PositiveFloat
    """Signal at which `at_full` is reached."""
    smoothing: Annotated[Fraction, Field(lt=1.0)] = 0.8
    """Share of the old average that each step keeps; 0 follows the last batch alone."""

    @property
    def extremes(self) -> tuple[float, ...]:
        """Values between which the course lies."""
        return (self.at_zero, self.at_full)

    @property
    def follows(self) -> str | None:
        """The metric that the course depends on."""
        return self.signal

    def average(self, last: float | None, measured: float) -> float:
        """The moving average of the metric after one more step."""
        return measured if last is None else self.smoothing * last + (1.0 - self.smoothing) * measured

    def value(self, own: float, step: int, last_step: int, average: float | None) -> float:
        """As for `StepSchedule`; the setting's own value until the metric is known."""
        if average is None:
            return own
        return self.at_zero + min(1.0, max(0.0, average / self.full)) * (self.at_full - self.at_zero)


ScheduleSettings = Annotated[StepSchedule | SignalSchedule, Field(discriminator="type")]
