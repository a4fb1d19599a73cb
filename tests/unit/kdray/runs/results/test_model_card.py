"""The card of an exported model, from a run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kdray.config import Config
from kdray.runs.folder import RunFolder
from kdray.runs.results.model_card import write_card

SUMMARY: dict[str, Any] = {
    "verdict": "Distillation raised exact match from 10.0% to 60.0%.",
    "before": {"exact_match": 0.1, "reverse_kl": 2.0},
    "after": {"exact_match": 0.6, "reverse_kl": 0.25, "note": None},
    "teacher": {"exact_match": 0.9},
    "control": {"exact_match": 0.25, "method": "sft", "trained_tokens": 5120345},
    "intervals": {"after": {"exact_match": [0.55, 0.65]}},
    "trained_tokens": 12345,
    "versions": {"kdray": "0.1.0"},
}


def card_of(
    tmp_path: Path, student: Any, step: int | None = None, loss: dict[str, Any] | None = None, **training: Any
) -> tuple[dict[str, Any], str]:
    """The card's metadata and its text."""
    config = Config.model_validate(
        {
            "run": {"name": "tale", "output": str(tmp_path / "runs")},
            "data": {"prompts": {"type": "task"}},
            "student": {"model": student},
            "teachers": {"wise": {"model": "big/teacher"}},
            "training": training,
            **({} if loss is None else {"loss": loss, "rollout": {"samples_per_prompt": 2}}),
        }
    )
    run = RunFolder.create(config)
    run.write_summary(SUMMARY)
    model = tmp_path / "model"
    model.mkdir()
    write_card(run, model, step)
    _, data, text = (model / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(data), text


def test_it_tells_where_the_model_comes_from_and_what_was_measured(tmp_path: Path) -> None:
    data, text = card_of(tmp_path, "small/student", lora={"rank": 8, "alpha": 16}, sft={"steps": 5})
    assert data == {"base_model": "small/student", "library_name": "transformers", "tags": ["distillation", "kdray"]}
    lines = text.strip().splitlines()
    assert lines[0] == "# tale"
    assert "`small/student`, distilled from `wise` by kdray." in lines
    assert "- 5 supervised steps before them" in lines
    assert "- an adapter of rank 8, merged here; by itself in `adapter/`" in lines
    assert SUMMARY["verdict"] in lines
    start = lines.index("| metric, with 95% interval | before | after | control | teacher |")
    assert lines[start + 1 : start + 7] == [
        "|---|---|---|---|---|",
        "| exact_match | 0.1 | 0.6 (0.55 to 0.65) | 0.25 | 0.9 |",
        "| reverse_kl (nats/token) | 2 | 0.25 |  |  |",
        "| method |  |  | sft |  |",
        "| trained_tokens |  |  | 5,120,345 |  |",
        "",
    ]
    assert "reward" not in text
    assert lines[-1] == "Trained on 12,345 response tokens, with kdray 0.1.0."


def test_it_tells_no_place_on_a_machine_and_no_results_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "private" / "student").mkdir(parents=True)
    data, text = card_of(tmp_path, str(tmp_path / "private" / "student"), step=40, steps=100)
    assert "base_model" not in data
    assert "private" not in text
    assert "`student`, distilled from `wise` by kdray. This is the checkpoint of step 40 of 100." in text
    assert "held-out" not in text


def test_it_tells_of_a_reward(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, "small/student", loss={"reward_weight": 0.5}, finetune={"steps": 7})
    assert "`small/student`, distilled from `wise` by kdray." in text
    reward = "- reward: the task's own verdict on each response, over that on the others to its prompt; weight"
    assert f"{reward} 0.5, distillation's 1\n" in text
    assert "- 7 supervised steps after them\n" in text


def test_it_tells_of_a_reward_alone(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, "small/student", loss={"reward_weight": 1.0, "distillation_weight": 0.0})
    assert "`small/student`, trained on a reward, beside `wise` as its teacher, by kdray." in text
    assert "distilled" not in text
    assert "weight 1, distillation's 0\n" in text
