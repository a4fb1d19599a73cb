"""Package of a submitted run: one folder that becomes the job's working directory.

It holds kdray as an installed distribution (its wheel, unpacked, so that vLLM finds the plugin's entry point in every process),
the resolved config, and the files that the config names by relative paths. No package is installed on the nodes: kdray's
requirements, and distributions that add kinds to it, are part of the cluster's image. kdray is not among `py_modules`, whose
wheels pip would install with all their requirements, because only the working directory is also passed to Ray Serve's replicas,
regardless of who started Serve.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from cluster.jobs import plugin_list
from kdray.checks.paths import named_models, read_paths
from kdray.config import Config, parse_config
from kdray.config.plugins import plugins_of
from kdray.config.secret_files import is_secret
from kdray.errors import ConfigError, DataError, KdrayError
from kdray.teachers.kind import kind_of

PACKAGES = ("kdray", "actors", "cluster")
INPUTS = "inputs"
"""Folder of uploaded files inside the job's working directory."""

_MIB = 2**20


@dataclass(frozen=True)
class JobPackage:
    """Config as the job reads it, and the files uploaded with it."""

    config: Config
    files: dict[str, Path]
    """Path in the job's working directory -> local file or folder."""
    remote_paths: dict[str, Path]
    """Setting -> absolute path, which is read on the cluster."""
    size: int
    """Total size of the files, bytes."""


def pack(config: Config) -> JobPackage:
    """Collect what a job of this config needs: relative paths are local files to upload, absolute ones are on the cluster.

    Raises: ConfigError for paths that would be lost or not found there, DataError for a missing local file.
    """
    if config.data.prompts.from_caller:
        raise ConfigError(
            f"data.prompts.type={config.data.prompts.type}: a job has no caller to hand prompts over; write them to a file"
        )
    output = str(config.run.output)
    if not _absolute(output):
        raise ConfigError(
            f"run.output={output}: a job's own folder is deleted with the job; give a folder that outlives it and that every "
            "node reads, such as run.output=/shared/runs"
        )
    tree = config.model_dump(mode="json")
    files, remote_paths, sizes = {}, {}, {}
    for keys, path in read_paths(config):
        setting = ".".join(keys)
        if _absolute(str(path)):
            remote_paths[setting] = path
            continue
        if not path.exists():
            raise DataError(
                f"{setting}={path}: no such file here; a relative path travels with the job, an absolute one does not"
            )
        # Named by its setting, so that a resumed run finds the same path in its config.
        place = f"{INPUTS}/{setting}/{path.absolute().name}"
        files[place], sizes[setting] = path, _size(path)
        _set(tree, keys, place)
    for keys, model in named_models(config):
        folder = Path(model).expanduser()
        if folder.is_absolute():
            remote_paths[".".join(keys)] = folder
        elif folder.exists():
            raise ConfigError(
                f"{'.'.join(keys)}={model}: a folder of this machine, and models do not travel with a job; put it on storage "
                "that every node reads and give its absolute path, or name a hub id"
            )
    limit, total = config.cluster.job.max_upload_mib, sum(sizes.values())
    if total > limit * _MIB:
        largest = max(sizes, key=lambda setting: sizes[setting])
        together = f", {total / _MIB:.1f} MiB with the others" if len(sizes) > 1 else ""
        raise ConfigError(
            f"{largest}={files[_place_of(files, largest)]}: {sizes[largest] / _MIB:.1f} MiB{together}, more than "
            f"cluster.job.max_upload_mib={limit}; put it on storage that every node reads and give its absolute path"
        )
    # Inside the job, Ray provides the cluster's address.
    tree["cluster"]["address"] = "auto"
    if config.cluster.grace_s is None:
        tree["cluster"]["grace_s"] = config.cluster.job.stop_wait_s
    return JobPackage(parse_config(tree, source="the job's config"), files, remote_paths, total)


