"""Entry point of a submitted job, `python -m cluster.job_entrypoint run config.yaml`: the command `kdray` after a check of the
environment.

Imports nothing but the standard library and `packaging` (which Ray brings) before it knows that the rest is installed: on a
node without kdray's requirements the job's log then holds one message, and no traceback.
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
    "install kdray's requirements on every node, driver's included (pip install 'kdray[gpu]', or 'kdray[cpu]' without GPUs), "
    "or start the cluster from an image that has them"
)
_PLUGIN_REMEDY = "the config uses it: install it on every node, or start the cluster from an image that has it"


def main() -> None:
    """The command; 2 and a message where packages are missing. The log's last line is the exit code, which Ray forgets."""
    # Until a run has its own handler, and for commands that have none: what Ray sends first means what Ctrl-C means.
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
        message = f"kdray: the node of the job's driver lacks {', '.join(lacking)}; {_REMEDY}"
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
        # Ray's own handler, in force while it connects, exits with the signal's number.
        return _INTERRUPTED if end.code == signal.SIGTERM else int(end.code or 0)
    return 0


def requirements(distribution: str = "kdray") -> tuple[list[str], list[str]]:
    """What is missing of a distribution's requirements, extras left out, and a line for each that has another version."""
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
