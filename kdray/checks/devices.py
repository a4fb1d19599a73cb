"""Checks of where engines compute, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator

from kdray.config import Config, EngineSettings, ModelSource, vllm_build
from kdray.config.route import Route
from kdray.errors import ConfigError
from kdray.models.inspect import architecture
from kdray.models.precision import engine_dtype
from kdray.models.weight_format import WeightFormat

_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
"""`training.precision` -> dtype of the student's forward pass."""


def check_gpus(config: Config) -> None:
    """Raises: ConfigError for an engine that reserves no GPU, if the installed build of vLLM computes on GPUs alone."""
    if vllm_build.vllm_device() != "gpu":
        return
    for setting, engine in _engines(config).items():
        if engine.num_gpus:
            continue
        parts = engine.tensor_parallel_size
        share = f", or a share of a GPU with {setting}.gpu_memory_utilization below it" if parts == 1 else ""
        raise ConfigError(
            f"{setting}.num_gpus=0 with tensor_parallel_size={parts}: the installed vLLM computes on GPUs, and Ray hides none "
            f"from a replica that reserves none, so that every such replica would take the node's first; set "
            f"{setting}.num_gpus={parts}{share}, remove it, or install the CPU build of vLLM"
        )


def check_model_runners(config: Config) -> None:
    """Raises: ConfigError for an engine on vLLM's newer model runner, if the installed build of vLLM computes on CPUs."""
    if vllm_build.vllm_device() != "cpu":
        return
    for setting, engine in _engines(config).items():
        if engine.model_runner == "v2":
            raise ConfigError(
                f"{setting}.model_runner=v2: the installed vLLM computes on CPUs, and this model runner needs a GPU (its "
                f"kernels are Triton's); set {setting}.model_runner=v1"
            )


def precision_notes(config: Config) -> Iterator[str]:
    """One line for each engine that samples the student's rollouts in another dtype than training computes in.

    Raises: ConfigError if an engine cannot compute in a checkpoint's dtype.
    """
    precision = config.training.precision
    trained = _PRECISIONS[precision]
    for setting, (engine, source, revision) in _samplers(config).items():
        sampled = engine_dtype(engine, source, revision)
        if sampled == trained:
            continue
        other = next((name for name, dtype in _PRECISIONS.items() if dtype == sampled), None)
        remedy = f", or training.precision={other}" if other is not None else ""
        yield (
            f"{setting} samples the student's rollouts in {sampled}, and training.precision={precision} computes in "
            f"{trained}: their probabilities differ by rounding; set {setting}.dtype={trained}{remedy} to have one precision"
        )


def quantisation_notes(config: Config) -> Iterator[str]:
    """One line for each served teacher whose weights are quantised.

    Raises: ConfigError for a format that engines do not load, or not on the device of the installed build.
    """
    device = vllm_build.vllm_device() or "gpu"
    for name in config.served_teachers:
        model = architecture(*config.source(name))
        form = WeightFormat.of(model)
        if form is not None:
            if not form.runs_on("gpu", model.model_type):
                raise ConfigError(
                    f"teachers.{name}.model has quantised weights ({form}) of a format that engines do not load: they load "
                    "compressed-tensors (int4, int8, FP8), GPTQ and AWQ (4 or 8 bits), FP8, and gpt-oss in mxfp4; use one of "
                    "these, or the model as it was before quantisation"
                )
            if not form.runs_on(device, model.model_type):
                raise ConfigError(
                    f"teachers.{name}.model has quantised weights ({form}) that the CPU build of vLLM cannot compute with: "
                    "it has kernels for 4-bit weights (compressed-tensors, GPTQ, AWQ), and for int8 weights with int8 "
                    "activations; use one of these, the model as it was before quantisation, or vLLM's build for GPUs"
                )
            yield f"teachers.{name}.model has quantised weights ({form}); the student beside it stays plain"


def _engines(config: Config) -> dict[str, EngineSettings]:
    """The run's engines, by setting."""
    served: dict[str, EngineSettings] = {f"teachers.{name}": each for name, each in config.served_teachers.items()}
    return served | ({"rollout.pool": config.rollout.pool} if config.has_rollout_pool else {})


def _samplers(config: Config) -> dict[str, tuple[EngineSettings, ModelSource, str | None]]:
    """Engines that sample with the student during training, by setting: each with the checkpoint that it is started from."""
    route = Route.of(config)
    if route.sampler == "students":
        return {"rollout.pool": (config.rollout.pool, config.student.model, config.student.revision)}
    mixes = config.rollout.alpha < 1 or "rollout.alpha" in config.training.schedules
    if route.sampler != "teachers" or not route.student_in_replicas or not mixes:
        return {}
    return {f"teachers.{name}": (each, *config.source(name)) for name, each in config.served_teachers.items()}
