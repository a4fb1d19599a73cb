"""`kdray capture` as a user starts it: killed with real engines, gone on with, and trained from with no teacher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kdray.capturing.format import read_manifest, signals
from kdray.config import TinyModel
from kdray.models.resolve import build_tiny_model
from tests.unit.kdray.teachers.test_openai import serving, written

PROMPTS, SAMPLES = 300, 4
SOME_ANSWERS_BYTES = 50_000
"""Size of a journal that holds some of them, and far from all."""
STEPS, BATCH = 8, 32


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher that knows the task a little, and another of the same name elsewhere."""
    root = tmp_path_factory.mktemp("capture")
    train = {"steps": 60, "batch_size": 32, "difficulty": 1}
    build_tiny_model(TinyModel(type="tiny", layers=2, width=64, seed=1, train=train), root / "teacher")
    build_tiny_model(TinyModel(type="tiny", layers=2, width=64, seed=3), root / "elsewhere" / "teacher")
    return root


def _recipe(workplace: Path, name: str, **sections: Any) -> Path:
    tree: dict[str, Any] = {
        "run": {"name": name, "output": str(workplace / "runs")},
        "data": {"prompts": {"type": "task", "size": PROMPTS}, "heldout_size": 32},
        "student": {"model": {"type": "tiny", "layers": 1, "width": 32, "seed": 2}},
        "teachers": {"main": {"model": str(workplace / "teacher"), "kv_cache_gib": 0.2}},
        # Without the student's own ids in the support, what a student beside the teacher records is the teacher's alone.
        "rollout": {"alpha": 1.0, "max_new_tokens": 8, "student_top_k": 0, "pool": {"kv_cache_gib": 0.1}},
        "loss": {"type": "forward_kl"},
        "training": {"steps": STEPS, "batch_size": BATCH, "learning_rate": 3e-3},
    }
    for section, values in sections.items():
        tree[section] = values if section == "teachers" else tree.get(section, {}) | values
    path = workplace / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts a command whose processes can be found by what they inherit; ends what a failed test left."""
    marker = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("KDRAY_TEST_MARKER", marker)
    started: list[subprocess.Popen[str]] = []

    def command(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield command
    for process in started:
        if process.poll() is None:
            process.kill()
    _end_marked(marker)


def _marked(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("KDRAY_TEST_MARKER") == marker:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _end_marked(marker: str) -> None:
    for process in _marked(marker):
        process.kill()


def _check_nothing_left(marker: str) -> None:
    """Replicas and engines end with the command, even where it had no time to say so; Ray's own agents take a minute more."""
    deadline = time.monotonic() + 30
    while left := [process for process in _marked(marker) if not process.name().endswith("Agent")]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)


def _finish(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == code, output[-6000:]
    return " ".join(output.split())


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _asked(folder: Path) -> list[int]:
    """Answers asked of the teacher by every start, from the event log."""
    starts: list[int] = []
    for event in _lines(folder / "events.jsonl"):
        if event["kind"] == "start":
            starts.append(0)
        if event["kind"] == "asked":
            starts[-1] += event["answers"]
    return starts


def _rows(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(shard) for shard in folder.glob("*.parquet")])


@pytest.mark.full
def test_killed_in_mid_run_no_answer_is_lost_or_asked_for_twice(workplace: Path, start: Any) -> None:
    slow = {"main": {"model": str(workplace / "teacher"), "kv_cache_gib": 0.2, "max_num_seqs": 16}}
    recipe = str(_recipe(workplace, "killed", teachers=slow, rollout={"samples_per_prompt": SAMPLES, "alpha": 1.0}))
    folder = workplace / "runs" / "killed" / "capture"
    process = start("capture", recipe)
    deadline = time.monotonic() + 500
    journal = folder / "journal"
    while not (journal.exists() and journal.stat().st_size > SOME_ANSWERS_BYTES):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _check_nothing_left(os.environ["KDRAY_TEST_MARKER"])
    assert not list(folder.glob("*.parquet")), "it had ended before it was killed"
    (asked,) = _asked(folder)

    output = _finish(start("capture", recipe), 0)
    total = PROMPTS * SAMPLES
    second = [event for event in _lines(folder / "events.jsonl") if event["kind"] == "start"][1]
    held = second["held"]
    assert 0 < held < total
    assert second["missing"] == total - held
    # Teacher calls, start by start: the second asks for what is missing and nothing else.
    assert _asked(folder) == [asked, total - held]
    assert 0 <= asked - held <= 2 * 16
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest.rollouts, manifest.asked, manifest.complete) == (total, asked + total - held, True)
    assert f"asked_again │ {asked - held}" in output
    # Every prompt's every sample once, counted from the shards.
    table = _rows(folder)
    prompts = table.column("prompt_id").to_pylist()
    assert Counter(prompts) == dict.fromkeys(set(prompts), SAMPLES)
    assert len(set(prompts)) == PROMPTS
    assert sorted(table.column("sample_id").to_pylist()) == list(range(total))
    assert len(set(table.column("seed").to_pylist())) == len(set(table.column("key").to_pylist())) == total
    assert signals(folder) == {"text", "sampled", "top_k"}

    # A third start has nothing to ask, and starts no engine for it.
    assert "Started Serve" in output
    assert "Started Serve" not in _finish(start("capture", recipe), 0)
    assert _asked(folder) == [asked, total - held, 0]
    _refusals(workplace, start, folder)


