"""How often, and in which folder, a Ray of one's own is started. No Ray is."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray._private.utils import validate_socket_filepath
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.util import get_node_ip_address
from typer.testing import CliRunner

from cluster.cli import app
from cluster.connect import NO_TOKEN, asks_for_token, connected, nodes_for, start_local
from kdray.config import parse_config
from kdray.errors import ConfigError

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.mark.parametrize(
    ("errors", "ends_with"),
    [
        ([], None),
        ([SLOW] * 2, None),
        ([SLOW] * 3, "in 3 attempts.*cluster.address.*timed out during"),
        (["no room"], "^no room"),
    ],
)
def test_a_start_that_a_busy_machine_was_too_slow_for_is_repeated(
    monkeypatch: pytest.MonkeyPatch, errors: list[str], ends_with: str | None
) -> None:
    calls: list[dict[str, Any]] = []
    before = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER

    def init(**options: Any) -> None:
        calls.append(options)
        assert not ray_constants.ENABLE_RAY_CLUSTER, "on every interface"
        assert os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] == "0"
        if len(calls) <= len(errors):
            raise Exception(errors[len(calls) - 1])

    monkeypatch.setattr(ray, "init", init)
    if ends_with is None:
        start_local(num_cpus=2)
    else:
        with pytest.raises(Exception, match=ends_with):
            start_local(num_cpus=2)
    assert len(calls) == min(3, len(errors) + (ends_with is None))
    assert all(call["address"] == "local" and call["num_cpus"] == 2 for call in calls)
    assert (dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER) == before


@pytest.mark.parametrize(("bound_to", "loopback"), [("127.0.0.1", True), ("0.0.0.0", False)])
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_cluster_is_joined_where_it_listens(
    monkeypatch: pytest.MonkeyPatch, name: str, bound_to: str, loopback: bool
) -> None:
    """Ray would look for one that is bound to loopback at the machine's other address, and for its node's name there, too."""
    # A machine without a network has no other address.
    loopback = loopback and get_node_ip_address() != "127.0.0.1"
    joined: list[bool] = []

    def init(address: str, **options: Any) -> None:
        joined.append(not ray_constants.ENABLE_RAY_CLUSTER)
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server((bound_to, 0)) as server:
        address = f"{name}:{server.getsockname()[1]}"
        tree = {"run": {"name": "x"}, "student": {"model": {"type": "tiny"}}, "teachers": {"t": {"model": {"type": "tiny"}}}}
        config = parse_config(tree | {"cluster": {"address": address}})
        with pytest.raises(ConfigError, match="no Ray cluster answers there"), connected(config):
            pass
    assert joined == [loopback]
    assert ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.parametrize(("where", "variable"), [("local", None), (None, "local"), (None, None)])
def test_local_by_name_is_the_same_as_none(monkeypatch: pytest.MonkeyPatch, where: str | None, variable: str | None) -> None:
    """Ray's own word for it must not lead past the loopback interface and the number of CPUs."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("cluster.connect.start_local", lambda **options: started.append(options))
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail(f"joined {options}"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    tree = {"run": {"name": "x"}, "student": {"model": {"type": "tiny"}}, "teachers": {"t": {"model": {"type": "tiny"}}}}
    config = parse_config(tree | {"cluster": {"address": where, "local_cpus": 3}})
    with connected(config, serving=False):
        pass
    assert [options["num_cpus"] for options in started] == [3]


def test_a_plan_for_this_machine_starts_no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    tree = {"run": {"name": "x"}, "student": {"model": {"type": "tiny"}}, "teachers": {"t": {"model": {"type": "tiny"}}}}
    config = parse_config(tree | {"cluster": {"local_cpus": 7}})
    (node,) = nodes_for(config)
    assert (node.resources["CPU"], node.name) == (7, "this machine")
    assert node.resources["memory"] > 2**28
    assert node.resources["object_store_memory"] > 2**20
    recipe = tmp_path / "x.yaml"
    recipe.write_text(config.dump())
    result = CliRunner().invoke(app, ["plan", str(recipe)])
    assert result.exit_code == 0, result.output
    assert "bottleneck: " in result.stdout
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="RAY_ADDRESS=127.0.0.1:1 does not answer"):
        nodes_for(config)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_folder_for_temporary_files_is_left_for_a_short_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    """As batch schedulers set it. Sockets have 107 bytes, and Ray itself says what it makes of the folder."""
    long = tmp_path / ("job" * 40)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, str(long))
    made: list[str] = []

    def init(**options: Any) -> None:
        session = f"{get_default_ray_temp_dir()}/session_2026-11-29_20-38-22_460123_4194304"
        validate_socket_filepath(f"{session}/sockets/plasma_store")
        made.append(session)

    with pytest.raises(OSError, match="AF_UNIX path length"):
        init()
    monkeypatch.setattr(ray, "init", init)
    start_local(num_cpus=2)
    assert len(made) == 1
    assert os.environ[variable] == str(long), "this program's own files stay where they were"
    assert [f"{variable}={long} is too long" in line for line in caplog.messages] == [True]


def test_without_a_folder_that_is_short_enough_the_setting_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cluster.connect._SHORT", (str(tmp_path / "gone"),))
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("started"))
    monkeypatch.setenv("TMPDIR", "/scratch/" + "x" * 90)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with pytest.raises(ConfigError, match=r"^TMPDIR=/scratch/x+: a path of at most \d\d bytes is needed"):
        start_local()


def test_a_short_folder_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(os.environ["TMPDIR"]))
    monkeypatch.setenv("TMPDIR", "/tmp/mine")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    start_local()
    assert (seen, caplog.messages) == (["/tmp/mine"], [])


@pytest.mark.parametrize("asks", [True, False])
def test_whether_a_cluster_asks_for_a_token_is_seen_without_one(asks: bool) -> None:
    """The variables of this process say nothing about the cluster."""

    class Gcs(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):  # type: ignore[misc]
        def CheckAlive(self, request: Any, context: grpc.ServicerContext) -> Any:
            if asks:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return gcs_service_pb2.CheckAliveReply()

    server = grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Gcs(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert asks_for_token(f"127.0.0.1:{port}") is asks
    finally:
        server.stop(None)


@pytest.mark.parametrize("asks", [True, False])
def test_a_cluster_without_a_token_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asks: bool
) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr("cluster.connect.unreachable", lambda address: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="head:6379"))
    monkeypatch.setattr("cluster.connect.asks_for_token", lambda address: asks and address == "head:6379")
    tree = {"run": {"name": "x"}, "student": {"model": {"type": "tiny"}}, "teachers": {"t": {"model": {"type": "tiny"}}}}
    config = parse_config(tree | {"cluster": {"address": "head:6379"}})
    with caplog.at_level("WARNING", "cluster.connect"), connected(config, serving=False):
        pass
    told = [record.getMessage() for record in caplog.records if "asks for no token" in record.getMessage()]
    assert told == ([] if asks else [NO_TOKEN.format(where="the cluster at cluster.address=head:6379")])
