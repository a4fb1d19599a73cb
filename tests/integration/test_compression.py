"""A student cut from its teacher is distilled, exported in 8 bits and measured beside itself, through the commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from kdray.models.quantization import is_quantized, size_bytes


def _kdray(*arguments: object) -> str:
    """What the command printed; COLUMNS keeps tables on one line a row."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "240"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
def test_a_pruned_student_is_distilled_exported_in_int8_and_measured(tmp_path: Path) -> None:
    teacher = {"type": "tiny", "layers": 3, "width": 64, "train": {"steps": 150, "difficulty": 1}}
    tree = {
        "run": {"name": "compressed", "output": str(tmp_path / "runs")},
        "data": {"prompts": {"type": "task", "difficulty": 1, "size": 512}, "heldout_size": 48},
        "student": {"model": {"type": "pruned", "source": teacher, "layers": 2, "intermediate_size": 96}},
        "teachers": {"main": {"model": teacher, "kv_cache_gib": 0.2}},
        "rollout": {"max_new_tokens": 8},
        "training": {"steps": 12, "batch_size": 32, "learning_rate": 3e-3},
    }
    recipe = tmp_path / "compressed.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    _kdray("run", recipe)
    run = tmp_path / "runs" / "compressed"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["reverse_kl"] < 0.8 * summary["before"]["reverse_kl"]
    config = AutoConfig.from_pretrained(run / "student")
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (2, 96, 64)

    quantised = tmp_path / "int8"
    assert str(quantised) in _kdray("export", run, "--to", quantised, "--quantize", "int8")
    assert is_quantized(quantised)
    assert size_bytes(quantised) < 0.5 * size_bytes(run / "student")

    cells = [[cell.strip() for cell in line.split("│")] for line in _kdray("eval", run, "--student", quantised).splitlines()]
    rows = {row[1]: row[2:4] for row in cells if len(row) == 5}
    for key in ("reverse_kl", "forward_kl"):
        # A value and its interval, which is that of 48 prompts: a token drawn otherwise changes the rest of its response.
        (plain, low, high), (rounded, *_) = ([float(number) for number in re.findall(r"[\d.]+", cell)] for cell in rows[key])
        assert plain == pytest.approx(summary["after"][key], rel=0.05)
        assert rounded != plain
        assert low <= rounded <= high, "8 bits show, and hardly"
    assert not list((tmp_path / "runs" / ".models").glob(".plain-*"))
