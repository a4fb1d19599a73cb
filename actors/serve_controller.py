"""Ray Serve's controller: it is started apart from the job that needs it, and restarted if it stands still, since Serve's own
calls wait for it without end.

Ray restarts a controller that dies, and the new one takes over what runs. One that hangs, Ray does not notice: nothing replaces
a lost replica any more, pools can be neither deployed nor deleted, and a resumed run would not even get as far as saying so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.client import ray as client

from actors.background_call import in_daemon_thread, within
from kdray.errors import KdrayError

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 2.0
_WAIT_S = 2.0
_RESTARTS_S = 60.0
"""Longest restart: a process, and its checkpoint."""
_STARTS_S = 300.0
"""Longest start of a controller, by a process of its own or by this one."""
_REMEDY = "end Serve on this cluster (`serve shutdown`, which ends other runs' replicas, too), or the cluster itself"
_APART = """
import sys

import ray
from actors.serve_controller import start_here

ray.init(sys.argv[1], log_to_driver=False)
start_here()
"""


def start() -> None:
    """Start Ray Serve unless it runs; blocks.

    On a cluster it outlives the job that needs it first, and Ray lends an actor's environment to all actors that it creates:
    variables, packages and code of that job would be those of every later job's replicas. So a process that belongs to no job
    starts it. Raises: KdrayError.
    """
    context = ray.get_runtime_context()
    # A machine that is only a client of the cluster need not reach this address.
    if context.runtime_env and not client.is_connected() and _controller() is None:
        environment = {name: value for name, value in os.environ.items() if name != RAY_JOB_CONFIG_JSON_ENV_VAR}
        command = [sys.executable, "-c", _APART, context.gcs_address]
        try:
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=_STARTS_S)
        except subprocess.TimeoutExpired as error:
            raise KdrayError(f"Ray Serve did not start within {_STARTS_S:g} s") from error
        except subprocess.CalledProcessError as error:
            said: list[str] = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
            raise KdrayError(f"Ray Serve did not start: {said[-1]}") from error
    start_here()


def start_here() -> None:
    """Start Ray Serve from this process unless it runs; blocks. Raises: KdrayError if it does not start in time."""
    try:
        # Serve's own calls wait for the controller without end.
        within(_STARTS_S, _start_serve)
    except TimeoutError as error:
        raise KdrayError(
            f"Ray Serve did not start ({error}): its controller did not answer, or found no node to start on; Ray's logs of it "
            f"say which; {_REMEDY}"
        ) from error


def _start_serve() -> None:
    from ray import serve

    # Replicas are called through handles only: no HTTP proxy, no open port.
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})


def revive(limit_s: float, given_up: threading.Event | None = None) -> bool:
    """Restart the cluster's controller if it does not answer for so long; blocks. Returns: True if it was necessary.

    Args: given_up: ends the wait, and nothing is restarted any more.
    Raises: KdrayError if it does not answer after that either.
    """
    given_up = threading.Event() if given_up is None else given_up
    controller = _controller()
    if controller is None or _answers(controller, limit_s, given_up) or given_up.is_set():
        return False
    logger.warning("Ray Serve's controller has not answered for %g s, and is restarted", limit_s)
    ray.kill(controller, no_restart=False)
    if not _answers(controller, _RESTARTS_S, given_up) and not given_up.is_set():
        raise KdrayError(
            f"Ray Serve's controller did not answer for cluster.stuck_after_s={limit_s:g} s, nor within {_RESTARTS_S:g} s of a "
            f"restart; {_REMEDY}"
        )
    return True


async def keep_alive(limit_s: float, on_event: Callable[..., None]) -> None:
    """Restart the controller whenever it has not answered for so long, with an event; never returns."""
    failing, given_up = False, threading.Event()
    while True:
        await asyncio.sleep(_ASK_EVERY_S)
        try:
            restarted = await in_daemon_thread(revive, limit_s, given_up)
        except asyncio.CancelledError:
            given_up.set()
            raise
        except KdrayError as error:
            on_event("controller_stuck", reason=str(error))
        except Exception as error:
            # Ray itself may be slow, or unreachable for a moment; a controller that hangs later is still to be noticed.
            if not failing:
                on_event("watch_failed", watched="Ray Serve's controller", reason=repr(error)[:500])
            failing = True
        else:
            failing = False
            if restarted:
                on_event("controller_restarted", silent_s=limit_s)


def _controller() -> Any:
    """Handle of the cluster's controller; None if Serve does not run."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    # Asked from threads, which may outlast a Ray that has shut down: it would start another.
    if not ray.is_initialized():
        return None
    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def _answers(controller: Any, limit_s: float, given_up: threading.Event) -> bool:
    deadline = time.monotonic() + limit_s
    asked = None
    while (left := deadline - time.monotonic()) > 0 and not given_up.is_set():
        try:
            asked = controller.__ray_ready__.remote() if asked is None else asked
            # In short waits, so that who gives up is not waited for.
            ray.get(asked, timeout=min(left, _WAIT_S))
        except GetTimeoutError:
            continue
        except RayActorError:
            asked = None
            # It restarts, or has been ended: then there is nobody to wait for.
            if _controller() is None:
                return True
            time.sleep(min(left, 0.5))
        else:
            return True
    return False
