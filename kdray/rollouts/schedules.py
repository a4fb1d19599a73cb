"""Values of scheduled settings at a step: a function of the step, or of signals measured some steps before.

A batch's samples are admitted `max_staleness` steps before it trains. So the values of a step depend on the signals known then,
at any replica speed, and a resumed run computes the same values.
"""

from __future__ import annotations

from collections.abc import Mapping

from kdray.config import Config
from kdray.config.schedules import ScheduleSettings
from kdray.errors import DataError


class Schedules:
    """Scheduled values by name, for the settings in `training.schedules`."""

    def __init__(
        self, settings: Mapping[str, ScheduleSettings], own: Mapping[str, float], steps: int, max_staleness: int
    ) -> None:
        """Args: own: unscheduled values of the settings, by the same names; steps: steps that they are laid out for."""
        self._settings = settings
        self._own = own
        self._steps = steps
        self._lag = max_staleness
        self._averages: dict[int, dict[str, float]] = {}

    @classmethod
    def of(cls, config: Config, horizon: int | None = None) -> Schedules:
        """Build the schedules of a run. Args: horizon: steps that they are laid out for; None for those of the run."""
        settings = config.training.schedules
        own = {name: config.scheduled(name) or 0.0 for name in settings}
        return cls(settings, own, horizon or config.training.steps, config.rollout.max_staleness)

    def at(self, step: int) -> dict[str, float]:
        """Return the values for the batch of step `step`, counted from 0.

        Raises: KeyError if the signals of step `step - max_staleness` were not observed yet.
        """
        return {name: self._value(name, setting, step) for name, setting in self._settings.items()}

    def observe(self, done: int, metrics: Mapping[str, float]) -> None:
        """Record a step's metrics. Args: done: steps completed, this one included.

        Raises: DataError if no step so far has had a signal; the schedule would silently never change.
        """
        before = self._averages.get(done - 1, {})
        averages = {}
        for name, setting in self._settings.items():
            if setting.follows is not None:
                last = before.get(name)
                measured = metrics.get(setting.follows, last)
                if measured is None:
                    raise DataError(
                        f"training.schedules.{name}.signal={setting.follows}: the rollouts of this run do not have it; exact "
                        "KLs need replicas that hold teacher and student, weights of draws a density; use another signal"
                    )
                averages[name] = setting.average(last, measured)
        self._averages[done] = averages
        # No admitted batch needs older ones.
        self._averages = {at: kept for at, kept in self._averages.items() if at >= done - self._lag - 1}

    def state(self) -> dict[str, dict[str, float]]:
        """State that a resume needs, as JSON values."""
        return {str(done): averages for done, averages in self._averages.items()}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from `state()`."""
        self._averages = {int(done): dict(averages) for done, averages in state.items()}

    def _value(self, name: str, setting: ScheduleSettings, step: int) -> float:
        known = step - self._lag
        average = self._averages[known].get(name) if setting.follows is not None and known > 0 else None
        return setting.value(self._own[name], step, self._steps, average)


def of_section(section: str, values: Mapping[str, float]) -> dict[str, float]:
    """Select the scheduled values of a section, by their names within it."""
    return {name.removeprefix(f"{section}."): value for name, value in values.items() if name.startswith(f"{section}.")}
