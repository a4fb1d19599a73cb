"""Every setting: default, unit, check. YAML plus dotted overrides in, a resolved dump out.

Defaults are the vetted values; a recipe holds only what differs. Unknown keys are refused with the nearest valid one.
Checks here need nothing but the config itself; what needs files or a cluster is checked by `kdray.preflight` and
`cluster.placement`, before anything starts.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from kdray.errors import ConfigError
from kdray.settings.base import NonNegative, Positive, PositiveFloat, Settings, with_default_type
from kdray.settings.data import (
    DataSettings,
    HubPrompts,
    HubText,
    IterablePrompts,
    JsonlPrompts,
    JsonlText,
    ParquetPrompts,
    ParquetText,
    PromptSource,
    TaskName,
    TaskPrompts,
    TaskText,
    TextSource,
)
from kdray.settings.losses import (
    DIVERGENCE_LOSSES,
    AdaptiveKLLoss,
    ForwardKLLoss,
    ForwardKLSampledLoss,
    HintonLoss,
    JSDLoss,
    LMOpsLoss,
    LossSettings,
    MiniLLMLoss,
    MSELogitLoss,
    PerDecisionLoss,
    ReverseKLLoss,
    SequenceLoss,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    StalenessHandling,
    TVDLoss,
    ULDLoss,
    VOPDLoss,
    type_of,
)
from kdray.settings.models import Calibration, ModelSource, PrunedModel, StudentSettings, TinyModel, TinyTraining
from kdray.settings.rollout import EnsembleSettings, RolloutSettings, RouteRule, RouteSettings, TeachersSettings
from kdray.settings.teachers import (
    AutoscalingSettings,
    CaptureTeacherSettings,
    EngineSettings,
    HFTeacherSettings,
    OpenAITeacherSettings,
    OtherTeacherSettings,
    TeacherSettings,
    TeacherSource,
)
from kdray.settings.training import PretrainingSettings, SFTSettings, TrainingSettings

# ---------------------------------------------------------------------------------------------------------- run


class RunSettings(Settings):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `<output>/<name>`. Letters, digits, dot, dash and underscore."""
    seed: NonNegative = 0
    """Seed of everything random: data order, draws, initial weights of tiny models."""
    output: Path = Path("runs")
    """Folder that holds run folders. A relative path counts from the folder the command was started in."""


# --------------------------------------------------------------------------------------------------- evaluation


class EvaluationSettings(Settings):
    every: NonNegative = 0
    """Steps between evaluations during training; 0 measures only before and after."""
    prompts: Positive | None = None
    """Held-out prompts to use; None uses all of `data.heldout_size`."""
    control: bool = False
    """Also train a copy of the SFT student by SFT alone for the same number of student tokens, and report it beside."""


# ------------------------------------------------------------------------------------------------------ cluster


class ClusterSettings(Settings):
    address: str | None = None
    """Ray cluster to join; None takes RAY_ADDRESS, or starts a local Ray that ends with the run."""
    local_cpus: Positive | None = None
    """CPUs that a local Ray counts; None is the machine's. More than it has lets small models share cores."""
    health_check_period_s: PositiveFloat = 10.0
    """Seconds between health checks of a replica."""


