"""Settings of a run as a Ray job: what `kdray submit` uploads, and how long a stop may take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kdray.config.base import Positive, Settings
from kdray.config.secret_files import VariableName

# Ray's dashboard rejects requests above 100 MiB, and kdray's own code is part of the same request.
_LARGEST_UPLOAD_MIB = 95


class JobSettings(Settings):
    stop_wait_s: Positive = 120
    """Seconds between the signal that asks a job to write a checkpoint and end, and the one that kills it. Raise it if a step
    or a checkpoint takes longer."""
    max_upload_mib: Annotated[int, Field(gt=0, le=_LARGEST_UPLOAD_MIB)] = 32
    """Maximum total size of the files uploaded with a job, MiB: those that the config names by a relative path. Larger ones
    belong on storage that every node can read."""
    forward_env: list[VariableName] = Field(default=[])
    """Environment variables to pass to the job with their current values, such as HF_ENDPOINT. Everyone with access to the
    cluster's dashboard or logs can read them: `kdray submit` refuses names of secrets, which belong in `cluster.secrets`.
    Variables of Ray (RAY_...) are set by the cluster."""

    @model_validator(mode="after")
    def _not_of_ray(self) -> JobSettings:
        for name in self.forward_env:
            if name.startswith("RAY_"):
                raise ValueError(f"cluster.job.forward_env={name}: Ray's own variables are the cluster's; remove it")
        return self
