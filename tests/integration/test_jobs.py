"""Runs as Ray jobs: a head with a job server and token authentication, and the commands as a user gives them."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from cluster.connect import asks_for_token
from tests.support.heads import free_ports, started_head
from tests.support.runs import ENGINE, assert_nothing_left, check_ledger, finish, json_lines, start, write_recipe

VARIABLE = "KDRAY_TEST_JOB"
"""Forwarded to a job; tells its processes from those of other jobs."""


@dataclass(frozen=True)
class Head:
    address: str
    """Of its job server."""
    token: str
    folder: Path
    gcs: str
    """Address that drivers join."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One node with everything on ports of its own. It sees no kdray but the installed one."""
    # Not under pytest's folder, whose name is long.
    folder, token, marker = Path(tempfile.mkdtemp(prefix="kdray-jobs-")), secrets.token_hex(32), secrets.token_hex(8)
    ports = free_ports()
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "HF_HUB_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("RAY_")}
    # Jobs run the node's `python`: here that of these tests, whatever the shell that started them finds first.
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        with started_head(folder, ports, inherited | settings, marker, "--num-cpus=4", "--dashboard-host=127.0.0.1"):
            yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", token, folder, f"127.0.0.1:{ports['port']}")
    finally:
        assert_nothing_left(marker)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def user(head: Head, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's machine: the address and the token in the environment, a recipe whose data has a relative path."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    monkeypatch.chdir(workplace)
    return workplace


def recipe(workplace: Path, name: str, **sections: object) -> str:
    values = {
        "data": {"prompts": {"type": "jsonl", "path": "prompts.jsonl"}, "heldout_size": 48},
        "evaluation": {"prompts": 8},
        "cluster": {"job": {"forward_env": [VARIABLE]}},
    }
    return str(write_recipe(workplace, name, **(values | sections)))


def environments(titles: Sequence[str], value: str | None = None) -> list[dict[str, str]]:
    """Environments of the processes with one of these in their command line; of a job by its value of VARIABLE."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            line = " ".join(process.cmdline())
            if any(title in line for title in titles) and value in (None, environment.get(VARIABLE)):
                found.append(environment)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def holding(value: bytes, *folders: Path) -> list[Path]:
    """Files below the folders that hold a value."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError):
            if value in path.read_bytes():
                found.append(path)
    return found


def wait_for(condition: Callable[[], object], timeout_s: float = 280, every_s: float = 0.5) -> object:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every_s)
    return found


def test_a_run_is_submitted_watched_stopped_and_resumed(user: Path, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    run = user / "runs" / "sent"
    monkeypatch.setenv(VARIABLE, "first")
    key = secrets.token_hex(16)
    (user / "key").write_text(f"{key}\n")
    by_file = {"file": str(user / "key"), "read_by": ["driver", "replicas", "ranks"]}
    config = recipe(
        user,
        "sent",
        training={"steps": 2000, "batch_size": 32, "sft": {"steps": 4}},
        cluster={"job": {"forward_env": [VARIABLE]}, "secrets": {"A_KEY": by_file}},
    )
    submitted = finish(start("submit", config), 0)
    assert "job sent: submitted to" in submitted
    assert "prompts.jsonl as inputs/data.prompts.path/prompts.jsonl" in submitted
    follower, leaver = start("logs", "sent", "--follow"), start("logs", "sent", "--follow")
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(json_lines(run / "metrics.jsonl")) >= 3)
    # Every process of the job has kdray from the job's own folder, the engine's included, and the forwarded variable.
    engines = environments(ENGINE, "first")
    assert engines
    # Serve's controller, which outlives the job, has nothing of it to pass on to the next.
    (controller,) = (each for each in environments(["ServeController"]) if each.get("RAY_AUTH_TOKEN") == head.token)
    assert VARIABLE not in controller
    assert "working_dir_files" not in controller.get("PYTHONPATH", "")
    code = engines[0]["PYTHONPATH"].split(os.pathsep)[0]
    assert "working_dir_files" in code
    assert Path(code).is_relative_to(head.folder)
    assert (Path(code) / "actors" / "vllm_plugin" / "mixture_model.py").is_file()
    # The secret has come to the engine, and stands nowhere that Ray shows or keeps.
    assert {engine["A_KEY"] for engine in engines} == {key}
    details = requests.get(
        f"{head.address}/api/serve/applications/", headers={"Authorization": f"Bearer {head.token}"}, timeout=30
    )
    assert VARIABLE in details.text, "where a forwarded variable is shown"
    assert key not in details.text
    assert holding(b"first", head.folder), "Ray's logs have a forwarded value"
    assert holding(key.encode(), head.folder, run) == []
    # Who stops looking stops nothing.
    leaver.send_signal(signal.SIGINT)
    left = finish(leaver, 130)
    assert f"the job runs on: kdray logs sent --address {head.address} --follow" in " ".join(left.split())
    shown = finish(start("status", "sent"), 0)
    assert re.search(r"sent +│ RUNNING +│ +│ distill \d+/2000", shown), shown
    refused = finish(start("submit", config, "--resume", "--no-check"), 2)
    assert "job sent is RUNNING" in refused

    stopped = finish(start("stop", "sent"), 0)
    assert "sent: STOPPED with exit code 130: interrupted: stopped at step" in stopped
    log = finish(follower, 130)
    assert re.search(rf"^kdray \S+ from {re.escape(code)}/kdray, Python", log, re.MULTILINE), log[:2000]
    assert log.count("interrupt_requested") == 1
    assert "STOPPED" in finish(start("status"), 0)
    done = len(json_lines(run / "metrics.jsonl"))
    check_ledger(run, done)
    wait_for(lambda: not environments((*ENGINE, "ServeReplica", "RayTrain"), "first"), 30)

    # By the run's name again: a job of its own, which replicas of its own belong to.
    monkeypatch.setenv(VARIABLE, "second")
    resumed = start("submit", config, f"training.steps={done + 4}", "--resume", "--follow")
    wait_for(lambda: environments(ENGINE, "second"))
    output = finish(resumed, 0)
    assert f"start resumed_step={done}" in output
    assert f"sent-2: SUCCEEDED, complete; run folder {run}" in output
    check_ledger(run, done + 4)
    assert (run / "summary.json").is_file()
    shown = finish(start("status"), 0)
    assert re.search(r"sent-2 +│ SUCCEEDED", shown), shown
    assert re.search(r"sent +│ STOPPED", shown), shown
    # A job that cannot run says why, and its code is what following it ends with.
    again = finish(start("submit", config, "--no-check", "--follow"), 2)
    assert "sent-3: FAILED with exit code 2: kdray:" in again
    assert "already holds a run; continue it with --resume" in again
    for text in (submitted, left, stopped, log, output, shown, again):
        assert head.token not in text


