"""An object store behind a network that swallows, cuts and heals: each is noticed in time, and nothing else waits for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdray.errors import StorageError
from kdray.runs import storage as module
from kdray.runs.lease import LEASE, Lease
from kdray.runs.storage import Retry, Storage
from tests.support.s3_server import BUCKET, S3Server, s3_server
from tests.support.tcp_proxy import TcpProxy, faults, tcp_proxy

SILENCE_S = 1.0
NOTICED_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def slow_network(server: S3Server) -> Iterator[TcpProxy]:
    with tcp_proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def network(slow_network: TcpProxy, monkeypatch: pytest.MonkeyPatch) -> TcpProxy:
    """With a client that waits for an answer for a second."""
    monkeypatch.setattr(module, "_SILENCE_S", SILENCE_S)
    return slow_network


def url_of(proxy: TcpProxy, folder: str) -> str:
    return S3Server(proxy.port).url(f"{BUCKET}/{folder}")


def until(condition: Callable[[], bool], limit_s: float = NOTICED_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_silence_is_noticed_long_before_patience_ends() -> None:
    """Four times within it, at the settings as they are."""
    assert 4 * module._SILENCE_S * module._ATTEMPTS < module.PATIENCE_S


@pytest.mark.parametrize("fault", ["cut", "black_hole", "no_answers"])
def test_a_partition_in_the_middle_of_a_write_is_told_and_heals(network: TcpProxy, server: S3Server, fault: str) -> None:
    told: list[Retry] = []
    storage = Storage(url_of(network, fault), on_retry=told.append)
    storage.write("before", b"1")
    faults(network)[fault]()
    content = b"2" * 200_000
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(storage.write, "within", content)
        until(lambda: bool(told))
        assert not writing.done()
        network.heal()
        assert writing.result(NOTICED_S).size == len(content)
    assert told[0].what == "write within"
    assert server.read(f"{fault}/within") == content
    assert server.held(f"{fault}/") == [f"{fault}/before", f"{fault}/within"]


def test_patience_ends_while_nothing_answers(network: TcpProxy) -> None:
    storage = Storage(url_of(network, "patience"), patience_s=1.0)
    storage.write("before", b"1")
    network.black_hole()
    with pytest.raises(StorageError, match="could not write within"):
        storage.write("within", b"2")
    assert 0 < network.held <= module._ATTEMPTS, "the client's own retries take as long as they like"
    network.heal()


def test_a_slow_storage_is_no_silent_one(slow_network: TcpProxy) -> None:
    told: list[Retry] = []
    storage = Storage(url_of(slow_network, "slow"), on_retry=told.append)
    slow_network.delay(0.1)
    storage.write("a", b"1")
    assert storage.read("a") == b"1"
    assert told == []


def test_a_driver_whose_storage_is_silent_is_still_seen_at_work_in_its_folder(network: TcpProxy, tmp_path: Path) -> None:
    """Or another driver would take its run over."""
    folder = tmp_path / "run"
    stale_after_s = 1.2

    def age() -> float:
        return time.time() - float(json.loads((folder / LEASE).read_text())["heartbeat"])

    with Lease([Storage.local(folder), Storage(url_of(network, "lease"))], stale_after_s).take() as lease:
        network.black_hole()
        ages = []
        deadline = time.monotonic() + 2 * stale_after_s
        while time.monotonic() < deadline:
            ages.append(age())
            time.sleep(0.05)
        lease.check()
        network.heal()
    assert network.held, "the storage's own renewal was in the hole"
    assert max(ages) < stale_after_s
