"""Checks that each teacher provides the signals that the config needs."""

from __future__ import annotations

from kdray.config import Config, parse_config
from kdray.config.signals import MEANING, Signal
from kdray.errors import ConfigError
from kdray.teachers.kind import kind_of


def needed(config: Config) -> dict[Signal, str]:
    """Signals that every teacher of the run must provide, each with the setting that requires it."""
    loss, rollout = config.loss, config.rollout
    by_loss = f"loss.type={loss.type}"
    asks: dict[Signal, str] = {}
    if rollout.data_share and loss.signals:
        asks["references"] = f"rollout.data_share={rollout.data_share:g}"
    if rollout.data_share == 1.0:
        # No token is sampled.
        pass
    elif rollout.sampler == "student":
        asks["sampled"] = "rollout.sampler=student"
    elif rollout.alpha < 1.0 and rollout.teacher_share < 1.0:
        asks["beside"] = f"rollout.alpha={rollout.alpha:g}"
    else:
        asks["text"] = "rollout.alpha=1"
    asks |= dict.fromkeys(sorted(loss.signals), by_loss)
    if loss.importance_weight is not None and rollout.sampler != "student":
        # Its importance weights divide by the density that each token was sampled from.
        asks["beside"] = by_loss
    if rollout.teacher_signal == "hidden":
        asks["hidden"] = "rollout.teacher_signal=hidden"
    if rollout.teachers is not None and rollout.teachers.one_target:
        asks["requested"] = "rollout.teachers.type=ensemble"
    return asks


def check_capabilities(config: Config) -> None:
    """Raises: ConfigError naming the first teacher that lacks a signal, the setting that needs it, and the remedy.

    Scheduled settings are checked at both ends.
    """
    asks = needed(config)
    for _, tree in config.extremes():
        asks |= needed(parse_config(tree))
    for name, teacher in config.teachers.items():
        kind = kind_of(config, name)
        can = kind.offers()
        for signal, setting in asks.items():
            if signal not in can:
                raise ConfigError(
                    f"{setting} needs {MEANING[signal]}, and teachers.{name} (type={teacher.type}) gives "
                    f"{', '.join(MEANING[one] for one in MEANING if one in can)} only; {kind.remedy(signal) or _remedy(signal)}"
                )


def _remedy(signal: Signal) -> str:
    if signal == "beside":
        return "let it write (rollout.alpha=1 with loss.type=sequence), or the student sample (rollout.sampler=student)"
    return "use a teacher of type vllm with scoring=recorder"
