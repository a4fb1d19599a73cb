"""One student of two tasks under each teacher alone, routed and ensembled: one table.

`python -m benchmarks.several_teachers [FOLDER]` runs configs/three_teachers.yaml once per way of sharing (one to three
minutes each on two cores) and writes several_teachers.md and .json into FOLDER (default: benchmarks/results). Runs already in
runs/ under the way's name are taken as they are, so that an interrupted table can be continued.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

RECIPE = Path("configs/three_teachers.yaml")
ROUTE = {"type": "route", "map": {"last_letters": "letters", "coin_flip": "coins"}}
WAYS: dict[str, dict[str, Any]] = {
    "letters alone": {"only": ["letters"]},
    "coins alone": {"only": ["coins"]},
    "both (generalist) alone": {"only": ["both"]},
    "two specialists, routed": {"only": ["letters", "coins"], "teachers": ROUTE},
    "three, equal weights": {"teachers": {"type": "ensemble"}},
    "three, weights by domain": {},
    "three, by confidence": {"teachers": {"type": "ensemble", "confidence_temperature": 0.1}},
}
COMMON = ["training.checkpoint_every=0"]


def _recipe(way: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe with the teachers and the sharing of one way."""
    tree = yaml.safe_load(RECIPE.read_text())
    tree["run"]["name"] = name
    only = way.get("only", list(tree["teachers"]))
    tree["teachers"] = {teacher: tree["teachers"][teacher] for teacher in only}
    if "teachers" in way:
        tree["rollout"]["teachers"] = way["teachers"]
    if len(only) == 1:
        del tree["rollout"]["teachers"]
    return tree


def _run(name: str, way: dict[str, Any]) -> dict[str, Any]:
    slug = "teachers-" + "".join(c if c.isalnum() else "-" for c in name)
    folder = Path("runs") / slug
    if not (folder / "summary.json").exists():
        recipe = Path("runs") / f"{slug}.yaml"
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(yaml.safe_dump(_recipe(way, slug)))
        command = [sys.executable, "-m", "cluster.cli", "run", str(recipe), *COMMON]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    return {"name": name, **{key: summary[key] for key in ("before", "after", "wall_s", "trained_tokens", "tokens_scored")}}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for name, way in WAYS.items():
        results.append(_run(name, way))
        print(name, {key: round(value, 4) for key, value in results[-1]["after"].items()}, flush=True)
    date = datetime.now(UTC).date().isoformat()
    columns = ("exact_match", "exact_match/last_letters", "exact_match/coin_flip")
    before = results[0]["before"]
    rows = [
        f"| {r['name']} | " + " | ".join(f"{100 * r['after'][c]:.1f}" for c in columns) + f" | {r['wall_s']:.0f} |"
        for r in [{"name": "before (SFT student)", "after": before, "wall_s": 0}, *results]
    ]
    text = [
        f"Last letters and coin flips in equal shares, the same SFT student and steps, one seed, held out, {date}. "
        "`python -m benchmarks.several_teachers`.",
        "",
        "| teachers | exact match % | last letters % | coin flip % | wall s |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    (folder / "several_teachers.md").write_text("\n".join(text))
    (folder / "several_teachers.json").write_text(json.dumps({"date": date, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
