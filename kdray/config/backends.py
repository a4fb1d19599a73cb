"""Student backends: what holds the student on the ranks and moves its weights, and the facts that others ask of it.

Settings alone: the code of a backend is named by `implementation` and imported where a rank starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, SerializeAsAny, model_validator

from kdray.config.base import Settings
from kdray.config.registry import SettingsRegistry

Precision = Literal["fp32", "bf16"]


class ParameterBytes(NamedTuple):
    """Bytes that one rank holds for a parameter of the student, on average over the parameters."""

    weights: float
    gradients: float
    optimizer: float


STUDENT_BACKENDS: SettingsRegistry[StudentBackendSettings] = SettingsRegistry(
    "kdray.student_backends", "student backend", default="deepspeed"
)


@STUDENT_BACKENDS.root
class StudentBackendSettings(Settings):
    """The class that every backend's settings derive from: `type`, the backend's own fields, and its facts."""

    implementation: ClassVar[str]
    """`module:Class` of the `actors.student.backend.StudentBackend` that these settings are for."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions that the backend computes with; a run's summary has their versions."""
    max_ranks: ClassVar[int | None] = None
    """Most ranks that it trains on; None is any number."""
    placement: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how the student is spread over ranks, never what is computed: `cluster.roles.training` may set them."""

    type: str
    """Name of the backend."""

    @property
    def description(self) -> str:
        """A word or two for `kdray plan`."""
        return self.type

    def parameter_bytes(self, precision: Precision, ranks: int) -> ParameterBytes:
        """Memory of a parameter on each rank, with AdamW; everything whole on every rank unless a backend says otherwise.

        In bfloat16 the optimizer has a float32 copy of the weights beside the two moments.
        """
        return ParameterBytes(2, 2, 12) if precision == "bf16" else ParameterBytes(4, 4, 8)

    def leaner(self) -> Iterator[StudentBackendSettings]:
        """The same backend with less of the student on each rank, the smallest change first; for the planner's remedies."""
        yield from ()


@STUDENT_BACKENDS.add("deepspeed")
class DeepSpeedSettings(StudentBackendSettings):
    """DeepSpeed with ZeRO, on any number of ranks."""

    implementation: ClassVar[str] = "actors.student.backends.deepspeed:DeepSpeedBackend"
    packages: ClassVar[tuple[str, ...]] = ("deepspeed",)
    placement: ClassVar[frozenset[str]] = frozenset({"zero_stage"})

    type: Literal["deepspeed"] = "deepspeed"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage: what is sharded over ranks (1 optimizer, 2 and gradients, 3 and parameters)."""
    options: dict[str, Any] = Field(default={})
    """Further DeepSpeed settings, merged over the generated ones (offload, overlap, bucket sizes); those that kdray sets
    itself are refused."""

    @model_validator(mode="after")
    def _check_options(self) -> DeepSpeedSettings:
        for name in self.options:
            if name in _TAKEN:
                raise ValueError(f"training.backend.options.{name}: set by kdray; use training.{_TAKEN[name]}")
        zero = self.options.get("zero_optimization")
        if isinstance(zero, Mapping) and "stage" in zero:
            raise ValueError("training.backend.options.zero_optimization.stage: set by kdray; use training.backend.zero_stage")
        return self

    @property
    def description(self) -> str:
        return f"ZeRO {self.zero_stage}"

    def parameter_bytes(self, precision: Precision, ranks: int) -> ParameterBytes:
        """ZeRO cuts optimizer states by the ranks from stage 1 on, gradients from 2, weights at 3.

        Source: Rajbhandari et al. 2020, section 3 (arXiv 1910.02054).
        """
        whole = super().parameter_bytes(precision, ranks)
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
"""DeepSpeed's settings that kdray sets itself -> the training settings that decide them."""


@STUDENT_BACKENDS.add("torch")
class TorchSettings(StudentBackendSettings):
    """PyTorch alone, in one process: for laptops, notebooks, and students that fit one GPU."""

    implementation: ClassVar[str] = "actors.student.backends.torch:TorchBackend"
    max_ranks: ClassVar[int | None] = 1

    type: Literal["torch"] = "torch"

    @property
    def description(self) -> str:
        return "plain torch"

    def parameter_bytes(self, precision: Precision, ranks: int) -> ParameterBytes:
        """In bfloat16, gradients are added up in float32; the bfloat16 ones live as long as it takes to add them."""
        whole = super().parameter_bytes(precision, ranks)
        return whole._replace(gradients=4)


Backend = Annotated[SerializeAsAny[StudentBackendSettings], STUDENT_BACKENDS.member()]
"""A field that holds the settings of any backend."""


def default_backend() -> StudentBackendSettings:
    """The backend of a config that names none."""
    backend: StudentBackendSettings = STUDENT_BACKENDS.parse({})
    return backend


# ------------------------------------------------------------------------------------------------- former keys

FORMER_KEYS = {"zero_stage": "zero_stage", "deepspeed": "options"}
"""Settings of DeepSpeed that stood in `training` itself before there were other backends, and their names in `backend`."""


def with_backend(training: Any) -> Any:
    """A `training` section as written, with its former keys moved into `backend`.

    Raises: ValueError where a setting is said in both ways, or the section names another backend beside DeepSpeed's settings.
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
    """The parts of a dotted override, where it names a former key: training.zero_stage is training.backend.zero_stage."""
    if len(keys) > 1 and keys[0] == "training" and keys[1] in FORMER_KEYS:
        return ["training", "backend", FORMER_KEYS[keys[1]], *keys[2:]]
    return keys
