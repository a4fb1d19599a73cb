"""List of the plugins that a job's config uses, as a file in the job's folder: written at submission, read by the job.

Uses only the standard library, since a node may lack everything else when the list is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE = "plugins.json"


def write(folder: Path, plugins: Iterable[Mapping[str, str]]) -> None:
    """Write the list. Args: plugins: group, name, distribution and version of each."""
    (folder / FILE).write_text(json.dumps(list(plugins)), encoding="utf-8")


def compare(folder: Path) -> tuple[list[str], list[str]]:
    """Distributions in the list that are not installed here, and a line for each that is installed in a different version."""
    path = folder / FILE
    used: dict[tuple[str, str], list[str]] = {}
    for plugin in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
        used.setdefault((plugin["distribution"], plugin["version"]), []).append(f"{plugin['group']}: {plugin['name']}")
    lacking, other = [], []
    for (distribution, wanted), kinds in used.items():
        try:
            found = version(distribution)
        except PackageNotFoundError:
            lacking.append(f"{distribution} {wanted} ({', '.join(kinds)})")
            continue
        if found != wanted:
            other.append(f"{distribution} {found} is installed here; the job was submitted with {wanted}")
    return lacking, other
