"""Check of a run's trackers before anything starts."""

from __future__ import annotations

from kdray.config import Config
from kdray.errors import ConfigError


def check_trackers(config: Config) -> None:
    """Check that the trackers can work here. Raises: ConfigError with the first one's reason and remedy."""
    for number, each in enumerate(config.run.trackers):
        if (reason := each.unusable()) is not None:
            raise ConfigError(f"run.trackers.{number}.type={each.type}: {reason}")
