"""Lengths of a resumed run's phases, against what its checkpoint has behind it."""

from __future__ import annotations

from cluster.checkpointing import Checkpoint, Numbering
from kdray.config.training import TrainingSettings
from kdray.errors import ConfigError


def check_steps(training: TrainingSettings, checkpoint: Checkpoint) -> None:
    """Check the lengths of all phases against what a checkpoint has behind it. Raises: ConfigError with what they may be."""
    progress, distillation = checkpoint.progress, training.steps
    # Earlier versions wrote no lengths of the other phases, and their runs were as long as they were laid out for.
    distilled = progress.get("steps", progress["horizon"])
    if checkpoint.stage == "sft":
        # Distillation has not begun: it may be as long as it likes.
        _at_least("training.sft.steps", training.sft.steps, checkpoint.phase_step)
        return
    _as_it_was("training.sft.steps", training.sft.steps, progress.get("sft_steps"))
    if checkpoint.stage == "distill":
        _at_least("training.steps", distillation, checkpoint.step)
    else:
        _as_it_was("training.steps", distillation, distilled)
    horizon, schedule = progress["horizon"], training.schedule
    if schedule != "constant" and distillation > horizon:
        raise ConfigError(
            f"training.steps={distillation}, but the run's {schedule} schedule was laid out for {horizon} steps; "
            "a resumed run may end earlier, and go on longer only with training.schedule=constant"
        )
    tuned = training.finetune.steps
    if checkpoint.stage == "control":
        _as_it_was("training.finetune.steps", tuned, progress.get("finetune_steps"))
    if checkpoint.stage == "finetune":
        done = Numbering(distilled, tuned).finetune_done(checkpoint.step)
        _at_least("training.finetune.steps", tuned, done)
        least = max(1, done)
        if tuned < least:
            raise ConfigError("training.finetune.steps=0, but that phase has begun; 1 ends it soonest")
        if schedule != "constant" and tuned not in (least, progress.get("finetune_steps", tuned)):
            raise ConfigError(
                f"training.finetune.steps={tuned}, but the phase's {schedule} schedule was laid out for "
                f"{progress['finetune_steps']} steps; keep these, or end it now by {least}"
            )


def _at_least(setting: str, steps: int, done: int) -> None:
    if steps < done:
        raise ConfigError(
            f"{setting}={steps}, but the run's newest checkpoint has {done} steps already; set {setting} to at least that"
        )


def _as_it_was(setting: str, steps: int, done: int | None) -> None:
    if done is not None and steps != done:
        raise ConfigError(
            f"{setting}={steps}, but the run has {done} steps of that phase behind it already; set {setting} to that"
        )
