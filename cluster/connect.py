"""Connection to Ray: join the cluster of the config, or start a local Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.utils import get_num_cpus
from ray.exceptions import AuthenticationError
from tenacity import RetryError, Retrying, retry_if_exception_message, stop_after_attempt

from actors import serve_controller
from cluster.planning.placement import Bundle, Node, check_capacity
from cluster.planning.reservation import live_nodes
from kdray.checks.cluster_token import token_refused
from kdray.config import Config
from kdray.errors import AwayError, ConfigError, KdrayError

logger = logging.getLogger(__name__)

NO_TOKEN = (
    "warning: {where} asks for no token: whoever reaches its ports can run code on it; start its nodes with "
    "RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN (docs/clusters.md)"
)
"""Format of the warning about a cluster without authentication; `where` names it."""

_STARTS = 3
_SLOW = "The current node timed out during startup.*"


def start_local(**options: Any) -> None:
    """Start a local Ray with all ports on the loopback interface; `ray.shutdown` ends it.

    Args: options: of `ray.init`.
    Raises: KdrayError if a component repeatedly fails to start.
    """
    # Ray gives each component 15 s to start, and fails otherwise; a busy machine occasionally needs longer.
    slow = retry_if_exception_message(match=_SLOW)
    try:
        for attempt in Retrying(retry=slow, stop=stop_after_attempt(_STARTS)):
            with attempt, _loopback(), _short_paths():
                ray.init(address="local", include_dashboard=False, **options)
    except RetryError as error:
        raise KdrayError(
            f"a Ray on this machine did not come up in {_STARTS} attempts; where the machine is busy or short of memory, try "
            "again when it is not, or set cluster.address to a Ray that runs; its own words: "
            f"{error.last_attempt.exception()}"
        ) from error


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Bind a Ray that is started inside the block to loopback.

    Ray does so by default on platforms without cluster support, through this variable. It is read when Ray is imported, which
    may have happened earlier.
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


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _where_it_listens(address: str) -> contextlib.AbstractContextManager[None]:
    """Context in which Ray joins an address of this machine.

    Ray replaces a loopback address by the machine's other one, at which a cluster that was bound to loopback never answers.
    """
    parts = urlsplit(f"//{address}")
    if "://" in address or parts.port is None or parts.hostname not in _LOOPBACK:
        return contextlib.nullcontext()
    return _loopback() if unreachable(f"{ray.util.get_node_ip_address()}:{parts.port}") else contextlib.nullcontext()


_SOCKET_BYTES = 107
"""Longest path of a socket on Linux."""
_BELOW = len("/ray/session_2026-11-29_20-38-22_460123_4194304/sockets/plasma_store_9")
"""Longest path that Ray puts below the folder for temporary files; vLLM's and Python's own are shorter."""
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


@contextlib.contextmanager
def _short_paths() -> Iterator[None]:
    """Let a Ray that is started inside the block, and its workers, make their sockets in a folder whose path is short enough.

    Batch schedulers set TMPDIR to long paths. Raises: ConfigError if there is no other folder.
    """
    names = [name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    too_long = [name for name in names if len(os.fsencode(os.environ[name])) + _BELOW > _SOCKET_BYTES]
    if not too_long:
        yield
        return
    setting = f"{too_long[0]}={os.environ[too_long[0]]}"
    short = next((folder for folder in _SHORT if os.access(folder, os.W_OK | os.X_OK)), None)
    if short is None:
        raise ConfigError(
            f"{setting}: a path of at most {_SOCKET_BYTES - _BELOW} bytes is needed, since sockets are made below it; set it "
            f"to a shorter one (none of {', '.join(_SHORT)} can be written)"
        )
    logger.warning("%s is too long for the sockets of Ray and vLLM: they make them in %s", setting, short)
    before = {name: os.environ[name] for name in too_long}
    os.environ.update(dict.fromkeys(too_long, short))
    try:
        yield
    finally:
        os.environ.update(before)


def nodes_for(config: Config) -> list[Node]:
    """Nodes of the cluster that a run of this config would join; otherwise this machine, as the local Ray that the run would
    start finds it, which takes no Ray."""
    if not _starts_local(config):
        with connected(config, serving=False):
            return live_nodes()
    # Ray tells what it finds on a machine nowhere else.
    found = ResourceAndLabelSpec(num_cpus=config.cluster.local_cpus).resolve(is_head=True, node_ip_address="127.0.0.1")
    return [Node(found.to_resource_dict(), found.labels, "this machine")]


def connecting(config: Config) -> str:
    """What `connected` does, in words."""
    if ray.is_initialized():
        return "using this program's Ray"
    return "starting Ray on this machine" if _starts_local(config) else f"joining Ray at {_address(config)}"


def _address(config: Config) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def _starts_local(config: Config) -> bool:
    # In Ray, `local` means a new local instance.
    return not ray.is_initialized() and _address(config) in (None, "", "local")


@contextlib.contextmanager
def connected(config: Config, serving: bool = True) -> Iterator[None]:
    """Join the named cluster or start a local Ray, with Ray Serve if `serving`. Shuts down only what it started."""
    setting = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
    address = _address(config)
    already = ray.is_initialized()
    if not already:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address and not _starts_local(config):
            remedy = CLUSTER_REMEDY.format(setting=setting)
            if address != "auto" and (problem := unreachable(address)):
                raise AwayError(f"{setting}={problem}; {remedy}")
            try:
                with _where_it_listens(address):
                    ray.init(address=address, **quiet)
            except AuthenticationError as error:
                raise token_refused(address, is_wrong=False) from error
            except ConnectionError as error:
                if "InvalidAuthToken" in str(error.__cause__):
                    raise token_refused(address, is_wrong=is_token_auth_enabled()) from error
                raise AwayError(f"{setting}={address}: no Ray cluster answers there: {error}; {remedy}") from error
            if not asks_for_token(ray.get_runtime_context().gcs_address):
                logger.warning(NO_TOKEN.format(where=f"the cluster at {setting}={address}"))
        else:
            start_local(num_cpus=config.cluster.local_cpus, **quiet)
    try:
        if serving:
            # One that another run left behind standing still would hang this one, before it can say anything.
            serve_controller.revive(config.cluster.stuck_after_s)
            serve_controller.start()
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
        yield
    finally:
        # Stopping a local Ray also stops its Serve. On a cluster Serve keeps running: other runs may be using it by now.
        if not already:
            ray.shutdown()


_PLENTY = 1e9


def check_local_cpus(config: Config, wanted: Sequence[Bundle]) -> None:
    """Check that a local Ray, if the run starts one, has enough CPUs: said before it starts, which takes half a minute.

    The rest of what the run needs is checked once Ray tells what it found. Raises: CapacityError.
    """
    if not _starts_local(config):
        return
    cpus = float(config.cluster.local_cpus or get_num_cpus())
    # As much as all parts together could ask for.
    others = {name: _PLENTY for bundle in wanted for name in bundle.resources if name != "CPU"}
    check_capacity([replace(bundle, labels={}) for bundle in wanted], [Node({**others, "CPU": cpus}, name="this machine")])


_CONNECT_TIMEOUT_S = 2.0


def asks_for_token(gcs_address: str) -> bool:
    """True unless the cluster answers a stranger, who sends no token and knows no certificate."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with grpc.insecure_channel(gcs_address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_CONNECT_TIMEOUT_S)
        except grpc.RpcError:
            return True
    return False


CLUSTER_REMEDY = "start the cluster, correct {setting} (host:6379 or ray://host:10001), or unset it for a local Ray"


def unreachable(address: str) -> str | None:
    """Describe why nothing answers at a Ray address; None if something does. Ray itself would retry for minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or {"ray": 10001, "http": 80, "https": 443}.get(parts.scheme, 6379)
    except ValueError as error:
        return f"{address}: {error}"
    try:
        socket.create_connection((host or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{address} does not answer: {error}"
    return None
