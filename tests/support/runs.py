"""Runs as a user starts them, by the command in a process of its own, and what is to be true of their folders."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

BATCH = 32

ENGINE = "VLLM::EngineCore", "multiprocessing.spawn"
"""Either is in the command line of an engine: vLLM names its process, but under pytest-xdist it was seen to keep its first."""

STARTED: list[subprocess.Popen[str]] = []
"""Processes of the running test."""


def write_recipe(workplace: Path, name: str, **sections: Any) -> Path:
    tree: dict[str, Any] = {
        "run": {"name": name, "output": str(workplace / "runs")},
        "data": {"prompts": {"type": "jsonl", "path": str(workplace / "prompts.jsonl")}, "heldout_size": 48},
        "student": {"model": str(workplace / "student")},
        "teachers": {"main": {"model": str(workplace / "teacher"), "kv_cache_gib": 0.2}},
        "rollout": {"max_new_tokens": 8},
        "training": {
            "steps": 12,
            "batch_size": BATCH,
            "learning_rate": 3e-3,
            "sft": {"steps": 20, "batch_size": 32, "learning_rate": 3e-3},
        },
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    path = workplace / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(*arguments: str, log: IO[str] | None = None, module: str = "cluster.cli") -> subprocess.Popen[str]:
    """The command in a process of its own. Args: log: where its output goes; a pipe that `finish` reads otherwise."""
    # A session of its own, so that what it leaves behind can be found by session id.
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE if log is None else log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str], code: int, timeout_s: float = 280) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, output[-6000:]
    return output


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int, timeout_s: float = 240) -> None:
    """Wait until a file of a run has so many lines; the run may not end before."""
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, f"{path} has not {count} lines in {timeout_s:g} s"
        time.sleep(0.05)


def assert_nothing_left(marker: str) -> None:
    """No process of the run is alive."""
    deadline = time.monotonic() + 20
    while left := [(process.pid, _title(process)) for process in of_the_run(marker)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.NoSuchProcess:
        return "just ended"


def of_the_run(marker: str) -> Iterator[psutil.Process]:
    """Its live processes: Ray's and vLLM's carry the run's environment variable too."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.pid != os.getpid() and process.environ().get("KDRAY_TEST_MARKER") == marker:
                yield process


def reachable_from_outside(marker: str) -> set[str]:
    """First words of the processes of a run that listen on more than the loopback interface."""
    found = set()
    for process in of_the_run(marker):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            listening = [each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
            if any(not ip.removeprefix("::ffff:").startswith("127.") for ip in listening):
                found.add(process.cmdline()[0].split("-")[0].strip())
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ledger(run: Path, steps: int) -> None:
    """Every sample of every step trained exactly once, counted from the files."""
    counts = Counter(sample for line in json_lines(run / "ledger.jsonl") for sample in line["sample_ids"])
    assert counts == Counter(range(steps * BATCH))
    assert [line["step"] for line in json_lines(run / "metrics.jsonl")] == list(range(1, steps + 1))
