"""Checks of a run's models from their configs alone: families that cannot have their role, and sizes that cannot be split."""

from __future__ import annotations

from collections.abc import Iterator

from kdray.config import Config, EngineSettings, ModelSource, vllm_build
from kdray.config.route import Route
from kdray.errors import ConfigError
from kdray.models.families import Role, check_family
from kdray.models.inspect import architecture, check_source, describe
from kdray.models.tensor_parallel import common_sizes, indivisible
from kdray.teachers.kind import kind_of

Model = tuple[ModelSource, str | None]
"""Model and revision."""

_STUDENT = "student.model"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head for which vLLM 0.32 has a kernel on CPUs; with another, its engine dies at the first request."""


def check_models(config: Config) -> None:
    """Check every model whose weights the run loads. Raises: ConfigError with setting, reason and remedy."""
    models: dict[str, tuple[Model, Role]] = {_STUDENT: ((config.student.model, config.student.revision), "student")}
    for name, settings in config.teachers.items():
        model = kind_of(config, name).model
        if model is not None:
            models[f"teachers.{name}.model"] = model, "teacher" if settings.served else "in-process teacher"
    for setting, (model, _) in models.items():
        check_source(setting, *model)
    for setting, (model, role) in models.items():
        check_family(setting, role, *model, config.max_model_len, config.run.untried_models)
    for setting, engine, held in _engines(config):
        _check_split(setting, engine, held)


def check_heads(config: Config) -> None:
    """Check that vLLM has an attention kernel for every model that is served on CPUs; their configs are known to be readable.

    Raises: ConfigError with setting, reason and remedy.
    """
    served = [held for _, engine, held in _engines(config) if not engine.num_gpus and vllm_build.vllm_device() != "gpu"]
    for name, model in (each for held in served for each in held.items()):
        text = architecture(*model).get_text_config()
        if getattr(text, "kv_lora_rank", None):
            # Latent attention has a kernel of its own.
            continue
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if size not in CPU_HEAD_SIZES:
            raise ConfigError(
                f"{name}={describe(model[0])}: its attention heads are {size} wide, and vLLM on CPUs has kernels for "
                f"{', '.join(map(str, CPU_HEAD_SIZES))} alone; use another model, or engines with GPUs"
            )


def _engines(config: Config) -> Iterator[tuple[str, EngineSettings, dict[str, Model]]]:
    """Setting of every engine, its settings, and its models by the setting that names each."""
    route = Route.of(config)
    student = {_STUDENT: (config.student.model, config.student.revision)}
    if route.student_pool:
        yield "rollout.pool", config.rollout.pool, student
    for name, engine in config.served_teachers.items():
        model = kind_of(config, name).model
        teacher = {} if model is None else {f"teachers.{name}.model": model}
        yield f"teachers.{name}", engine, teacher | (student if route.student_in_replicas else {})


def _check_split(setting: str, engine: EngineSettings, held: dict[str, Model]) -> None:
    """Check that an engine's ranks can share its models. Args: held: models of the engine, by the setting that names each."""
    size = engine.tensor_parallel_size
    if size == 1:
        return
    configs = {name: architecture(*model) for name, model in held.items()}
    for name, config in configs.items():
        rest = indivisible(config, size)
        if rest:
            sizes = ", ".join(map(str, common_sizes(list(configs.values()))))
            which = "both of its models" if len(configs) > 1 else "its model"
            raise ConfigError(
                f"{setting}.tensor_parallel_size={size}: {name}={describe(held[name][0])} has {' and '.join(rest)}, "
                f"which {size} ranks cannot share evenly; sizes that divide {which}: {sizes}"
            )
