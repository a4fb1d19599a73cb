"""Entry point of a submitted job, `python -m cluster.job_entrypoint run config.yaml`: the command `kdray` after a check of the
environment.

Before it has checked that the rest is installed, it imports only the standard library and `packaging` (which Ray installs): on
a node without kdray's requirements the job's log then has one message, and no traceback.
"""

from __future__ import annotations

import signal
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from cluster.jobs import plugin_list

_INTERRUPTED = 130
_REMEDY = (
    "install kdray's requirements on every node, driver's included (pip install 'kdray[gpu]'; without GPUs ./setup.sh, or "
    "PyTorch's CPU build and then 'kdray[cpu]': docs/clusters.md, kdray on every node), "
    "start Ray with the environment activated that has them, or start the cluster from an image that has them"
)
_PLUGIN_REMEDY = "the config uses it: install it on every node, or start the cluster from an image that has it"


def main() -> None:
    """Run the command; 2 and a message if packages are missing. The last log line is the exit code, which Ray does not keep."""
    # Until a run installs its own handler, and for commands without one: the first signal that Ray sends acts like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = _command()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    print(f"kdray ended with exit code {code}", flush=True)
    sys.exit(code)


def _command() -> int:
    lacking, other = requirements()
    if lacking:
        # Often they are installed, for another Python than the one that Ray's PATH begins with.
        found = f"{sys.executable}, the `python` that Ray was started with, lacks {', '.join(lacking)}"
        message = f"kdray: on the node of the job's driver, {found}; {_REMEDY}"
        print(message, file=sys.stderr, flush=True)
        return 2
    absent, differing = plugin_list.compare(Path())
    if absent:
        message = f"kdray: the node of the job's driver lacks {'; '.join(absent)}; {_PLUGIN_REMEDY}"
        print(message, file=sys.stderr, flush=True)
        return 2
    import kdray

    print(f"kdray {kdray.__version__} from {Path(kdray.__file__).parent}, Python {sys.version.split()[0]}", flush=True)
    for line in other + differing:
        print(f"note: {line}", flush=True)
    if find_spec("vllm") is None:
        print("note: the driver's node has no vLLM; every node that serves a teacher needs it", flush=True)
    from cluster.cli import main as command

    try:
        command()
    except SystemExit as end:
        # Ray's own handler, installed while it connects, exits with the signal's number.
        return _INTERRUPTED if end.code == signal.SIGTERM else int(end.code or 0)
    return 0


def requirements(distribution: str = "kdray") -> tuple[list[str], list[str]]:
    """Missing requirements of a distribution, extras excluded, and a line for each that is installed in another version."""
    from packaging.requirements import Requirement

    lacking, other = [], []
    for text in requires(distribution) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            lacking.append(requirement.name)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            other.append(f"{requirement.name} {found} is installed here; kdray asks for {requirement.specifier}")
    return lacking, other


if __name__ == "__main__":
    main()
