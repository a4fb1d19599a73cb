"""An engine that cannot start: one attempt, the cause in the run's message, the engine's log in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kdray.config import TinyModel
from kdray.data.tasks import generate_examples
from kdray.models.resolve import build_tiny_model
from tests.support.runs import assert_nothing_left, finish, json_lines, start, write_recipe

LACKING = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A workplace whose teacher's file lacks a tensor: its header is in order, and vLLM finds out as it loads it."""
    for name, seed in (("teacher", 1), ("student", 2)):
        build_tiny_model(TinyModel(type="tiny", layers=2, width=64, seed=seed), tmp_path / name)
    weights = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    del tensors[LACKING]
    save_file(tensors, weights, metadata={"format": "pt"})
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for example in generate_examples(["last_letters"], 1, 64, seed=3):
            file.write(json.dumps({"question": example.prompt, "answer": example.answer}) + "\n")
    return tmp_path


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
