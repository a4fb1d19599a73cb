"""Student backends: settings of the code that holds and trains the student on the ranks, with facts that the planner needs.

Settings only: a backend's code is named by `implementation`, and imported when a rank starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, SerializeAsAny, model_validator

from kdray.config.allowed import check_allowed
from kdray.config.base import NonNegative, OnResume, Positive, Settings
from kdray.config.registry import SettingsRegistry

Precision = Literal["fp32", "bf16"]


class ParameterBytes(NamedTuple):
    """Memory that a rank needs per parameter of the student, bytes, averaged over the parameters."""

    weights: float
    gradients: float
    optimizer: float


STUDENT_BACKENDS: SettingsRegistry[StudentBackendSettings] = SettingsRegistry(
    "kdray.student_backends", "student backend", default="deepspeed"
)


@STUDENT_BACKENDS.root
class StudentBackendSettings(Settings):
    """Base class of all backend settings: `type`, the backend's own fields, and its facts."""

    implementation: ClassVar[str]
    """`module:Class` of the `actors.student.backend.StudentBackend` that these settings configure."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions that the backend uses; a run's summary lists their versions."""
    environment_on_cpus: ClassVar[Mapping[str, str]] = {}
    """Environment variables of a driver without an accelerator, unless they are set already."""
    max_ranks: ClassVar[int | None] = None
    """Maximum number of ranks; None is unlimited."""
    placement: ClassVar[frozenset[str]] = frozenset()
    """Fields that distribute the student over ranks without changing what is computed: `cluster.roles.training` may set
    them."""

    type: str
    """Name of the backend."""

    @property
    def description(self) -> str:
        """Short description for `kdray plan`."""
        return self.type

    @property
    def offloads_optimizer(self) -> bool:
        """True if the optimizer's states are in main memory even if the rank trains on a GPU."""
        return False

    def parameter_bytes(self, precision: Precision, ranks: int) -> ParameterBytes:
        """Memory of a parameter on each rank, with AdamW; by default nothing is sharded.

        In bfloat16 the optimizer holds a float32 copy of the weights in addition to the two moments.
        """
        return ParameterBytes(2, 2, 12) if precision == "bf16" else ParameterBytes(4, 4, 8)

    @property
    def unsafe(self) -> Mapping[str, Any]:
        """Settings that pass kdray's allow lists by, by name; a run that has any says so at its start."""
        return {}

    def leaner(self) -> Iterator[StudentBackendSettings]:
        """Variants of the backend with less memory per rank, the smallest change first; for the planner's remedies."""
        yield from ()