def _refusals(workplace: Path, start: Any, folder: Path) -> None:
    """Another teacher of the same name, another way of asking, another model required: refused, each with the reason."""
    before = {file: file.read_bytes() for file in folder.iterdir()}
    other = {"main": {"model": str(workplace / "elsewhere" / "teacher"), "kv_cache_gib": 0.2}}
    rollout = {"samples_per_prompt": SAMPLES, "alpha": 1.0}
    recipe = _recipe(workplace, "killed", teachers=other, rollout=rollout)
    assert "its answers were asked with weights=" in _finish(start("capture", str(recipe)), 2)
    recipe = _recipe(workplace, "killed", rollout=rollout | {"max_new_tokens": 9})
    assert "asked with max_new_tokens=8, not 9" in _finish(start("capture", str(recipe)), 2)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    captured = {"type": "capture", "path": str(folder)}
    for model, code in (("teacher", 0), ("elsewhere/teacher", 2)):
        recipe = _recipe(workplace, "required", teachers={"main": captured | {"model": str(workplace / model)}})
        output = _finish(start("validate", str(recipe)), code)
    assert "the capture was made by teacher, whose weights are others" in output


def test_an_endpoint_is_called_again_for_nothing_but_what_was_in_flight(workplace: Path, start: Any) -> None:
    """Counted by the endpoint itself, over a `kill -9`. It takes no cluster."""

    def reply(number: int, body: dict[str, Any]) -> Any:
        time.sleep(0.02)
        return written(f"answer to {body['messages'][-1]['content'][:4]}")

    with serving(reply) as server:
        far = {
            "type": "openai",
            "base_url": f"http://127.0.0.1:{server.port}/v1",
            "model": "m",
            "api_key_env": None,
            "max_concurrency": 4,
        }
        rollout = {"samples_per_prompt": SAMPLES, "alpha": 1.0, "max_new_tokens": 24}
        recipe = str(_recipe(workplace, "far", teachers={"main": far}, rollout=rollout, loss={"type": "sequence"}))
        folder = workplace / "runs" / "far" / "capture"
        process = start("capture", recipe)
        deadline = time.monotonic() + 100
        while len(server.seen) < 100:
            assert process.poll() is None, process.communicate()[0][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = len(server.seen)
        _finish(start("capture", recipe), 0)
    # The address is asked for one token at every start, to see whether it answers.
    calls = Counter(
        (call.body["messages"][-1]["content"], call.body["seed"]) for call in server.seen if call.body["max_tokens"] > 1
    )
    total = PROMPTS * SAMPLES
    assert len(calls) == total
    again = sum(count - 1 for count in calls.values())
    assert max(calls.values()) <= 2
    assert again <= 4, "more was asked for again than the endpoint was working on"
    held = [event for event in _lines(folder / "events.jsonl") if event["kind"] == "start"][1]["held"]
    # All that had arrived was kept: of the calls before the kill, those in flight alone are missing.
    assert before - 1 - 4 <= held <= before - 1
    assert sum(call.body["max_tokens"] > 1 for call in server.seen[before:]) == total - held
    table = _rows(folder)
    assert sorted(table.column("sample_id").to_pylist()) == list(range(total))
    assert signals(folder) == {"text"}
    assert read_manifest(folder).fingerprint is None  # type: ignore[union-attr]


@pytest.mark.full
def test_a_model_in_the_process_is_recognised_by_its_canary(workplace: Path, start: Any) -> None:
    local = {"type": "hf", "model": str(workplace / "teacher"), "batch_size": 64}
    recipe = str(_recipe(workplace, "local", teachers={"main": local}, data={"prompts": {"type": "task", "size": 40}}))
    folder = workplace / "runs" / "local" / "capture"
    _finish(start("capture", recipe), 0)
    assert _asked(folder) == [40]
    _finish(start("capture", recipe, "data.prompts.size=50", "--reuse"), 0)
    assert _asked(folder) == [40, 10]
    assert _rows(folder).num_rows == 50
    # Where sequences are shorter, as much of the canary as fits is compared.
    _finish(start("capture", recipe, "data.max_prompt_tokens=40", "run.seed=5"), 0)
    assert _asked(folder)[2:] == [40]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["fingerprint"]["scores"] = [score - 0.5 for score in manifest["fingerprint"]["scores"]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    output = _finish(start("capture", recipe, "run.seed=6"), 2)
    assert "holds answers of another teacher: its canary no longer matches" in output
    assert _asked(folder)[3:] == [0]


@pytest.mark.full
@pytest.mark.parametrize("signal_kind", ["support", "hidden"])
def test_the_same_seed_gives_the_same_curve_from_the_capture_and_from_the_teacher(
    workplace: Path, start: Any, signal_kind: str
) -> None:
    rollout = {"teacher_signal": signal_kind, "teacher_top_k": 16}
    live = _recipe(workplace, f"live-{signal_kind}", rollout=rollout)
    _finish(start("capture", str(live)), 0)
    # The capture lies inside the run folder, and is no run.
    folder = workplace / "runs" / f"live-{signal_kind}" / "capture"
    assert _asked(folder) == [PROMPTS]
    _finish(start("run", str(live)), 0)
    captured = {"type": "capture", "path": str(folder), "model": str(workplace / "teacher")}
    # Several steps ahead: what a teacher alone wrote does not age.
    offline = _recipe(workplace, f"offline-{signal_kind}", teachers={"main": captured}, rollout=rollout | {"max_staleness": 3})
    _finish(start("run", str(offline)), 0)
    assert _asked(folder) == [PROMPTS], "the teacher was asked again"
    curves = [
        [line["loss"] for line in _lines(workplace / "runs" / f"{name}-{signal_kind}" / "metrics.jsonl")]
        for name in ("live", "offline")
    ]
    assert len(curves[0]) == STEPS
    assert curves[0][-1] < 0.8 * curves[0][0]
    gap = max(abs(one - other) / one for one, other in zip(*curves, strict=True))
    print(f"{signal_kind}: {curves[0][0]:.4f} to {curves[0][-1]:.4f}, largest relative difference {gap:.2g}")
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