class Config(Settings):
    """A whole run."""

    run: RunSettings
    """Name, seed, output."""
    data: DataSettings = DataSettings()
    """Prompts and what is held out."""
    student: StudentSettings
    """The model that learns."""
    teachers: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], TeacherSource] = Field(min_length=1)
    """Teachers by name; the keys depend on `type`: vllm (the default), openai, hf or capture."""
    rollout: RolloutSettings = RolloutSettings()
    """How sequences are drawn."""
    loss: LossSettings = MiniLLMLoss()
    """What is minimised; the keys depend on `type`, and docs/losses.md says which when."""
    training: TrainingSettings = TrainingSettings()
    """Optimizer, ranks, precision, checkpoints."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is measured on held-out prompts."""
    cluster: ClusterSettings = ClusterSettings()
    """Where it runs."""

    @model_validator(mode="before")
    @classmethod
    def _default_type(cls, tree: Any) -> Any:
        return with_default_type(tree, "loss", "minillm")

    @model_validator(mode="after")
    def _together(self) -> Config:
        self._check_teachers()
        if isinstance(self.loss, MiniLLMLoss | LMOpsLoss | PerDecisionLoss | VOPDLoss) and self.rollout.alpha == 1.0:
            raise ValueError(
                f"rollout.alpha=1 with loss.type={self.loss.type}: the weight q/m is unbounded when the teacher draws "
                "every token; use alpha below 1, or loss.type=forward_kl"
            )
        if isinstance(self.loss, ForwardKLSampledLoss) and self.rollout.alpha == 0.0:
            raise ValueError(
                "rollout.alpha=0 with loss.type=forward_kl_sampled: the weight p/m is unbounded when the student draws every "
                "token; use alpha above 0, or loss.type=forward_kl"
            )
        if self.rollout.teacher_signal == "hidden" and not isinstance(self.loss, DIVERGENCE_LOSSES):
            raise ValueError(
                f"rollout.teacher_signal=hidden with loss.type={self.loss.type}: exact rows are made for the divergences "
                f"({', '.join(sorted(type_of(loss) for loss in DIVERGENCE_LOSSES))}); choose one of them, or "
                "rollout.teacher_signal=support"
            )
        if isinstance(self.loss, SequenceLoss) and self.rollout.alpha < 1.0:
            raise ValueError(
                f"rollout.alpha={self.rollout.alpha:g} with loss.type=sequence: cross entropy of what the student drew teaches "
                "nothing; set rollout.alpha=1, so that the teacher writes"
            )
        if isinstance(self.loss, ULDLoss) and (
            self.rollout.sampler != "student" or len(self.teachers) > 1 or not self.served_teachers
        ):
            raise ValueError(
                "loss.type=uld: a teacher with another tokenizer cannot sample beside the student, nor share a target with "
                "others; set rollout.sampler=student, and keep one teacher of type vllm"
            )
        if isinstance(self.loss, ULDLoss) and self.training.pretraining is not None and self.training.pretraining.teacher_share:
            raise ValueError("training.pretraining.teacher_share with loss.type=uld: the text is in other ids; set it to 0")
        if "rollout" in self.teachers:
            raise ValueError("teachers.rollout: that is the name of the rollout pool; give the teacher another name")
        if self.training.batch_size % self.rollout.samples_per_prompt:
            raise ValueError(
                f"training.batch_size={self.training.batch_size} is not a multiple of "
                f"rollout.samples_per_prompt={self.rollout.samples_per_prompt}"
            )
        return self

    def _check_teachers(self) -> None:
        names, sharing = ", ".join(self.teachers), self.rollout.teachers
        text = self.training.pretraining
        if text is not None and text.teacher_share and not self.served_teachers:
            raise ValueError(
                f"training.pretraining.teacher_share={text.teacher_share:g}: the text is scored by a teacher of type vllm, and "
                "there is none; set it to 0"
            )
        if sharing is None:
            if len(self.teachers) > 1:
                raise ValueError(
                    f"teachers names {names}: say who teaches what: set rollout.teachers.type to route or ensemble"
                )
            return
        unknown = sorted(sharing.names() - set(self.teachers))
        if unknown:
            raise ValueError(f"rollout.teachers names {', '.join(unknown)}, but the teachers are {names}")
        if isinstance(sharing, EnsembleSettings) and sharing.support == "sampler" and self.rollout.sampler == "student":
            raise ValueError(
                "rollout.teachers.support=sampler with rollout.sampler=student: no teacher samples, so none has a support to "
                "share; use rollout.teachers.support=union"
            )
        if self.rollout.teacher_signal == "hidden" and len(self.teachers) > 1:
            raise ValueError(
                f"rollout.teacher_signal=hidden with teachers {names}: the ranks hold one output head; use "
                "rollout.teacher_signal=support"
            )
        if text is not None and text.teacher_share and len(self.teachers) > 1:
            raise ValueError(
                f"training.pretraining.teacher_share={text.teacher_share:g} with teachers {names}: nothing says which of them "
                "scores the text; set it to 0"
            )

    @property
    def served_teachers(self) -> dict[str, TeacherSettings]:
        """Teachers that replicas on the cluster serve."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, TeacherSettings)}

    @property
    def other_teachers(self) -> dict[str, OtherTeacherSettings]:
        """Teachers that are no pool of replicas."""
        return {name: teacher for name, teacher in self.teachers.items() if not isinstance(teacher, TeacherSettings)}

    @property
    def has_rollout_pool(self) -> bool:
        """Whether student-only replicas run: they sample, or measure a student whose teacher cannot hold it."""
        return self.rollout.sampler == "student" or bool(self.other_teachers)

    @property
    def run_folder(self) -> Path:
        return self.run.output / self.run.name

    @property
    def max_model_len(self) -> int:
        """Longest sequence that an engine must hold, in tokens."""
        text = self.training.pretraining
        window = text.window_tokens if text is not None and text.teacher_share else 0
        return max(self.data.max_prompt_tokens + self.rollout.max_new_tokens, window)

    def dump(self) -> str:
        """The resolved config as YAML: every setting, defaults included; `load_config` reads it back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# ------------------------------------------------------------------------------------------------ load, override


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML recipe and apply `a.b=value` overrides (values are YAML).

    Raises: ConfigError with file, setting, value and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` and `student:`, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a tree of plain values. Raises: ConfigError listing every problem, one a line."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = tree
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        if part in node and not isinstance(node[part], dict) and node[part] is not None:
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[leaf] = value


def _explain(item: Any) -> str:
    """One pydantic error as setting, value and remedy."""
    location = _written_keys(item["loc"], keep_last=item["type"] == "extra_forbidden")
    setting = ".".join(location)
    kind = item["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _keys_at(tuple(location[:-1])), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(sorted(_keys_at(tuple(location[:-1]))))}"
        return f"{setting}: unknown key; {hint}"
    if kind == "missing":
        return f"{setting}: required, but not set"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return message if not setting or message.startswith(setting) else f"{setting}: {message}"
    message = item["msg"][0].lower() + item["msg"][1:]
    if kind.startswith("union_tag") or isinstance(item.get("input"), dict):
        return f"{setting}: {message}"
    return f"{setting}={item.get('input')!r}: {message}"


def _written_keys(location: tuple[int | str, ...], keep_last: bool) -> list[str]:
    """The keys that the user wrote, out of a location of pydantic's, which names the members of unions too.

    Args: keep_last: whether the last part is a key that no model knows.
    """
    models: list[type[BaseModel]] = [Config]
    keys = []
    for depth, part in enumerate(location):
        known = [model for model in models if part in model.model_fields or model is TeachersMap]
        if known:
            models = _models_below(known, str(part))
        elif not isinstance(part, int) and not (keep_last and depth == len(location) - 1):
            continue
        keys.append(str(part))
    return keys


def _keys_at(location: tuple[str, ...]) -> list[str]:
    """Names of the settings that the section at `location` knows; over all members where the section is a union."""
    models: list[type[BaseModel]] = [Config]
    for part in location:
        models = _models_below(models, part)
    return sorted({name for model in models for name in model.model_fields if model is not TeachersMap})


def _models_below(models: list[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    following: list[type[BaseModel]] = []
    for model in models:
        if model is TeachersMap:
            following += _models_in(TeacherSource)
        elif key in model.model_fields:
            following += _models_in(model.model_fields[key].annotation)
    return following


class TeachersMap(BaseModel):
    """Stands for the map of teachers in `_keys_at`: any name leads to the kinds of teacher."""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) is dict:
        return [TeachersMap]
    return [model for argument in arguments for model in _models_in(argument)]


__all__ = [
    "DIVERGENCE_LOSSES",
    "AdaptiveKLLoss",
    "AutoscalingSettings",
    "Calibration",
    "CaptureTeacherSettings",
    "ClusterSettings",
    "Config",
    "DataSettings",
    "EngineSettings",
    "EnsembleSettings",
    "EvaluationSettings",
    "ForwardKLLoss",
    "ForwardKLSampledLoss",
    "HFTeacherSettings",
    "HintonLoss",
    "HubPrompts",
    "HubText",
    "IterablePrompts",
    "JSDLoss",
    "JsonlPrompts",
    "JsonlText",
    "LMOpsLoss",
    "LossSettings",
    "MSELogitLoss",
    "MiniLLMLoss",
    "ModelSource",
    "OpenAITeacherSettings",
    "OtherTeacherSettings",
    "ParquetPrompts",
    "ParquetText",
    "PerDecisionLoss",
    "PretrainingSettings",
    "PromptSource",
    "PrunedModel",
    "ReverseKLLoss",
    "RolloutSettings",
    "RouteRule",
    "RouteSettings",
    "RunSettings",
    "SFTSettings",
    "SequenceLoss",
    "Settings",
    "SkewForwardKLLoss",
    "SkewReverseKLLoss",
    "StalenessHandling",
    "StudentSettings",
    "TVDLoss",
    "TaskName",
    "TaskPrompts",
    "TaskText",
    "TeacherSettings",
    "TeacherSource",
    "TeachersSettings",
    "TextSource",
    "TinyModel",
    "TinyTraining",
    "TrainingSettings",
    "ULDLoss",
    "VOPDLoss",
    "load_config",
    "parse_config",
]