class _NoRay(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>something else</html>")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_what_is_wrong_with_token_and_address_is_one_message(user: Path, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    other = http.server.HTTPServer(("127.0.0.1", 0), _NoRay)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    elsewhere = f"http://127.0.0.1:{other.server_port}"
    empty = user / "empty_token"
    empty.write_text("")
    monkeypatch.setenv("HOME", str(user))
    wrong = secrets.token_hex(32)
    cases = [
        ({"RAY_AUTH_TOKEN": wrong}, head.address, "RAY_AUTH_TOKEN: the token is not that of the cluster"),
        ({}, head.address, "RAY_AUTH_TOKEN: not set, and the cluster"),
        ({"RAY_AUTH_TOKEN": head.token, "RAY_AUTH_MODE": "disabled"}, head.address, "RAY_AUTH_MODE=disabled: the cluster"),
        ({"RAY_AUTH_TOKEN_PATH": str(empty)}, head.address, f"RAY_AUTH_TOKEN_PATH={empty}: holds no token"),
        ({"RAY_AUTH_TOKEN": head.token}, elsewhere, "what answers there is no job server of Ray"),
    ]
    started = []
    for environment, address, message in cases:
        with monkeypatch.context() as patch:
            patch.delenv("RAY_AUTH_TOKEN")
            for name, value in environment.items():
                patch.setenv(name, value)
            started.append((start("status", "--address", address), message))
    for process, message in started:
        output = finish(process, 2)
        assert output.startswith("kdray: "), output
        assert message in output
        assert len(output.splitlines()) == 1, output
        assert head.token not in output
        assert wrong not in output
    other.shutdown()


def test_joining_a_cluster_without_its_token_is_one_message(user: Path, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head asks for one as soon as its user has one, and a driver sends it only if told to: Ray itself says that nothing is
    there."""
    assert asks_for_token(head.gcs)
    monkeypatch.setenv("HOME", str(user))
    config = recipe(user, "joining", cluster={"address": head.gcs})
    wrong = secrets.token_hex(32)
    started = []
    for environment, message in (
        ({"RAY_AUTH_TOKEN": head.token}, f"RAY_AUTH_MODE: not set, and the cluster at {head.gcs} asks for a token"),
        ({"RAY_AUTH_TOKEN": wrong, "RAY_AUTH_MODE": "token"}, "RAY_AUTH_TOKEN: the token is not that of the cluster"),
        ({"RAY_AUTH_MODE": "token"}, f"RAY_AUTH_TOKEN: not set, and the cluster at {head.gcs} asks for a token"),
    ):
        with monkeypatch.context() as patch:
            patch.delenv("RAY_AUTH_TOKEN")
            for name, value in environment.items():
                patch.setenv(name, value)
            started.append((start("plan", config), message))
    for process, message in started:
        output = finish(process, 2)
        assert message in output
        assert head.token not in output
        assert wrong not in output


@pytest.mark.full
def test_a_node_without_vllm_is_told_once(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas whose `import vllm` fails as it does where there is none."""
    blocked = user / "blocked"
    blocked.mkdir()
    (blocked / "vllm.py").write_text("raise ModuleNotFoundError(\"No module named 'vllm'\", name='vllm')\n")
    monkeypatch.setenv("PYTHONPATH", f"{blocked}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    config = recipe(user, "bare", cluster={"job": {"forward_env": ["PYTHONPATH"]}})
    output = finish(start("submit", config, "--follow", "--no-check"), 1)
    assert "replicas of main did not start: a node has no Python package `vllm`" in output
    assert "pip install" in output
    assert "Traceback" not in output
