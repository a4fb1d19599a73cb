"""The Prometheus tracker over a real Ray node: what its export holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray

from kdray.config import parse_config
from kdray.config.plugins import implemented

TINY = {"type": "tiny"}


@pytest.fixture
def port() -> Iterator[int]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        yield ray.nodes()[0]["MetricsExportPort"]
    finally:
        ray.shutdown()


@pytest.mark.full
def test_a_nodes_export_has_the_runs_numbers(port: int, tmp_path: Path) -> None:
    run = {"name": "seen", "output": str(tmp_path), "trackers": ["prometheus"]}
    config = parse_config({"run": run, "student": {"model": TINY}, "teachers": {"t": {"model": TINY}}})
    tracker = implemented(config.run.trackers[0])
    tracker.start(config, tmp_path)
    tracker.log(3, {"wait_rollout_s": 1.25, "teacher/main/staleness_0/importance_weight_ess": 0.75}, "distill")
    for _ in range(2):
        tracker.event("checkpoint", {"step": 3})
    wanted = {
        "ray_kdray_step": ('phase="distill"', "3.0"),
        "ray_kdray_wait_rollout_s": ('run="seen"', "1.25"),
        "ray_kdray_importance_weight_ess": ('of="teacher/main/staleness_0"', "0.75"),
        "ray_kdray_events_total": ('kind="checkpoint"', "2.0"),
    }
    deadline = time.monotonic() + 60
    while True:
        lines = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode().splitlines()
        lacking = {
            name
            for name, (label, value) in wanted.items()
            if not any(line.startswith(f"{name}{{") and label in line and line.endswith(f" {value}") for line in lines)
        }
        if not lacking:
            return
        assert time.monotonic() < deadline, f"{lacking} not in {[line for line in lines if 'kdray' in line]}"
        time.sleep(1)