@STUDENT_BACKENDS.add("deepspeed")
class DeepSpeedSettings(StudentBackendSettings):
    """DeepSpeed with ZeRO, on any number of ranks."""

    implementation: ClassVar[str] = "actors.student.backends.deepspeed:DeepSpeedBackend"
    packages: ClassVar[tuple[str, ...]] = ("deepspeed",)
    # Otherwise it looks for an accelerator wherever it is imported, and says that it found none.
    environment_on_cpus: ClassVar[Mapping[str, str]] = {"DS_ACCELERATOR": "cpu"}
    placement: ClassVar[frozenset[str]] = frozenset({"zero_stage"})

    type: Literal["deepspeed"] = "deepspeed"
    zero_stage: Annotated[int, Field(ge=0, le=3), OnResume()] = 0
    """ZeRO stage: what is sharded over ranks (1 optimizer, 2 and gradients, 3 and parameters)."""
    options: Annotated[
        dict[str, Any], OnResume(below=("zero_optimization.offload_optimizer", "zero_optimization.offload_param"))
    ] = Field(default={})
    """Further DeepSpeed settings, merged over the generated ones (offload, overlap, bucket sizes): those of an allow list,
    which name no code and no file."""
    unsafe_options: dict[str, Any] = Field(default={})
    """DeepSpeed settings outside that list. They may run code that the config names, write anywhere, or train something else; a
    run that has any says so at its start. Those that kdray sets itself are rejected."""

    @model_validator(mode="after")
    def _check_offload(self) -> DeepSpeedSettings:
        for name, stage in {"offload_optimizer": 1, "offload_param": 3}.items():
            device = self._offload_device(name)
            setting = f"training.backend.options.zero_optimization.{name}"
            if device == "none":
                continue
            if device != "cpu":
                raise ValueError(
                    f"{setting}.device={device!s:.50}: only cpu is supported; nvme needs an extension of DeepSpeed for "
                    "asynchronous I/O, which would be compiled while the ranks start"
                )
            if self.zero_stage < stage:
                raise ValueError(
                    f"{setting} with training.backend.zero_stage={self.zero_stage}: DeepSpeed offloads from stage {stage} on, "
                    f"and would ignore it; set training.backend.zero_stage={stage}, or remove it"
                )
        return self

    @model_validator(mode="after")
    def _check_options(self) -> DeepSpeedSettings:
        for setting, options in {"options": self.options, "unsafe_options": self.unsafe_options}.items():
            for name in options:
                if name in _TAKEN:
                    raise ValueError(f"training.backend.{setting}.{name}: set by kdray; use training.{_TAKEN[name]}")
            zero = options.get("zero_optimization")
            if isinstance(zero, Mapping) and "stage" in zero:
                raise ValueError(
                    f"training.backend.{setting}.zero_optimization.stage: set by kdray; use training.backend.zero_stage"
                )
        if twice := self.options.keys() & self.unsafe_options.keys():
            raise ValueError(f"training.backend.unsafe_options.{min(twice)}: also in options; keep one of them")
        check_allowed("training.backend.options", self.options, ALLOWED_OPTIONS, lambda _: _NOT_LISTED)
        return self

    @property
    def every_option(self) -> dict[str, Any]:
        """DeepSpeed's further settings, of both kinds."""
        return self.options | self.unsafe_options

    @property
    def unsafe(self) -> Mapping[str, Any]:
        return self.unsafe_options

    def _offload_device(self, name: str) -> str:
        """Device of a part of `zero_optimization` that may be offloaded; `none` if it stays where it is used."""
        zero = self.every_option.get("zero_optimization")
        part = zero.get(name) if isinstance(zero, Mapping) else None
        return str(part.get("device", "none")) if isinstance(part, Mapping) else "none"

    @property
    def offloads_optimizer(self) -> bool:
        return self._offload_device("offload_optimizer") != "none"

    @property
    def accumulates_in_float32(self) -> bool:
        """False if `options` asks for the accumulation of bfloat16 gradients in bfloat16."""
        types = self.every_option.get("data_types")
        asked = types.get("grad_accum_dtype") if isinstance(types, Mapping) else None
        return asked in (None, "fp32")

    @property
    def description(self) -> str:
        return f"ZeRO {self.zero_stage}" + (", optimizer in main memory" if self.offloads_optimizer else "")

    def parameter_bytes(self, precision: Precision, ranks: int) -> ParameterBytes:
        """ZeRO shards optimizer states over the ranks from stage 1 on, gradients from 2, weights at 3.

        Source: Rajbhandari et al. 2020, section 3 (arXiv 1910.02054). Gradients are accumulated in float32; the bfloat16 ones
        are freed once they are added.
        """
        whole = super().parameter_bytes(precision, ranks)
        if self.accumulates_in_float32:
            whole = whole._replace(gradients=4)
        cut = [ranks if self.zero_stage >= stage else 1 for stage in (3, 2, 1)]
        return ParameterBytes(*(size / parts for size, parts in zip(whole, cut, strict=True)))

    def leaner(self) -> Iterator[StudentBackendSettings]:
        for stage in range(self.zero_stage + 1, 4):
            yield self.model_copy(update={"zero_stage": stage})


_TAKEN = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "gradient_clipping",
    "optimizer": "learning_rate, betas and weight_decay",
    "scheduler": "schedule and warmup_steps",
    "bf16": "precision",
    "fp16": "precision",
}
"""DeepSpeed settings that kdray sets itself -> the training settings that determine them."""

