"""Environments: settings for what answers a model in the middle of a rollout, such as a tool or the other player of a game.

An environment from another distribution is a subclass of `EnvironmentSettings`, registered under its `type` in the entry-point
group `kdray.environments`; see docs/extending.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import SerializeAsAny

from kdray.config.base import Positive, Settings
from kdray.config.registry import SettingsRegistry

ENVIRONMENTS: SettingsRegistry = SettingsRegistry("kdray.environments", "environment")


@ENVIRONMENTS.root
class EnvironmentSettings(Settings):
    """What writes between the model's turns."""

    implementation: ClassVar[str]
    """Implementation as `module:name`: called with the settings, it returns a `kdray.rollouts.environments.Environment`."""

    type: str
    """Name of the environment; a subclass narrows it to a `Literal` of its own."""
    max_turns: Positive = 4
    """Turns of the model in one rollout. A rollout that would need another one ends there, truncated."""
    max_reply_tokens: Positive = 16
    """Tokens that the environment may write after a turn, in the student's tokens. A rollout whose next reply would be longer
    ends there, truncated. Engines and ranks hold `max_turns` times this beside `rollout.max_new_tokens`."""

    @property
    def max_tokens(self) -> int:
        """Tokens that the environment may write in one rollout."""
        return self.max_turns * self.max_reply_tokens


@ENVIRONMENTS.add("calculator")
class CalculatorEnvironment(EnvironmentSettings):
    """A calculator in the notation of GSM8K's solutions: after `<<12*7=` it writes `84>>`, and the model goes on. Numbers,
    brackets, `+ - * / // % **` and signs, computed exactly; `error>>` for anything else."""

    implementation = "kdray.rollouts.environments.calculator:Calculator"

    type: Literal["calculator"] = "calculator"


@ENVIRONMENTS.add("subtraction_game")
class SubtractionGameEnvironment(EnvironmentSettings):
    """The other player of the subtraction game of task `subtraction_game`: from a pile, two players in turn take one to
    three, and who takes the last one wins. A move is a number and `;`, the model's first. An illegal move loses at
    once."""

    implementation = "kdray.rollouts.environments.subtraction_game:SubtractionGame"

    type: Literal["subtraction_game"] = "subtraction_game"
    max_turns: Positive = 16
    """Turns of the model in one rollout; a pile of n may take (n + 1) / 2."""
    max_reply_tokens: Positive = 4
    """Tokens of the other player's move, which is two characters."""
    opponent: Literal["perfect", "random"] = "random"
    """`random`: takes any legal number, drawn from the sample's seed. `perfect`: wins wherever the model leaves it a win, and
    takes one elsewhere."""


EnvironmentSource = Annotated[SerializeAsAny[EnvironmentSettings] | None, ENVIRONMENTS.member(short=True)]
"""An environment of any kind, or its name if it needs no other settings; None where a response is one turn."""
