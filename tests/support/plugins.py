"""Distributions that add kinds to kdray, put where `importlib.metadata` finds them: without a network, and without pip."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

EXAMPLE = Path(__file__).parent / "example_plugin"
"""A distribution as a stranger would write it."""


def install(source: Path, folder: Path) -> None:
    """Build the distribution at `source`, and lay it into `folder` as an installed one."""
    scratch = folder.with_name(f"{folder.name}-build")
    # A copy: a build leaves folders behind.
    shutil.copytree(source, scratch / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(scratch)]
    done = subprocess.run(command, cwd=scratch / "source", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = scratch.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)


def write_distribution(
    folder: Path, name: str, points: Mapping[str, Mapping[str, str]], modules: Mapping[str, str], version: str = "1.0"
) -> None:
    """Lay an installed distribution into `folder`. Args: points: entry points by group and name; modules: texts by name."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [line for group, kinds in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in kinds.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
