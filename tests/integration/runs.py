"""Runs as a user starts them, by the command in a process of its own, and what is to be true of their folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

BATCH = 32

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


def assert_nothing_left(marker: str) -> None:
    """No process of the run is alive: Ray's and vLLM's carry the run's environment variable."""
    deadline = time.monotonic() + 20
    while True:
        left = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("KDRAY_TEST_MARKER") == marker:
                    left.append((process.pid, " ".join(process.cmdline())[:120]))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        if not left:
            return
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ledger(run: Path, steps: int) -> None:
    """Every sample of every step trained exactly once, counted from the files."""
    counts = Counter(sample for line in json_lines(run / "ledger.jsonl") for sample in line["sample_ids"])
    assert counts == Counter(range(steps * BATCH))
    assert [line["step"] for line in json_lines(run / "metrics.jsonl")] == list(range(1, steps + 1))
