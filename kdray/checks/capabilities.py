"""What kinds of teacher can say, what a run needs of them, and the refusal where the two do not meet."""

from __future__ import annotations

from typing import Literal

from kdray.capturing.format import signals as recorded_signals
from kdray.config import (
    CaptureTeacherSettings,
    Config,
    EnsembleSettings,
    ForwardKLSampledLoss,
    HFTeacherSettings,
    LMOpsLoss,
    MiniLLMLoss,
    OpenAITeacherSettings,
    PerDecisionLoss,
    SequenceLoss,
    TeacherSource,
    VOPDLoss,
    parse_config,
)
from kdray.errors import ConfigError

Capability = Literal["text", "references", "sampled", "top_k", "requested", "hidden", "beside"]
"""`text`: it writes responses. `references`: the same scores as of any response, of the data's reference answers. `sampled`:
log p of the tokens of a given response. `top_k`: its top ids and the mass outside. `requested`: log p at ids that the caller
names. `hidden`: its last hidden states. `beside`: it samples together with the student, token by token, so that the density of
every draw is known."""

_MEANING: dict[Capability, str] = {
    "text": "responses that it writes",
    "references": "its scores of the data's reference answers",
    "sampled": "its log p of every token",
    "top_k": "its logprobs at its top ids",
    "requested": "its logprobs at ids that another teacher names",
    "hidden": "its hidden states",
    "beside": "sampling beside the student",
}


def offered(teacher: TeacherSource) -> frozenset[Capability]:
    """What a teacher can say, by its settings."""
    if isinstance(teacher, OpenAITeacherSettings):
        return frozenset(("text", "references", "sampled", "top_k") if teacher.logprobs else ("text",))
    if isinstance(teacher, HFTeacherSettings):
        return frozenset(("text", "references", "sampled", "top_k", "requested"))
    if isinstance(teacher, CaptureTeacherSettings):
        # `sampled` is of any response, and of one that was not recorded it knows nothing.
        said: set[Capability] = {signal for signal in recorded_signals(teacher.path) if signal != "sampled"}
        return frozenset(said if teacher.model is not None else said - {"hidden"})
    if teacher.scoring == "prompt_logprobs":
        return frozenset(_MEANING) - {"requested", "hidden"}
    return frozenset(_MEANING)


def needed(config: Config) -> dict[Capability, str]:
    """What every teacher of the run has to say, and the setting that asks for it."""
    loss, rollout = config.loss, config.rollout
    by_loss = f"loss.type={loss.type}"
    asks: dict[Capability, str] = {}
    if rollout.data_share and not isinstance(loss, SequenceLoss):
        asks["references"] = f"rollout.data_share={rollout.data_share:g}"
    if rollout.data_share == 1.0:
        # Nothing is drawn.
        pass
    elif rollout.sampler == "student":
        asks["sampled"] = "rollout.sampler=student"
    elif rollout.alpha < 1.0 and rollout.teacher_share < 1.0:
        asks["beside"] = f"rollout.alpha={rollout.alpha:g}"
    else:
        asks["text"] = "rollout.alpha=1"
    if isinstance(loss, ForwardKLSampledLoss | PerDecisionLoss):
        asks["sampled"] = by_loss
    elif isinstance(loss, MiniLLMLoss | LMOpsLoss):
        asks["top_k" if loss.single_step else "sampled"] = by_loss
    elif not isinstance(loss, SequenceLoss):
        asks["top_k"] = by_loss
    if (
        isinstance(loss, ForwardKLSampledLoss | PerDecisionLoss | MiniLLMLoss | LMOpsLoss | VOPDLoss)
        and rollout.sampler != "student"
    ):
        # Their weights divide by the density that each token was drawn from.
        asks["beside"] = by_loss
    if rollout.teacher_signal == "hidden":
        asks["hidden"] = "rollout.teacher_signal=hidden"
    if isinstance(rollout.teachers, EnsembleSettings):
        asks["requested"] = "rollout.teachers.type=ensemble"
    return asks


def check_capabilities(config: Config) -> None:
    """Raises: ConfigError naming the first teacher that cannot say what the run needs, who needs it, and the remedy.

    What settings ask for that change during the run counts at both ends.
    """
    asks = needed(config)
    for _, tree in config.extremes():
        asks |= needed(parse_config(tree))
    for name, teacher in config.teachers.items():
        can = offered(teacher)
        for capability, setting in asks.items():
            if capability not in can:
                raise ConfigError(
                    f"{setting} needs {_MEANING[capability]}, and teachers.{name} (type={teacher.type}) gives "
                    f"{', '.join(_MEANING[one] for one in _MEANING if one in can)} only; {_remedy(teacher, capability)}"
                )


def _remedy(teacher: TeacherSource, capability: Capability) -> str:
    if isinstance(teacher, CaptureTeacherSettings) and capability in ("text", "references", "top_k"):
        return "capture what the run needs (`kdray capture` with its settings), or use the teacher itself"
    if isinstance(teacher, CaptureTeacherSettings) and capability == "hidden":
        return "capture with rollout.teacher_signal=hidden, and name the teacher's model, whose output head the ranks take"
    if isinstance(teacher, OpenAITeacherSettings) and capability in ("sampled", "top_k"):
        return "set its logprobs, where the endpoint names token ids, or use loss.type=sequence with rollout.alpha=1"
    if capability == "beside":
        return "let it write (rollout.alpha=1 with loss.type=sequence), or the student sample (rollout.sampler=student)"
    return "use a teacher of type vllm with scoring=recorder"