def unchecked(config: Config, package: JobPackage) -> list[str]:
    """Reasons why models and data cannot be checked on this machine; empty if they can."""
    reasons = [
        f"{setting}={path} is not on this machine" for setting, path in package.remote_paths.items() if not path.exists()
    ]
    of_files = config.cluster.secret_files("driver")
    for name in config.teachers:
        for setting, variable in kind_of(config, name).environment.items():
            if variable not in of_files and not os.environ.get(variable):
                reasons.append(f"teachers.{name}.{setting}={variable} is not set on this machine")
    return reasons


def forwarded(config: Config) -> dict[str, str]:
    """Environment of the job: forwarded variables, and how long Ray waits after asking it to end.

    Raises: ConfigError for a variable that is not set here, or that holds a secret.
    """
    variables = {}
    for name in config.cluster.job.forward_env:
        if is_secret(name):
            raise ConfigError(
                f"cluster.job.forward_env={name}: a forwarded value can be read in Ray's logs and dashboard, and this name "
                "says that it is a secret; write it into a file on the cluster's nodes and give that "
                f"(cluster.secrets={{{name}: {{file: PATH}}}}), or set it where the nodes are started (a Kubernetes Secret)"
            )
        if name not in os.environ:
            raise ConfigError(f"cluster.job.forward_env={name}: the variable is not set here; export it, or remove it")
        variables[name] = os.environ[name]
    # The job's supervisor reads it from its own environment, which is the job's.
    return variables | {"RAY_JOB_STOP_WAIT_TIME_S": str(config.cluster.job.stop_wait_s)}


def write_folder(package: JobPackage, folder: Path) -> None:
    """Write the complete package to `folder`, the job's working directory."""
    unpack_distribution(folder)
    for place, source in package.files.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    (folder / "config.yaml").write_text(package.config.dump(), encoding="utf-8")
    # Plugins are not uploaded, like all packages except kdray: the job's driver reports those missing on its node.
    plugin_list.write(folder, map(asdict, plugins_of(package.config)))


def unpack_distribution(folder: Path) -> None:
    """Install kdray into `folder`: from the working tree's wheel, or else a copy of the installed version.

    Raises: KdrayError if no wheel can be built.
    """
    import kdray

    root = Path(kdray.__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        with tempfile.TemporaryDirectory(prefix="kdray-wheel-") as temporary:
            zipfile.ZipFile(build_wheel(root, Path(temporary))).extractall(folder)
        return
    try:
        installed = distribution("kdray")
    except PackageNotFoundError as error:
        raise KdrayError(f"{root}: neither a working tree nor an installed kdray; pip install it, and submit again") from error
    for file in installed.files or []:
        top = file.parts[0]
        if "__pycache__" in file.parts or not (top in PACKAGES or top.endswith(".dist-info")):
            continue
        target = folder.joinpath(*file.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), target)


def build_wheel(root: Path, folder: Path) -> Path:
    """Build a wheel of the working tree at `root`, offline. Raises: KdrayError with the builder's last line."""
    copy = folder / "source"
    copy.mkdir()
    # Built from a copy: a build leaves folders behind, and would pick up stale ones.
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(root / name, copy / name)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=copy, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise KdrayError(f"{root}: no wheel could be built of it: {last}; pip install 'setuptools>=77', and submit again")
    return found[0]


def _absolute(path: str) -> bool:
    """True if a path is valid on every machine: an absolute one, or a URL such as s3://bucket."""
    return Path(path).is_absolute() or re.match(r"[a-z][a-z0-9+.-]*:/", path) is not None


def _set(tree: dict[str, Any], keys: tuple[str, ...], value: str) -> None:
    *parents, leaf = keys
    for key in parents:
        tree = tree[key]
    tree[leaf] = value


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _place_of(files: Mapping[str, Path], setting: str) -> str:
    return next(place for place in files if place.startswith(f"{INPUTS}/{setting}/"))
