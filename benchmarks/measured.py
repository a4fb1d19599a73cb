"""File of a benchmark's figures, with the date, the machine and the versions that they belong to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def conditions(packages: Iterable[str]) -> dict[str, Any]:
    """Date, machine and versions of these packages."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in packages},
    }


def write(name: str, packages: Iterable[str], figures: Mapping[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json`; return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**conditions(packages), **figures}, indent=2) + "\n")
    return path
