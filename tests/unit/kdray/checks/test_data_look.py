"""The dry look at a recipe's data: facts, lengths, and rows whose targets are seen with and without colour."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from kdray.checks.data_look import Look, look, show
from kdray.config import Config, parse_config
from kdray.models.random_models import byte_tokenizer

THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: <think>"
    "{% endif %}"
)


def talk(number: int) -> dict[str, Any]:
    texts = ("user", f"{number}+1="), ("assistant", str(number + 1)), ("user", "and 2?"), ("assistant", str(number + 3))
    return {"messages": [{"role": role, "content": text} for role, text in texts], "id": number}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A recipe whose student is a folder with nothing but a tokenizer: no more is read."""
    byte_tokenizer().save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(talk(number)) + "\n" for number in range(10)))
    return parse_config(
        {
            "run": {"name": "x"},
            "data": {"prompts": {"type": "file", "path": str(tmp_path / "chat.jsonl")}},
            "student": {"model": str(tmp_path / "student")},
            "teachers": {"main": {"model": str(tmp_path / "student")}},
        }
    )


def with_data(config: Config, **values: Any) -> Config:
    tree = config.model_dump(mode="json")
    tree["data"] |= values
    return parse_config(tree)


def printed(found: Look, **options: Any) -> str:
    out = StringIO()
    show(found, Console(file=out, width=200, **options))
    return out.getvalue()


def test_facts_lengths_and_rows(config: Config) -> None:
    found = look(config, rows=2)
    assert found.lines[0].startswith("10 rows, chat messages: prompts from 'messages'; answers are the assistant's last turns")
    assert "held out: 2 of 10 prompts, a fifth, since data.heldout_size is not set" in found.lines
    assert "answers: of 10 prompts, 10 have one to train on, 10 a text to grade against" in found.lines
    assert found.lines[-1].startswith(
        "chat template: the student tokenizer's; which tokens are the assistant's is found by rendering"
    )
    (grading,) = (line for line in found.lines if line.startswith("grading: "))
    assert "set data.grader, such as exact or last_number" in grading
    graded = look(with_data(config, grader="last_number"))
    assert [line for line in graded.lines if line.startswith("grading: ")] == ["grading: data.grader.type=last_number"]
    assert found.lengths["answers"] == {"shortest": 2, "median": 2, "90%": 3, "99%": 3, "longest": 3}
    first, second = found.samples
    assert (first.place.endswith("chat.jsonl line 1"), second.place.endswith("chat.jsonl line 2")) == (True, True)
    assert "".join(first.tokens) == byte_tokenizer().apply_chat_template(talk(0)["messages"], tokenize=False).rstrip("\n")
    targets = [token for token, counts in zip(first.tokens, first.is_target, strict=True) if counts]
    assert targets == ["3", "<|im_end|>"]


def test_targets_are_seen_without_colour_and_with_it(config: Config) -> None:
    every = look(with_data(config, turns="all"), rows=1)
    plain = printed(every)
    assert "⟦1·<|im_end|>⟧" in plain
    assert "⟦3·<|im_end|>⟧" in plain
    assert "\x1b" not in plain
    coloured = printed(every, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m⟦3" in coloured


def test_what_is_dropped_and_what_would_be_refused(config: Config, tmp_path: Path) -> None:
    short = look(with_data(config, max_prompt_tokens=50, prompts={"type": "jsonl", "path": mixed(tmp_path)}))
    assert any(
        "too long: 2 prompts have more than data.max_prompt_tokens=50 tokens: a run refuses them" in line
        for line in short.lines
    )
    dropped = with_data(config, max_prompt_tokens=50, too_long="drop", prompts={"type": "jsonl", "path": mixed(tmp_path)})
    assert any(line.endswith("tokens: left out") for line in look(dropped).lines)
    (tmp_path / "thinking.jinja").write_text(THINKING)
    thinking = look(with_data(config, chat_template_file=str(tmp_path / "thinking.jinja")))
    (line,) = [line for line in thinking.lines if "would be refused" in line]
    assert "10 rows, the first:" in line
    assert "does not continue its generation prompt" in line
    assert thinking.samples[0].tokens[-1].endswith(">"), "the prompt is shown where the answer cannot be"
    assert not any(thinking.samples[0].is_target)


def mixed(tmp_path: Path) -> str:
    rows = [{"prompt": "1+1=", "answer": 2}] * 6 + [{"prompt": "long " * 40, "answer": 2}] * 2
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_starts_nothing(config: Config, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    known = set(sys.modules)
    result = CliRunner().invoke(app, ["data", str(recipe), "--rows", "1"])
    assert result.exit_code == 0, result.output
    assert "⟦3·<|im_end|>⟧" in result.output
    assert not {"ray", "vllm", "deepspeed"} & (set(sys.modules) - known)
    gone = CliRunner().invoke(app, ["data", str(recipe), "data.prompts.path=gone.jsonl"])
    assert gone.exit_code == 2
    assert "data.prompts.path=gone.jsonl: no such file" in gone.stderr


def test_the_short_form_is_one_line_each(config: Config) -> None:
    *lengths, example = look(config).short()
    assert lengths[0].startswith("tokens of prompts: shortest ")
    assert example.endswith("⟦3<|im_end|>⟧")
    assert not any("\n" in line for line in [*lengths, example])
