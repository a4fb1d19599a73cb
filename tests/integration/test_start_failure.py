"""An engine that cannot start: one attempt, the cause in the run's message, the engine's log in the run folder."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from kdray.config import TinyModel
from kdray.data.tasks import generate_examples
from kdray.models.resolve import build_tiny_model
from kdray.runs.folder import RunFolder
from tests.support.runs import ENGINE, assert_nothing_left, finish, json_lines, of_the_run, start, write_recipe

LACKING = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A workplace with an untrained teacher and student, and prompts."""
    for name, seed in (("teacher", 1), ("student", 2)):
        build_tiny_model(TinyModel(type="tiny", layers=2, width=64, seed=seed), tmp_path / name)
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for example in generate_examples(["last_letters"], 1, 64, seed=3):
            file.write(json.dumps({"question": example.prompt, "answer": example.answer}) + "\n")
    return tmp_path


@pytest.fixture
def broken(models: Path) -> Path:
    """The same, but the teacher's file lacks a tensor: its header is in order, and vLLM finds out as it loads it."""
    weights = models / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    del tensors[LACKING]
    save_file(tensors, weights, metadata={"format": "pt"})
    return models


def test_the_cause_ends_the_message_and_the_log_lies_in_the_run_folder(broken: Path, marker: str) -> None:
    recipe = write_recipe(broken, "broken", data={"heldout_size": 16}, training={"steps": 1, "batch_size": 16})
    output = finish(start("run", str(recipe)), code=1)
    (message,) = [line for line in output.splitlines() if line.startswith("kdray: ")]
    assert message.startswith("kdray: replicas of main did not start: ValueError: "), "and not `in 3 attempts`"
    assert LACKING.removeprefix("model.") in message
    folder = broken / "runs" / "broken"
    assert f"logs: {folder / 'logs'}" in output
    log = (folder / "logs" / "teacher-main.log").read_text()
    assert "Traceback" in log
    assert LACKING.removeprefix("model.") in log
    kinds = [event["kind"] for event in json_lines(folder / "events.jsonl")]
    assert "serving" not in kinds
    assert_nothing_left(marker)


@pytest.mark.full
@pytest.mark.parametrize("at", ["deploying", "loading"])
def test_ctrl_c_while_an_engine_starts_ends_the_run_in_order(models: Path, marker: str, at: str) -> None:
    """Before any engine has a process, and while one loads: 130 within seconds, no trace of C++, nothing left running."""
    recipe = write_recipe(models, at, data={"heldout_size": 16}, training={"steps": 1, "batch_size": 16})
    with (models / "output").open("w+") as log:
        process = start("run", str(recipe), log=log)
        events = models / "runs" / at / "events.jsonl"
        deadline = time.monotonic() + 240

        def come() -> bool:
            if at == "deploying":
                return events.exists() and '"starting"' in events.read_text()
            return any(name in title for title in map(_command, of_the_run(marker)) for name in ENGINE)

        while not come():
            assert process.poll() is None, (models / "output").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        finish(process, 130, timeout_s=150)
        took = time.monotonic() - asked
    output = (models / "output").read_text()
    assert "interrupted: stopped before there was anything new to save" in output
    assert not [line for line in output.splitlines() if "Stack trace" in line or "Traceback" in line], output[-6000:]
    assert "serving" not in [event["kind"] for event in json_lines(events)]
    assert_nothing_left(marker)
    RunFolder(events.parent).check_free()
    assert took < 100, f"{took:.0f} s"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
