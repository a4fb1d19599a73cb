"""A Ray of this machine alone, for a run that joins no cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants
from tenacity import RetryError, Retrying, retry_if_exception_message, stop_after_attempt

from kdray.errors import KdrayError

_STARTS = 3
_SLOW = "The current node timed out during startup.*"


def start_local(**options: Any) -> None:
    """Start it, with all of its ports on the loopback interface; `ray.shutdown` ends it.

    Args: options: of `ray.init`.
    Raises: KdrayError where a part of it does not come up, time and again.
    """
    # Ray gives a part of itself 15 s to come up, and ends where it did not; a busy machine needs longer now and then.
    slow = retry_if_exception_message(match=_SLOW)
    try:
        for attempt in Retrying(retry=slow, stop=stop_after_attempt(_STARTS)):
            with attempt, _loopback():
                ray.init(address="local", include_dashboard=False, **options)
    except RetryError as error:
        raise KdrayError(
            f"a Ray on this machine did not come up in {_STARTS} attempts; where the machine is busy or short of memory, try "
            "again when it is not, or set cluster.address to a Ray that runs; its own words: "
            f"{error.last_attempt.exception()}"
        ) from error


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """A Ray that is started inside is on loopback.

    Ray does so by itself where clusters are not supported, by this variable's default there. It is read when Ray is imported,
    which may have been long ago.
    """
    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    told = os.environ.get(variable)
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if told is None:
            del os.environ[variable]
        else:
            os.environ[variable] = told
