"""Settings that change during a run: on a schedule of steps, or with what was measured."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdray.config.base import Fraction, NonNegative, Positive, PositiveFloat, Settings


class StepSchedule(Settings):
    """From the setting's own value to another one, over steps."""

    needs_student: ClassVar[bool] = False
    """The course depends on what is measured of the student while it trains."""

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


class SignalSchedule(Settings):
    """In proportion to a signal of the training batches, such as how far the student is from its teacher."""

    needs_student: ClassVar[bool] = True

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


ScheduleSettings = Annotated[StepSchedule | SignalSchedule, Field(discriminator="type")]
