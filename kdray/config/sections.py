"""The sections `run`, `evaluation` and `cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from kdray.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Settings
from kdray.config.job import JobSettings
from kdray.config.storage import check_storage_url
from kdray.config.trackers import TensorBoardTracker, TrackerSource


class RunSettings(Settings):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `<output>/<name>`. Letters, digits, dot, dash and underscore."""
    seed: NonNegative = 0
    """Seed of everything random: data order, draws, initial weights of tiny models."""
    output: Path = Path("runs")
    """Folder that holds run folders. A relative path counts from the folder the command was started in."""
    storage: str | None = None
    """URL of a folder in an object store, or of a shared one, that holds a copy of run folders: `s3://bucket/folder`,
    `gs://bucket/folder`, `file:///folder`. Checkpoints then go there alone, and a run resumes from it on any machine. None: the
    run folder is all that there is, and every node of a student has to see it. Credentials come from the environment."""

    trackers: list[TrackerSource] = Field(default=[TensorBoardTracker()])
    """Where numbers and events go beside the run folder's own files; the keys depend on `type`: tensorboard, or one of an
    installed distribution. One that fails is reported as the event `tracker_failed` and left out; the run goes on."""

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, value: str | None) -> str | None:
        return None if value is None else check_storage_url(value)


class EvaluationSettings(Settings):
    every: NonNegative = 0
    """Steps between evaluations during training; 0 measures only before and after."""
    prompts: Positive | None = None
    """Held-out prompts to use; None uses all of `data.heldout_size`."""
    control: bool = False
    """Also train a copy of the SFT student by SFT alone for the same number of student tokens, and report it beside."""


class ClusterSettings(Settings):
    address: str | None = None
    """Ray cluster to join; None takes RAY_ADDRESS, or starts a local Ray that ends with the run."""
    local_cpus: Positive | None = None
    """CPUs that a local Ray counts; None is the machine's. More than it has lets small models share cores."""
    roles: dict[str, dict[str, Any]] = Field(default={})
    """Size and place of the run's parts on this cluster, laid over the recipe's own: by `teachers` (all), `teachers.<name>`,
    `rollout.pool` or `training`, settings of those sections such as replicas, num_gpus, labels or ranks."""
    may_grow: bool = False
    """Whether the cluster adds nodes by itself (Ray's autoscaler): what no node has is then waited for, and asked for."""
    wait_s: NonNegativeFloat = 600.0
    """Longest wait for resources that others hold, or that nodes yet to come will bring; then the run ends and says what is
    missing."""
    stuck_after_s: PositiveFloat = 300.0
    """Longest time that an engine may take to answer between two of its steps; beyond it the engine is stuck, and its replica
    is replaced."""
    hedge_after: Annotated[float, Field(gt=1.0)] | None = 3.0
    """A call to a replica is slow when it takes this many times as long as the slowest of the last 32 (for its tokens; 2 s at
    least), while another one that was sent no earlier has been answered. It is then sent to another replica too, and whatever
    comes first counts; the slow replica gets no calls for a minute, while there are others. Never before 8 calls were answered.
    None waits. Pools of several `accelerator_types` go by measured speed instead."""
    health_check_period_s: PositiveFloat = 10.0
    """Seconds between health checks of a replica."""
    job: JobSettings = JobSettings()
    """The run as a Ray job, by `kdray submit`."""
