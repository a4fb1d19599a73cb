"""Whole runs of real architectures: supervised phase, distillation by two ranks under ZeRO 2, updates, export, reload.

    python -m benchmarks.family_runs [--only NAME ...] [--again] [--out FILE]
    python -m benchmarks.family_runs --table [--out FILE]     # writes the table of docs/models.md from the file

Tiny pairs of `tests/support/families.py`, through `kdray run`. A run ends with 0 only if replicas hold the trainer's student at
the start and after every update, and if the export, loaded anew, is the student that was trained. Results are kept as JSON
lines; a pair that is in the file and passed is not run again, with `--again` only if it was measured on this commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import kept_rows
from kdray.runs.folder import read_lines
from tests.support.families import Family, family

PAIRS: dict[str, dict[str, Any]] = {
    "Qwen 3": {},
    "Gemma 2": {},
    "Qwen 3 MoE > Qwen 3": {},
    "Qwen 3 MoE": {},
    "Qwen 2, int4 teacher": {},
    "Llama 3": {"tensor_parallel_size": 2},
}
"""Pairs, with further settings of the teacher's engine."""

RESULTS = kept_rows.ROOT / "benchmarks" / "results" / "family_runs.jsonl"
DOCS = kept_rows.ROOT / "docs" / "models.md"
MARK = "whole runs"


def write_recipe(pair: Family, engine: dict[str, Any], folder: Path) -> Path:
    """Models, prompts and recipe of a run."""
    spec = pair.spec(folder)
    rows = [
        {"prompt": f"{a} apples and {b} pears make", "answer": f" {a + b} pieces of fruit."}
        for a in range(12)
        for b in range(6)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = {
        "run": {"name": "run", "output": str(folder)},
        "data": {"prompts": {"type": "jsonl", "path": str(folder / "prompts.jsonl")}, "heldout_size": 16},
        "student": {"model": spec.student},
        "teachers": {"main": {"model": spec.model, "kv_cache_gib": 0.1, "max_num_seqs": 16, "num_cpus": 1} | engine},
        "rollout": {"max_new_tokens": 24},
        "training": {
            "steps": 3,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "ranks": 2,
            "zero_stage": 2,
            "sft": {"steps": 2, "batch_size": 8, "learning_rate": 1e-3},
        },
        "evaluation": {"prompts": 8, "control": False},
        "cluster": {"local_cpus": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def measure(name: str) -> kept_rows.Row:
    """Result of a pair's run; the end of its output if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [sys.executable, "-m", "cluster.cli", "run", str(write_recipe(family(name), PAIRS[name], folder))]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        row: kept_rows.Row = {"ok": done.returncode == 0, "exit": done.returncode, "engine": PAIRS[name]}
        row["seconds"] = round(time.monotonic() - started)
        if done.returncode:
            return row | {"output": (done.stdout + done.stderr)[-1500:]}
        metrics = read_lines(folder / "run" / "metrics.jsonl")
        summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
        for column in ("rollout_gap", "parity_gap"):
            row[column] = max(line[column] for line in metrics if line.get(column) is not None)
        return row | {when: summary[when]["reverse_kl"] for when in ("before", "after")}


def table(rows: dict[str, kept_rows.Row]) -> str:
    """Markdown of the results, in the order of the pairs."""
    lines = [
        "| teacher > student | exit code | `rollout_gap` | `parity_gap` | reverse KL, before and after 3 steps |",
        "|---|---|---|---|---|",
    ]
    for name, engine in PAIRS.items():
        row, shown = rows.get(name), ", ".join([name, *(f"`{key}: {value}`" for key, value in engine.items())])
        if row is None or not row["ok"]:
            lines.append(f"| {shown} | {'not run yet' if row is None else row['exit']} | | | |")
        else:
            gaps = f"{row['rollout_gap']:.1e} | {row['parity_gap']:.1e}"
            lines.append(f"| {shown} | {row['exit']} | {gaps} | {row['before']:.2f}, {row['after']:.2f} |")
    return "\n".join([*lines, "", kept_rows.origin(rows.values())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--again", action="store_true", help="run also those that were measured on another commit")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        kept_rows.write_between(DOCS, MARK, table(kept_rows.read(given.out)))
    else:
        kept_rows.measure(given.only, measure, given.out, again=given.again)


if __name__ == "__main__":
    main()
