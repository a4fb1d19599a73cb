"""Heads of Ray clusters in processes of their own, on ports of their own, as `ray start --head` makes them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

_PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
    "ray-client-server-port",
)


def free_ports() -> dict[str, int]:
    """A free port for each of a head's servers, by the option of `ray start`; all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in _PORTS]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return dict(zip(_PORTS, ports, strict=True))


@contextlib.contextmanager
def started_head(
    folder: Path, ports: Mapping[str, int], environment: Mapping[str, str], marker: str, *options: str
) -> Iterator[None]:
    """A head with its files in `folder`, which must be short: the paths of Ray's sockets may have 107 characters.

    Args: environment: all of it; marker: KDRAY_TEST_MARKER of every process of the cluster.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--temp-dir={folder}"]
    command += ["--object-store-memory=300000000", "--disable-usage-stats", *options]
    command += [f"--{name}={port}" for name, port in ports.items()]
    # Ray would wait half a minute at the end, in which the node would hand its work to others.
    settings = {"KDRAY_TEST_MARKER": marker, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    log = folder / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**environment, **settings}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def end_marked(marker: str) -> None:
    """Kill what is left of a cluster, by the variable that its processes have."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("KDRAY_TEST_MARKER") == marker:
                process.kill()
