"""Deployment of pools on Ray Serve: starts their replicas concurrently and waits until they serve."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from actors.serving.start_failure import last_error
from kdray.config import EngineSettings
from kdray.errors import EngineError

if TYPE_CHECKING:
    from actors.serving.pool import ReplicaPool

DEPLOYING = threading.Lock()
"""Lock around Ray Serve's calls that make deployments or read them: both register a module of Serve's with cloudpickle for a
moment, and take it from each other (Ray 2.60)."""
_LOOK_EVERY_S = 0.5
_MISSING_PACKAGE = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


def deploy(pools: Sequence[ReplicaPool]) -> None:
    """Start the replicas of all pools concurrently and wait until they serve; blocks.

    Raises: EngineError if some do not start, or are deleted meanwhile.
    """
    from ray import serve

    logging.getLogger("ray.serve").addFilter(_is_news)
    try:
        with DEPLOYING:
            _check_wanted(pools)
            handles = serve.run_many([pool.target() for pool in pools], wait_for_applications_running=False)
        _await_serving(pools)
    except EngineError:
        raise
    except RuntimeError as error:
        names = ", ".join(pool.name for pool in pools)
        # Serve's error names the deployments; the reason of a replica's failure is in their status.
        found = applications()
        details = "\n".join(
            each.message for pool in pools if pool.application in found for each in found[pool.application].deployments.values()
        )
        raise _not_started(names, last_error(details) or str(error)) from error
    for pool, handle in zip(pools, handles, strict=True):
        pool.connect(handle)


def _await_serving(pools: Sequence[ReplicaPool]) -> None:
    """Wait until all pools serve. Raises: EngineError with the cause if an engine fails, or a pool is deleted; RuntimeError if
    a replica fails otherwise.

    Serve's own wait never ends for a deleted application (Ray 2.60); it would continue after Ray has shut down, and start
    another.
    """
    waiting = list(pools)
    while waiting:
        _check_wanted(waiting)
        found = applications()
        states = {pool: found[pool.application] for pool in waiting if pool.application in found}
        for pool, state in states.items():
            failed = state.status == "DEPLOY_FAILED"
            failures = pool.start_failures()
            # Serve starts a replica three times; what is wrong with a model stays wrong.
            if failures and (failed or not failures[-1].may_heal):
                raise _not_started(pool.name, failures[-1].cause, len(failures))
            if failed:
                raise RuntimeError(f"deploying {pool.application} failed: {state.message}")
        waiting = [pool for pool in waiting if pool not in states or states[pool].status != "RUNNING"]
        time.sleep(_LOOK_EVERY_S)


def applications() -> dict[str, Any]:
    """State of each of Serve's applications, by name; blocks."""
    from ray import serve

    with DEPLOYING:
        return dict(serve.status().applications)


def _not_started(pools: str, cause: str, attempts: int = 1) -> EngineError:
    """Error for replicas that did not start, ending with the cause. Args: pools: their names."""
    if missing := _MISSING_PACKAGE.search(cause):
        cause = (
            f"a node has no Python package `{missing[1]}`; install kdray's requirements on every node that serves "
            "(pip install 'kdray[gpu]'; without GPUs see docs/clusters.md, kdray on every node)"
        )
    return EngineError(f"replicas of {pools} did not start{f' in {attempts} attempts' if attempts > 1 else ''}: {cause}")


def _check_wanted(pools: Sequence[ReplicaPool]) -> None:
    if ended := [pool.name for pool in pools if pool.ended]:
        raise EngineError(f"replicas of {', '.join(ended)} were taken down before they served")


def _is_news(record: logging.LogRecord) -> bool:
    """Filter for Ray Serve's log: calls that wait for a free replica are normal in a busy pool, and need no warning each."""
    return not record.getMessage().startswith("Failed to route request after")


def actor_options(settings: EngineSettings) -> dict[str, Any]:
    """Ray actor options of one replica: its resource reservation, and its number of threads."""
    # Ray sets one thread for an actor that reserves a fraction of a CPU; the reservation is the intended number.
    threads = str(max(1, int(settings.num_cpus)))
    environment = _job_environment()
    options: dict[str, Any] = {
        "num_cpus": settings.num_cpus,
        "runtime_env": environment | {"env_vars": {**(environment.get("env_vars") or {}), "OMP_NUM_THREADS": threads}},
    }
    if settings.num_gpus:
        options["num_gpus"] = settings.num_gpus
    if settings.accelerator_type:
        options["accelerator_type"] = settings.accelerator_type
    if settings.label_selector:
        options["label_selector"] = settings.label_selector
    if settings.resources:
        options["resources"] = settings.resources
    return options


def _job_environment() -> dict[str, Any]:
    """Runtime environment of this process's Ray job. Serve's controller, which creates the replicas, is of no job or of
    another."""
    return dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
