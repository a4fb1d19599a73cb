"""A run whose object store is behind a network that swallows everything in the middle of a commit."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdray.runs.storage import PATIENCE_S, Storage
from tests.support.runs import BATCH, assert_nothing_left, check_ledger, finish, json_lines, start, write_recipe
from tests.support.s3_server import BUCKET, S3Server, s3_server
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

EVERY, STEPS = 4, 14


@pytest.fixture
def server() -> Iterator[S3Server]:
    # Before any Ray: its processes inherit the environment.
    with s3_server() as running:
        yield running


@pytest.fixture
def network(server: S3Server) -> Iterator[TcpProxy]:
    with tcp_proxy(server.port) as proxy:
        yield proxy


def _kinds(run: Path) -> list[str]:
    return [event["kind"] for event in json_lines(run / "events.jsonl")]


def _await_event(process: subprocess.Popen[str], run: Path, kind: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while kind not in _kinds(run):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, _kinds(run)
        time.sleep(0.2)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_storage_that_swallows_all_within_a_commit_is_noticed_and_nothing_is_lost(
    workplace: Path, marker: str, server: S3Server, network: TcpProxy
) -> None:
    """What it has swallowed arrives once it is healed, beside what was sent in its place."""
    recipe = write_recipe(
        workplace,
        "swallowed",
        run={"storage": S3Server(network.port).url(f"{BUCKET}/team")},
        training={"steps": STEPS, "batch_size": BATCH, "checkpoint_every": EVERY, "keep_checkpoints": 2},
        cluster={"local_cpus": 4},
    )
    run = workplace / "runs" / "swallowed"
    network.black_hole_at(f"/checkpoints/step-{EVERY:06d}/by-".encode())
    process = start("run", str(recipe))
    assert network.triggered.wait(400), "no checkpoint was begun"
    # Long before patience ends: else the run would end with the outage, and not have been seen to wait for it.
    _await_event(process, run, "storage_retry", PATIENCE_S / 2)
    assert json_lines(run / "metrics.jsonl")[-1]["step"] <= 2 * EVERY, "trained on beyond the next checkpoint"
    network.heal()
    finish(process, 0, timeout_s=400)
    assert network.held > 0
    check_ledger(run, STEPS)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["lost_samples"], summary["duplicated_samples"]) == (0, 0)
    assert summary["storage_retries"] >= 1
    assert "each in its step" in finish(start("verify", str(run)), 0)
    # The checkpoint that it was in the middle of, too, had become whole: later ones have taken its place.
    stored = [event["step"] for event in json_lines(run / "events.jsonl") if event["kind"] == "stored"]
    assert [step for step in stored if step] == [4, 8, 12, STEPS], "those of the supervised phase have number 0"
    kept = Storage(server.url(f"{BUCKET}/team"), "swallowed")
    for step in (12, STEPS):
        key = f"checkpoints/step-{step:06d}"
        files = json.loads(server.read(f"team/swallowed/{key}/COMMITTED.json"))["files"]
        found = kept.digests(f"{key}/{name}" for name in files)
        assert all(found[f"{key}/{name}"].sha256 == file["sha256"] for name, file in files.items())
    assert_nothing_left(marker)
