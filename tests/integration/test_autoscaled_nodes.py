"""Ray's autoscaler brings a node for each teacher replica, and takes it away again: version 2, with nodes on this machine.

Ray's provider of fake nodes starts a real raylet as a process for each node that the autoscaler decides on; what is faked is
the machine. The decisions, labels, placement, draining and authentication are Ray's own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.support.heads import end_marked, free_ports, started_head
from tests.support.runs import BATCH, check_ledger, finish, json_lines, start, write_recipe

_HEAD_ID, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""Id and kind that the provider knows the head by."""
_TEACHER = {"kdray-role": "teacher"}
_STEPS = 300
"""Enough that the second replica serves before the last step."""


def _cluster_file(folder: Path, port: int) -> Path:
    """A head, and up to two nodes for teachers, which go after six seconds without work."""
    teacher = {"CPU": 1, "object_store_memory": 150_000_000}
    described = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "provider": {
            # By its module: the defaults that Ray looks up for `fake_multinode` are not in its wheel (Ray 2.60).
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "teacher": {"resources": teacher, "labels": _TEACHER, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        # Nothing is copied or installed, and Ray wants that said.
        **{name: {} for name in ("auth", "file_mounts")},
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }
    path = folder / "cluster.json"
    path.write_text(json.dumps(described))
    return path


@pytest.fixture
def address() -> Iterator[str]:
    """A cluster that begins with its head alone; its nodes and drivers show the token that Ray keeps."""
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL
    )
    folder, ports, marker = Path(tempfile.mkdtemp(prefix="kdray-grow-")), free_ports(), secrets.token_hex(8)
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
    }
    options = ("--num-cpus=1", "--include-dashboard=false", f"--autoscaling-config={_cluster_file(folder, ports['port'])}")
    try:
        with started_head(folder, ports, environment, marker, *options):
            ray.init(address=f"127.0.0.1:{ports['port']}", log_to_driver=False)
            try:
                yield f"127.0.0.1:{ports['port']}"
            finally:
                ray.shutdown()
    finally:
        # Nodes are the autoscaler's, and stay where it ends before them.
        end_marked(marker)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Seen:
    """The teachers' nodes over time, as Ray's table of nodes has them; how far the run was each time."""

    run: Path
    changes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        alive: set[str] = set()
        while not self._stop.wait(0.3):
            now = {node["NodeID"] for node in ray.nodes() if node["Alive"] and _TEACHER.items() <= node["Labels"].items()}
            if now != alive:
                alive = now
                self.changes.append({"nodes": len(now), "ids": now, "step": self.step(), "time": time.time()})

    def step(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    def until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}: {self.changes}"
            time.sleep(0.5)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _when(event: dict[str, Any]) -> float:
    """Seconds, as `time.time` counts."""
    return datetime.fromisoformat(event["time"]).timestamp()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_nodes_come_for_replicas_and_go_when_the_pool_shrinks_and_when_the_run_ends(address: str, workplace: Path) -> None:
    recipe = write_recipe(
        workplace,
        "grown",
        # The control trains on as many tokens without a teacher: small batches make that a minute.
        training={"steps": _STEPS, "micro_batch_size": 8, "sft": {"steps": 80, "batch_size": 8, "learning_rate": 1e-3}},
        rollout={"max_new_tokens": 16, "max_staleness": 0},
        evaluation={"prompts": 16, "control": True},
        cluster={
            "address": address,
            "may_grow": True,
            "wait_s": 120,
            "roles": {
                "teachers": {
                    "labels": _TEACHER,
                    "num_cpus": 1,
                    "autoscaling": {
                        "max_replicas": 2,
                        "upscale_wait_s": 1,
                        "upscale_delay_s": 2,
                        # Longer than a busy machine takes to start the second, during which it trains no step.
                        "downscale_idle_s": 15,
                        "drain_s": 5,
                        "report_every_s": 1,
                    },
                },
                "training": {"labels": {"kdray-role": "!teacher"}},
            },
        },
    )
    run = workplace / "runs" / "grown"
    process = start("run", str(recipe))
    seen = _Seen(run)
    try:
        finish(process, 0, 600)
        seen.until(lambda: bool(seen.changes) and seen.changes[-1]["nodes"] == 0, 60, "the last node went")
    finally:
        seen.close()

    # On a busy machine, Ray may end the first node before the replica's processes use it, and start another in its place.
    begins = max(index for index, change in enumerate(seen.changes) if not change["step"])
    sizes = [change["nodes"] for change in seen.changes[begins:]]
    assert sizes == [1, 2, 1, 0], seen.changes
    first, (second, third, last) = seen.changes[0], seen.changes[begins + 1 :]
    events = json_lines(run / "events.jsonl")
    begun = _when(next(event for event in events if event["kind"] == "start"))
    assert first["time"] < begun + 1, "the run's placement group asked for the first, and nothing starts before it is placed"
    assert 0 < second["step"] < _STEPS, "the growing pool asked for the second, in the midst of training"
    done = _when(events[-1])
    grown, shrunk = (event for event in events if event["kind"] == "scale")
    assert [(event["before"], event["now"]) for event in (grown, shrunk)] == [(1, 2), (2, 1)]
    # When a node that is free goes is Ray's affair, and on a busy machine it takes longer than the run.
    assert _when(shrunk) < third["time"], "one went after the pool had shrunk"
    assert done < last["time"], "the other went after the run had ended"
    assert any(line["teacher_replicas"] == 2.0 for line in json_lines(run / "metrics.jsonl")), "the second replica served"

    check_ledger(run, _STEPS)
    summary = yaml.safe_load((run / "summary.json").read_text())
    assert (summary["lost_samples"], summary["duplicated_samples"]) == (0, 0)
    assert f"{_STEPS * BATCH}" in finish(start("verify", str(run)), 0)
