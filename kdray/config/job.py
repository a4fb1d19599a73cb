"""A run as a Ray job: what `kdray submit` sends, and how long a stop may take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kdray.config.base import Positive, Settings

# Ray's dashboard refuses a request above 100 MiB, and kdray's own code travels in the same one.
_LARGEST_UPLOAD_MIB = 95


class JobSettings(Settings):
    stop_wait_s: Positive = 120
    """Seconds between the signal that asks a job to write a checkpoint and end, and the one that kills it. Raise it where a
    step or a checkpoint takes longer."""
    max_upload_mib: Annotated[int, Field(gt=0, le=_LARGEST_UPLOAD_MIB)] = 32
    """Size of all files together that travel with a job, in MiB: those that the config names by a relative path. Larger ones
    belong on storage that every node reads."""
    forward_env: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = Field(default=[])
    """Environment variables to give to the job with the values that they have here, such as HF_TOKEN. Whoever may look at the
    cluster's jobs can read them. Those of Ray (RAY_...) are the cluster's own."""

    @model_validator(mode="after")
    def _not_of_ray(self) -> JobSettings:
        for name in self.forward_env:
            if name.startswith("RAY_"):
                raise ValueError(f"cluster.job.forward_env={name}: Ray's own variables are the cluster's; remove it")
        return self
