"""Pictures of docs/performance.md, from the files that the benchmarks have written: `python -m benchmarks.figures`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.measured import RESULTS

PROCESSES = {
    "engine": "engine: drawing, scores, recording",
    "ray::RayTrainWorker": "rank: forward, backward, update",
    "ray::ServeReplica": "replica: requests, records, Arrow",
    "driver": "driver: loop, ledger, batches",
}
WAITS = {"wait_rollout_s": "waits for rollouts", "train_step_s": "a rank trains", "wait_sync_s": "waits for the weights"}


def parts_of_a_step(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds of a step's parts, by the driver's clock and as CPU time of the processes. Args: found: of `step_costs`."""
    clock = {label: found["waits_s"][name] for name, label in WAITS.items()}
    clock["the loop's own"] = found["wall_s"] - sum(clock.values())
    cpu = {label: found["cpu_s"][name] for name, label in PROCESSES.items()}
    cpu["all others"] = sum(found["cpu_s"].values()) - sum(cpu.values())
    return {"by the clock": clock, "CPU time,\nall processes": cpu}


def draw_step(found: Mapping[str, Any], target: Path) -> None:
    """A bar for the clock and one for CPU time, each divided into its parts."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 2.6))
    colours = iter(plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    for place, (bar, parts) in enumerate(parts_of_a_step(found).items()):
        left = 0.0
        for label, seconds in parts.items():
            axis.barh(bar, seconds, left=left, color=next(colours), label=f"{label}, {seconds:.2f} s")
            left += seconds
        axis.text(left + 0.01, place, f"{left:.2f} s", va="center")
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set_xlabel(f"seconds a step, mean of {found['steps']}; {found['machine']}, {found['date']}")
    figure.legend(fontsize=7, loc="outside right upper")
    save(figure, target)


def draw_growth(found: Mapping[str, Any], target: Path) -> None:
    """What a step's parts cost as each of their sizes grows, from zero, so that what is flat looks flat."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found["growth"]), figsize=(3.0 * len(found["growth"]), 2.8))
    for axis, (name, each) in zip(axes, found["growth"].items(), strict=True):
        sizes, costs = [int(size) for size in each["by_size"]], list(each["by_size"].values())
        axis.plot(sizes, costs, "o-")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_ylim(0.0, 1.15 * max(costs))
        axis.set_title(name, fontsize=9)
        axis.set_ylabel(each["unit"], fontsize=7)
    save(figure, target)


def save(figure: Any, target: Path) -> None:
    # Ids that do not change from one drawing to the next, and text that can be searched.
    figure.set_layout_engine("constrained")
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "performance", "svg.fonttype": "none"})
    for name, draw in (("step_costs", draw_step), ("step_growth", draw_growth)):
        draw(json.loads((RESULTS / f"{name}.json").read_text()), RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
