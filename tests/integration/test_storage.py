"""A run whose state lies in an object store: the server goes away, the run is stopped, its folder and a checkpoint are lost."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdray.runs.remote_copy import fetch_results
from tests.support.runs import BATCH, assert_nothing_left, check_ledger, finish, json_lines, start, wait_for_lines, write_recipe
from tests.support.s3_server import BUCKET, S3Server, s3_server


@pytest.fixture
def server() -> Iterator[S3Server]:
    # Before any Ray: its processes inherit the environment.
    with s3_server() as running:
        yield running


def _wait_for_event(process: subprocess.Popen[str], events: Path, kind: str) -> None:
    deadline = time.monotonic() + 240
    while f'"kind": "{kind}"' not in events.read_text():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_run_goes_on_from_its_storage_alone(workplace: Path, marker: str, server: S3Server, tmp_path: Path) -> None:
    """Two ranks at ZeRO 1; all that the resumed run has of the first is in the bucket, and the newest checkpoint is damaged."""
    training = {"ranks": 2, "zero_stage": 1, "micro_batch_size": 16, "cpus_per_rank": 0.5}
    recipe = write_recipe(
        workplace,
        "stored",
        run={"storage": server.url(f"{BUCKET}/team")},
        training=training | {"steps": 80, "batch_size": BATCH, "checkpoint_every": 4, "keep_checkpoints": 2},
        cluster={"local_cpus": 4},
    )
    run, key = workplace / "runs" / "stored", "team/stored"
    process = start("run", str(recipe))
    wait_for_lines(process, run / "metrics.jsonl", 5)
    # The outage lasts until the run has noticed it: the client library's own patience hides a shorter one.
    server.stop()
    _wait_for_event(process, run / "events.jsonl", "storage_retry")
    trained = len((run / "metrics.jsonl").read_text().splitlines())
    assert trained <= 8, "a step was trained before the checkpoint that came first"
    server.start()
    wait_for_lines(process, run / "metrics.jsonl", 10)
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    assert_nothing_left(marker)
    events = json_lines(run / "events.jsonl")
    assert any(event["kind"] == "storage_retry" for event in events)
    saved = {event["step"]: event for event in events if event["kind"] == "stored"}
    newest, older = sorted(saved, reverse=True)[:2]
    assert 10 <= newest < 80
    assert 4 <= older < newest

    # The folder's checkpoints are in the bucket, each whole and as its marker says; older ones are gone.
    assert not list((run / "checkpoints").glob("step-*"))
    listed = {name.split("/")[3] for name in server.held(f"{key}/checkpoints/")}
    assert listed == {"sft", f"step-{older:06d}", f"step-{newest:06d}"}
    folder = f"{key}/checkpoints/step-{newest:06d}"
    marker_file = json.loads(server.read(f"{folder}/COMMITTED.json"))
    files = marker_file["files"]
    assert {f"{folder}/{name}" for name in files} == set(server.held(folder)) - {f"{folder}/COMMITTED.json"}
    assert {file["rank"] for file in files.values()} == {0, 1}
    for name, file in files.items():
        content = server.read(f"{folder}/{name}")
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"]), name
    assert saved[newest]["bytes"] == sum(file["size"] for file in files.values())

    damaged = next(name for name, file in files.items() if file["rank"] == 1)
    content = bytearray(server.read(f"{folder}/{damaged}"))
    content[len(content) // 2] ^= 1
    server.client.put_object(Bucket=BUCKET, Key=f"{folder}/{damaged}", Body=bytes(content))
    shutil.rmtree(run)
    elsewhere = tmp_path / "elsewhere"
    steps = newest + 3
    arguments = (str(recipe), f"run.output={elsewhere}", f"training.steps={steps}")
    refused = finish(start("run", *arguments), 2)
    assert "already holds a run; continue it with --resume" in " ".join(refused.split())
    finish(start("run", *arguments, "--resume"), 0)
    run = elsewhere / "stored"
    check_ledger(run, steps)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed_from_step"] == older
    assert summary["prompts_consumed"] == steps * BATCH
    assert summary["lost_samples"] == summary["duplicated_samples"] == 0
    events = json_lines(run / "events.jsonl")
    (passed_over,) = (event for event in events if event["kind"] == "checkpoint_not_whole")
    assert passed_over["checkpoint"] == f"checkpoints/step-{newest:06d}"
    assert damaged in passed_over["reason"]
    assert [event["kind"] for event in events].count("fetched") == 1
    # The damaged one is gone from the bucket, unless its step was saved again; the policy counts whole ones.
    again = {event["step"] for event in events[events.index(passed_over) :] if event["kind"] == "stored"}
    kept = {f"step-{step:06d}" for step in sorted({older, *again})[-2:]}
    assert {name.split("/")[3] for name in server.held(f"{key}/checkpoints/")} == {"sft", *kept}
    assert f"step-{steps:06d}" in kept

    # What the run left is there as it is here.
    url = server.url(f"{BUCKET}/{key}")
    copy = fetch_results(url, tmp_path / "copy")
    curves = [path.relative_to(run) for path in (run / "tb").rglob("*") if path.is_file()]
    lines = ("metrics.jsonl", "ledger.jsonl", "events.jsonl", *curves)
    for name in ("config.yaml", "summary.json", "report.html", "teachers.json", *lines):
        assert (copy / name).read_bytes() == (run / name).read_bytes(), name
    # What was appended since the last segment alone is sent, so that all together are as long as the files.
    segments = server.held(f"{key}/segments/")
    assert sum(len(server.read(each)) for each in segments) == sum((run / name).stat().st_size for name in lines)
    here = {path.name: path.read_bytes() for path in (run / "student").iterdir()}
    assert here == {name.rpartition("/")[2]: server.read(name) for name in server.held(f"{key}/student/")}
    finish(start("export", url, "--to", str(tmp_path / "model")), 0)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "report.html" in finish(start("report", url), 0)
    assert_nothing_left(marker)
