"""Trackers: settings for destinations of a run's numbers besides its own files.

A tracker from another distribution is a subclass of `TrackerSettings`, registered under its `type` in the entry-point group
`kdray.trackers`; see docs/extending.md.
"""

from __future__ import annotations

import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, SerializeAsAny, field_validator

from kdray.config.base import Settings, is_loopback
from kdray.config.registry import SettingsRegistry

TRACKERS: SettingsRegistry = SettingsRegistry("kdray.trackers", "tracker")


@TRACKERS.root
class TrackerSettings(Settings):
    """A destination of a run's numbers and events."""

    implementation: ClassVar[str]
    """Implementation as `module:name`: called with the settings, it returns a `kdray.runs.tracking.trackers.Tracker`."""

    package: ClassVar[str | None] = None
    """Package that the tracker imports and that kdray does not require: its name, and that of kdray's extra."""

    type: str
    """Name of the tracker; a subclass narrows it to a `Literal` of its own."""

    def unusable(self) -> str | None:
        """Why the tracker cannot work in this process, with the remedy; None if nothing is known to be in its way."""
        if self.package is None or find_spec(self.package) is not None:
            return None
        return f"the package {self.package} is not installed; pip install 'kdray[{self.package}]', or remove the tracker"


@TRACKERS.add("tensorboard")
class TensorBoardTracker(TrackerSettings):
    """Curves for TensorBoard, in `tb/` of the run folder: distillation's in `tb/` itself, those of other phases in
    `tb/<phase>`."""

    implementation = "kdray.runs.tracking.tensorboard:TensorBoard"

    type: Literal["tensorboard"] = "tensorboard"


@TRACKERS.add("prometheus")
class PrometheusTracker(TrackerSettings):
    """Gauges among Ray's metrics, which every node exports for Prometheus: `ray_kdray_<metric>` with the labels `run`, `phase`
    and `of` (the teacher and staleness, for numbers of a part), and the counter `ray_kdray_events_total` by `kind`."""

    implementation = "actors.run_metrics:RayMetrics"

    type: Literal["prometheus"] = "prometheus"


@TRACKERS.add("wandb")
class WandbTracker(TrackerSettings):
    """A run at Weights & Biases, with files in `wandb/` of the run folder. The API key comes from WANDB_API_KEY or from
    `wandb login`, the address of a server of one's own from WANDB_BASE_URL. A resumed run continues its run there."""

    implementation = "kdray.runs.tracking.wandb:tracker"
    package = "wandb"

    type: Literal["wandb"] = "wandb"
    project: Annotated[str, Field(min_length=1)] = "kdray"
    """Project of the run."""
    entity: str | None = None
    """User or team that owns the project; None is the account's default."""
    name: str | None = None
    """Name shown for the run; None is `run.name`."""
    tags: list[str] = Field(default=[])
    """Tags of the run."""
    mode: Literal["online", "offline"] | None = None
    """offline writes files alone, which `wandb sync RUN/wandb/offline-run-*` sends later; None follows WANDB_MODE, or is
    online."""

    def unusable(self) -> str | None:
        if (reason := super().unusable()) is not None:
            return reason
        mode = self.mode or os.environ.get("WANDB_MODE") or "online"
        if mode != "online" or _has_key():
            return None
        # Otherwise the service's library asks for one on the terminal of the run.
        return "there is no API key; set WANDB_API_KEY, run `wandb login`, or set mode=offline"


@TRACKERS.add("mlflow")
class MlflowTracker(TrackerSettings):
    """A run at an MLflow server, or in a local database. User, password and token come from the environment
    (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN). A resumed run continues its run there."""

    implementation = "kdray.runs.tracking.mlflow:tracker"
    package = "mlflow"

    type: Literal["mlflow"] = "mlflow"
    tracking_uri: str | None = None
    """Address of the server, such as http://mlflow:5000; None follows MLFLOW_TRACKING_URI, or is the file `mlflow.db` beside
    the run folders, which `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` shows (of the whole package mlflow)."""
    experiment: Annotated[str, Field(min_length=1)] = "kdray"
    """Name of the experiment; it is made if there is none."""
    name: str | None = None
    """Name shown for the run; None is `run.name`."""
    tags: dict[str, str] = Field(default={})
    """Tags of the run."""
    unsafe_http: bool = False
    """Send password and token by plain http to another machine, where others may read them on the way."""

    def unusable(self) -> str | None:
        if (reason := super().unusable()) is not None:
            return reason
        address = urlsplit(self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", ""))
        secrets = [name for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN") if os.environ.get(name)]
        if address.password is not None:
            secrets.append("the password in MLFLOW_TRACKING_URI")
        if self.unsafe_http or address.scheme != "http" or is_loopback(address.hostname or "") or not secrets:
            return None
        return (
            f"by plain http to {address.hostname} {secrets[0]} can be read on the way; use https, or a tunnel to this machine, "
            "or accept it (unsafe_http=true)"
        )

    @field_validator("tracking_uri")
    @classmethod
    def _check_uri(cls, value: str | None) -> str | None:
        # config.yaml holds the settings: a password in them would be in every copy of the run. It is not repeated here either.
        if value is not None and "@" in urlsplit(value).netloc:
            raise ValueError(
                "holds a user or password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address as "
                "MLFLOW_TRACKING_URI, in the environment"
            )
        return value


def _has_key() -> bool:
    """Whether Weights & Biases finds credentials without asking for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


TrackerSource = Annotated[SerializeAsAny[TrackerSettings], TRACKERS.member(short=True)]
"""A tracker of any kind, or its name if it needs no other settings."""