_DTYPE = Literal["fp32", "bf16"]
ALLOWED_OPTIONS: dict[str, Any] = {
    "communication_data_type": _DTYPE,
    "data_types": {"grad_accum_dtype": _DTYPE},
    "memory_breakdown": bool,
    "wall_clock_breakdown": bool,
    "steps_per_print": Positive,
    "zero_optimization": {
        "allgather_bucket_size": NonNegative,
        "allgather_partitions": bool,
        "contiguous_gradients": bool,
        "memory_efficient_linear": bool,
        "offload_optimizer": {"device": str, "pin_memory": bool},
        "offload_param": {
            "buffer_count": NonNegative,
            "buffer_size": NonNegative,
            "device": str,
            "max_in_cpu": NonNegative,
            "pin_memory": bool,
        },
        "overlap_comm": bool,
        "reduce_bucket_size": Positive,
        "reduce_scatter": bool,
        "round_robin_gradients": bool,
        "stage3_max_live_parameters": NonNegative,
        "stage3_max_reuse_distance": NonNegative,
        "stage3_model_persistence_threshold": NonNegative,
        "stage3_param_persistence_threshold": NonNegative,
        "stage3_prefetch_bucket_size": NonNegative,
        "sub_group_size": Positive,
        "use_multi_rank_bucket_allreduce": bool,
        "zero_hpz_partition_size": Positive,
    },
}
"""DeepSpeed setting -> type of its value, or of its keys: memory, communication and diagnostics of the same computation."""

_NOT_LISTED = (
    "it is not among DeepSpeed's settings known to run no code, write no file and train the same (at your own risk: "
    "unsafe_options)"
)


@STUDENT_BACKENDS.add("torch")
class TorchSettings(StudentBackendSettings):
    """Plain PyTorch in a single process: for laptops, notebooks, and students that fit on one GPU."""

    implementation: ClassVar[str] = "actors.student.backends.torch:TorchBackend"
    max_ranks: ClassVar[int | None] = 1

    type: Literal["torch"] = "torch"

    @property
    def description(self) -> str:
        return "plain torch"

    def parameter_bytes(self, precision: Precision, ranks: int) -> ParameterBytes:
        """In bfloat16, gradients are accumulated in float32; the bfloat16 ones are freed once they are added."""
        whole = super().parameter_bytes(precision, ranks)
        return whole._replace(gradients=4)


Backend = Annotated[SerializeAsAny[StudentBackendSettings], STUDENT_BACKENDS.member()]
"""Field type for the settings of any backend."""


def default_backend() -> StudentBackendSettings:
    """The backend of a config that names none."""
    backend: StudentBackendSettings = STUDENT_BACKENDS.parse({})
    return backend


# ------------------------------------------------------------------------------------------------- former keys

FORMER_KEYS = {"zero_stage": "zero_stage", "deepspeed": "options"}
"""DeepSpeed settings that used to be in `training` itself, and their names in `backend`."""


def with_backend(training: Any) -> Any:
    """Return a `training` section with its former keys moved to `backend`.

    Raises: ValueError if a setting is given in both forms, or the section combines another backend with DeepSpeed's settings.
    """
    if not isinstance(training, Mapping) or not FORMER_KEYS.keys() & training.keys():
        return training
    backend = training.get("backend") or {}
    if not isinstance(backend, Mapping):
        raise ValueError(f"training.backend: expected settings such as {{type: {STUDENT_BACKENDS.default}}}")
    moved = dict(backend)
    for former, name in FORMER_KEYS.items():
        if former not in training:
            continue
        kind = backend.get("type", "deepspeed")
        if kind != "deepspeed":
            raise ValueError(
                f"training.{former}: a setting of training.backend.type=deepspeed, but training.backend.type={kind!s:.50}; "
                f"remove training.{former}"
            )
        if name in backend and backend[name] != training[former]:
            raise ValueError(
                f"training.{former} and training.backend.{name} are one setting, with two values here; keep the latter"
            )
        moved[name] = training[former]
    return {**{key: value for key, value in training.items() if key not in FORMER_KEYS}, "backend": moved}


def backend_keys(keys: list[str]) -> list[str]:
    """Translate a dotted override that uses a former key: training.zero_stage becomes training.backend.zero_stage."""
    if len(keys) > 1 and keys[0] == "training" and keys[1] in FORMER_KEYS:
        return ["training", "backend", FORMER_KEYS[keys[1]], *keys[2:]]
    return keys
