"""Memory of every process over a long run: `python -m tests.soak.soak --minutes 20`.

A run on real engines with checkpoints, evaluations and weight updates, on a Ray of its own. Each process's own memory (USS:
what would be free without it; shared pages are nobody's) is read every few seconds; the verdict compares an early stretch with
the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from tests.support.runs import finish, json_lines, of_the_run, start, write_recipe

_PERIOD_S = 5.0
_STRETCH = 0.2
"""Share of the run in each of the stretches that are compared; one such share before the first is for warming up."""
GROWTH_MIB = 12.0
GROWTH = 0.03
"""A process is flat if it grew by less than either of these from the early stretch to the last one."""

_ROLES = {
    "driver": "cluster.cli run",
    "engine": "VLLM::EngineCore",
    "replica": "ray::ServeReplica:kdray-",
    "rank": "ray::RayTrainWorker",
    "orders": "ray::Mailbox",
    "weights": "ray::WeightStore",
    "registry": "ray::TeacherRegistry",
    "board": "ray::ScalingBoard",
    "Serve's controller": "ray::ServeController",
    "Train's controller": "ray::TrainController",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}


def roles(marker: str) -> dict[str, float]:
    """Own memory of the run's processes, MiB; the sum where a role has several."""
    found: dict[str, float] = defaultdict(float)
    for process in of_the_run(marker):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            title = " ".join(process.cmdline())
            role = next((role for role, sign in _ROLES.items() if sign in title), None)
            if role is not None:
                found[role] += process.memory_full_info().uss / 2**20
    return found


def soak(folder: Path, minutes: float, marker: str) -> tuple[dict[str, list[float]], int]:
    """Own memory by role, a value every few seconds from the first training step on; and the steps that the run trained."""
    from .conftest import make_workplace

    recipe = write_recipe(
        make_workplace(folder),
        "soak",
        # More steps than there is time for: the run is asked to stop.
        training={"steps": 10**6, "batch_size": 32, "learning_rate": 1e-4, "checkpoint_every": 50},
        evaluation={"every": 100},
        cluster={"health_check_period_s": 2},
    )
    run = folder / "runs" / "soak"
    held: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryFile("w+") as log:
        process = start("run", str(recipe), log=log)
        while not (run / "metrics.jsonl").exists() or not json_lines(run / "metrics.jsonl"):
            if process.poll() is not None:
                log.seek(0)
                raise AssertionError(f"the run ended with {process.returncode}: {log.read()[-4000:]}")
            time.sleep(1)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            assert process.poll() is None, f"the run ended with {process.returncode}"
            for role, size in roles(marker).items():
                held[role].append(size)
            time.sleep(_PERIOD_S)
        process.send_signal(signal.SIGINT)
        finish(process, 130)
    return held, len(json_lines(run / "metrics.jsonl"))


def stretches(values: list[float]) -> tuple[float, float]:
    """Medians of the early stretch and of the last one."""
    share = max(1, int(len(values) * _STRETCH))
    return statistics.median(values[share : 2 * share]), statistics.median(values[-share:])


def is_flat(early: float, last: float) -> bool:
    return last - early < max(GROWTH_MIB, GROWTH * early)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--to", type=Path, help="JSON file for the series")
    given = parser.parse_args()
    marker = os.environ["KDRAY_TEST_MARKER"] = f"soak-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        held, steps = soak(Path(folder), given.minutes, marker)
    if given.to is not None:
        given.to.write_text(json.dumps({"steps": steps, "period_s": _PERIOD_S, "mib": held}))
    print(f"{steps} steps in {given.minutes:g} minutes; MiB of each role's own memory, early and last stretch")
    growing = []
    for role, values in sorted(held.items()):
        early, last = stretches(values)
        print(f"{role:20s} {early:9.1f} {last:9.1f} {last - early:+7.1f}")
        if not is_flat(early, last):
            growing.append(role)
    assert not growing, f"not flat: {growing}"


if __name__ == "__main__":
    main()
