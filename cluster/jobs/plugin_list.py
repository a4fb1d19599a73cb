"""Plugins that a job's config uses, as a file of its folder: written where the job is submitted, read where it runs.

The standard library alone: a node need not have anything else yet when the list is read there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE = "plugins.json"


def write(folder: Path, plugins: Iterable[Mapping[str, str]]) -> None:
    """Args: plugins: group, name, distribution and version of each."""
    (folder / FILE).write_text(json.dumps(list(plugins)), encoding="utf-8")


def compare(folder: Path) -> tuple[list[str], list[str]]:
    """Distributions in the folder's list that are not installed here, and a line for each that has another version here."""
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
