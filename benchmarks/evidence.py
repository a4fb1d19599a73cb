"""Ways of distilling on answers of 59 and 69 tokens, several seeds each, by real runs: the numbers behind docs/evidence.md.

    python -m benchmarks.evidence --seeds 0                      # one seed of every cell, one after another
    python -m benchmarks.evidence --seeds 100 101 102 103 104 --minutes 60
    python -m benchmarks.evidence --table --figure               # rewrite the table and the figure from the files
    python -m benchmarks.evidence_in_process --regime "even start" --seeds 150 --starts       # students that begin alike
    python -m benchmarks.evidence --regimes "even start" --seeds 150 --ways "MiniLLM, rate 3e-4"

A cell is a way, a regime and a seed: one `kdray run` of the regime's recipe. It leaves one JSON file in
benchmarks/results/evidence, and a cell that has its file is skipped, so that a sweep goes on over days. A run that ends with an
error leaves no file and is tried again next time. Seeds below 100 are for exploration, the next ones confirm, and those from
120 on are for what these suggested, and those from 150 on for runs: no two of these are ever averaged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from kdray.runs.results.seeds import mean_interval as over_seeds

RESULTS = Path("benchmarks/results/evidence")
STARTS = Path("runs/.evidence_in_process/starts")
FIGURE = Path("benchmarks/results/evidence.svg")
PAGE = Path("docs/evidence.md")
MARKS = ("<!-- table: benchmarks/evidence.py -->", "<!-- end of table -->")
FIRST_CONFIRMING_SEED = 100
STAGES = {
    "exploring": 0,
    "confirming": FIRST_CONFIRMING_SEED,
    "replicating": 120,
    "run-confirming": 150,
    "run-replicating": 160,
    "two-by-two": 200,
}
"""First seed of each stage; those with runs in their names were announced for runs, the last one for mixing and length
normalisation at 3e-4."""
DECIDING = tuple(STAGES)[1:]
_LOWEST = -100.0
"""Lowest share of the gap that the figure shows: a student that began near its teacher and collapsed is far below."""

COMMON = (
    # Every cell is then reproducible, and no difference between cells comes from staleness.
    "rollout.max_staleness=0",
    "training.checkpoint_every=0",
    "evaluation.control=false",
)


@dataclass(frozen=True)
class Regime:
    """The task, the data, and how long and how fast the student is trained: what the ways of a table have in common."""

    recipe: str
    right_tokens: int
    """Tokens of a right answer, with its end."""
    settings: tuple[str, ...] = ()
    ways: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Settings of single ways, in place of those in `WAYS`."""
    start: float | None = None
    """Share of held-out questions answered right at which the supervised phase ends. A run's has a number of steps and does
    not end by a score: it takes the student that benchmarks/evidence_in_process.py has brought there."""


RUNNING_SUM = ("configs/running_sum.yaml", 60)
SPELLED_SUM = ("configs/spelled_sum.yaml", 70)
NO_NORM = "loss.length_norm=false"
NO_WEIGHT = "loss.mixing_weight=false"
SLOWLY = "training.learning_rate=3e-4"
WAYS: dict[str, tuple[str, ...]] = {
    "SFT alone": ("loss={type: sequence}", "rollout.data_share=1"),
    "sequence-level": ("loss={type: sequence}", "rollout.alpha=1"),
    "off-policy forward KL": ("loss={type: forward_kl}", "rollout.alpha=1"),
    "on-policy reverse KL": ("loss={type: reverse_kl}", "rollout.alpha=0"),
    "MiniLLM": (),
    "MiniLLM, no length norm": (NO_NORM,),
    "MiniLLM, no mixing": ("rollout.alpha=0",),
    "MiniLLM, no mixing, no length norm": ("rollout.alpha=0", NO_NORM),
    "MiniLLM, rate 3e-4": (SLOWLY,),
    "MiniLLM, no length norm, rate 3e-4": (NO_NORM, SLOWLY),
    "MiniLLM, no mixing, rate 3e-4": ("rollout.alpha=0", SLOWLY),
    "MiniLLM, no mixing, no length norm, rate 3e-4": ("rollout.alpha=0", NO_NORM, SLOWLY),
    "MiniLLM, w = 1": (NO_WEIGHT,),
    "MiniLLM, w = 1, no length norm": (NO_WEIGHT, NO_NORM),
    "GKD": ("loss={type: jsd, beta: 0.5}", "rollout.alpha=0", "rollout.data_share=0.5"),
}
PAIRS = (
    ("MiniLLM", tuple(WAYS)),
    ("MiniLLM, rate 3e-4", ("MiniLLM, no length norm, rate 3e-4", "MiniLLM, no mixing, rate 3e-4", "SFT alone")),
    ("MiniLLM, no length norm, rate 3e-4", ("MiniLLM, no mixing, no length norm, rate 3e-4",)),
    ("MiniLLM, no length norm", ("MiniLLM, no mixing, no length norm",)),
)
"""Ways whose difference from others the page shows."""


def few_labels(number: int) -> dict[str, tuple[str, ...]]:
    """The ways that are set otherwise where most prompts have no label."""
    return {
        # The labelled prompts alone: the same ones, since a source with more prompts begins with those of a smaller one.
        "SFT alone": (*WAYS["SFT alone"], f"data.prompts.size={number}", "data.prompts.labelled=null"),
        # The teacher writes GKD's fixed half.
        "GKD": ("loss={type: jsd, beta: 0.5}", "rollout.alpha=0", "rollout.teacher_share=0.5"),
    }


REGIMES = {
    "weak": Regime(*RUNNING_SUM, ("training.sft.steps=50",)),
    "warm": Regime(*RUNNING_SUM, ("training.sft.steps=150", "training.steps=80", "training.learning_rate=2e-3")),
    "long": Regime(*RUNNING_SUM, ("training.sft.steps=150", "training.steps=240", "training.learning_rate=3e-3")),
    "fewer labels": Regime(*SPELLED_SUM, ("data.prompts.labelled=48", "training.sft.steps=160"), few_labels(48)),
    "few labels": Regime(*SPELLED_SUM, (), few_labels(64)),
    "weak start": Regime(*SPELLED_SUM, ("training.sft.steps=140",), few_labels(64)),
    "even start": Regime(
        *SPELLED_SUM, ("data.prompts.labelled=96", "training.sft.steps=400", "training.steps=40"), few_labels(96), start=0.2
    ),
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    way: str
    regime: str
    seed: int

    @property
    def name(self) -> str:
        words = "".join(c if c.isalnum() else " " for c in f"{self.way} {self.regime}".lower()).split()
        return "-".join(["evidence", *words, str(self.seed)])

    @property
    def settings(self) -> list[str]:
        seeds = [f"run.seed={self.seed}", f"student.model.seed={self.seed}"]
        regime = REGIMES[self.regime]
        of_way = regime.ways.get(self.way, WAYS[self.way])
        return [f"run.name={self.name}", *seeds, *COMMON, *regime.settings, *of_way]

    @property
    def start(self) -> Path | None:
        """Folder of the student that a run begins with, where it has no supervised phase of its own."""
        return None if REGIMES[self.regime].start is None else STARTS / f"{self.regime.replace(' ', '-')}-{self.seed}"

    @property
    def settings_of_run(self) -> list[str]:
        """Settings of a run, in which a student from a folder has no seed and needs no supervised phase."""
        if self.start is None:
            return self.settings
        own = [each for each in self.settings if not each.startswith(("student.model.", "training.sft."))]
        return [*own, f"student.model={self.start}", "training.sft.steps=0"]

    @property
    def recipe(self) -> str:
        return REGIMES[self.regime].recipe


def record(cell: Cell, summary: Mapping[str, Any], commit: str, settings: Sequence[str] | None = None) -> dict[str, Any]:
    """What is kept of a run. Args: settings: those of the run, if not the cell's own."""
    kept = (
        "before",
        "after",
        "teacher",
        "intervals",
        "gap_closed",
        "verdict",
        "warnings",
        "trained_tokens",
        "wall_s",
        "versions",
    )
    return {
        "way": cell.way,
        "regime": cell.regime,
        "seed": cell.seed,
        "recipe": cell.recipe,
        "settings": cell.settings if settings is None else list(settings),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "cpus": os.cpu_count(),
        **{key: summary[key] for key in kept},
    }


def start_run(cell: Cell) -> int:
    """Run a cell to its end. Returns: the exit code."""
    command = [sys.executable, "-m", "cluster.cli", "run", cell.recipe, *cell.settings_of_run]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode


def commit_of_tree() -> str:
    found = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def run_cell(cell: Cell, results: Path) -> bool:
    """Run a cell and write its file. Returns: False if the run failed, or has no student to begin with."""
    folder = Path("runs") / cell.name
    if cell.start is not None and not cell.start.exists():
        print(
            f"{cell.name}: no student in {cell.start}; make it by `python -m benchmarks.evidence_in_process "
            f'--regime "{cell.regime}" --seeds {cell.seed} --starts`',
            file=sys.stderr,
            flush=True,
        )
        return False
    if not (folder / "summary.json").exists():
        if folder.exists():
            # What an interrupted run left has no checkpoint to go on from.
            folder.rename(folder.with_name(f"{folder.name}.interrupted-{time.time_ns()}"))
        if (code := start_run(cell)) != 0:
            print(f"{cell.name}: exit code {code}", file=sys.stderr, flush=True)
            return False
    found = record(cell, json.loads((folder / "summary.json").read_text()), commit_of_tree(), cell.settings_of_run)
    results.mkdir(parents=True, exist_ok=True)
    partial = results / f".{cell.name}.partial"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(results / f"{cell.name}.json")
    match = f"exact match {found['before']['exact_match']:.3f} to {found['after']['exact_match']:.3f}"
    print(f"{cell.name}: {match}, gap closed {gap_text([found])} %, {found['wall_s']:.0f} s", flush=True)
    return True


def read(results: Path) -> list[dict[str, Any]]:
    """All cells that have been run, in the order of `WAYS`."""
    ways = list(WAYS)
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    return sorted(found, key=lambda cell: (cell["regime"], ways.index(cell["way"]), cell["seed"]))


def stage_of(seed: int) -> str:
    """The stage that a seed belongs to."""
    return next(name for name, first in reversed(STAGES.items()) if seed >= first)


def groups(cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]]:
    """Cells by (stage, regime) and way, the last stage first."""
    found: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for cell in cells:
        found.setdefault((stage_of(cell["seed"]), cell["regime"]), {}).setdefault(cell["way"], []).append(cell)
    return dict(sorted(found.items(), key=lambda item: (STAGES[item[0][0]], item[0][1]), reverse=True))


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables, one for each regime, the stages apart."""
    parts = []
    for (stage, regime), ways in groups(cells).items():
        every = [cell for of_way in ways.values() for cell in of_way]
        dates, commits = sorted({cell["date"] for cell in every}), sorted({cell["commit"] for cell in every})
        parts += [
            f"**Regime `{regime}`, {stage} seeds** ({', '.join(map(str, sorted({cell['seed'] for cell in every})))}); "
            f"{' and '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}.",
            "",
            "| way | seeds | gap closed % | exact match % | before | teacher | right steps % | before | tokens | loops % "
            "| reverse KL |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(_row(way, of_way) for way, of_way in ways.items()),
            "",
        ]
    return "\n".join(parts)


def by_seed(cells: Sequence[Mapping[str, Any]], regime: str) -> str:
    """Markdown table of a regime's exact match, a line for each seed, so that ways are compared from the same student."""
    chosen = [cell for cell in cells if cell["regime"] == regime]
    ways = list(dict.fromkeys(cell["way"] for cell in chosen))
    lines = [f"| seed | before | {' | '.join(ways)} | teacher |", f"|{'---|' * (len(ways) + 3)}"]
    for seed in sorted({cell["seed"] for cell in chosen}):
        found = {cell["way"]: cell for cell in chosen if cell["seed"] == seed}
        after = [_number([found[way]], "after", "exact_match", 100.0, ".1f") if way in found else "" for way in ways]
        start, teacher = (
            _number([next(iter(found.values()))], name, "exact_match", 100.0, ".1f") for name in ("before", "teacher")
        )
        lines.append(f"| {seed} | {start} | {' | '.join(after)} | {teacher} |")
    return "\n".join(lines)


def paired(
    cells: Sequence[Mapping[str, Any]],
    regime: str,
    way: str = "MiniLLM",
    others: Sequence[str] = tuple(WAYS),
    stage: str = "confirming",
) -> str:
    """Markdown table of a way's exact match minus that of others on the seeds of a stage that both have, at least three.

    Mean over seeds with its 95% interval by Student's t, and the number of seeds on which it is ahead, level and behind.
    """
    lines = [f"| {way} minus, {stage} seeds | seeds | points (95% interval) | ahead, level, behind |", "|---|---|---|---|"]
    for other, gaps in differences(cells, regime, way, stage).items():
        if other not in others or len(gaps) < 3:
            continue
        mean, low, high = mean_interval(gaps)
        points = f"{mean:+.1f} ({low:.1f} to {high:.1f})"
        if len(set(gaps)) == 1:
            # Without any spread t gives an interval of no width, which would be certainty.
            points = f"{mean:+.1f} on each" if mean else "all level"
        signs = [sum(1 for gap in gaps if sign(gap)) for sign in (lambda x: x > 0, lambda x: x == 0, lambda x: x < 0)]
        lines.append(f"| {other} | {len(gaps)} | {points} | {', '.join(map(str, signs))} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def differences(cells: Sequence[Mapping[str, Any]], regime: str, way: str, stage: str) -> dict[str, list[float]]:
    """Exact match of a way minus that of each other one in points, on the seeds of a stage that both have."""
    right: dict[str, dict[int, float]] = {}
    for cell in cells:
        if cell["regime"] == regime and stage_of(cell["seed"]) == stage:
            right.setdefault(cell["way"], {})[cell["seed"]] = 100.0 * cell["after"]["exact_match"]
    own = right.pop(way, {})
    return {other: [own[seed] - value for seed, value in found.items() if seed in own] for other, found in right.items()}


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Compute the mean over seeds, and its 95% interval by Student's t, which has no width where all are equal."""
    mean = statistics.fmean(values)
    return mean, *(over_seeds(values) or (mean, mean))


def page(cells: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, Sequence[str]]] = PAIRS) -> str:
    """Markdown of all cells: regimes of several seeds seed by seed, differences of `pairs` of ways, and the table of each."""
    parts = []
    for regime in (each for each in REGIMES if len({cell["seed"] for cell in cells if cell["regime"] == each}) > 1):
        parts += [f"**Exact match of regime `{regime}` in percent, seed by seed.**", by_seed(cells, regime)]
        compared = product(DECIDING, pairs)
        parts += [found for stage, (way, others) in compared if (found := paired(cells, regime, way, others, stage))]
    return "\n\n".join([*parts, table(cells)])


def _row(way: str, cells: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        way,
        str(len(cells)),
        gap_text(cells),
        with_interval([100.0 * cell["after"]["exact_match"] for cell in cells], ".1f"),
        _number(cells, "before", "exact_match", 100.0, ".1f"),
        _number(cells, "teacher", "exact_match", 100.0, ".1f"),
        _number(cells, "after", "step_match", 100.0, ".1f"),
        _number(cells, "before", "step_match", 100.0, ".1f"),
        _number(cells, "after", "response_tokens", 1.0, ".1f"),
        _number(cells, "after", "repetition", 100.0, ".1f"),
        _number(cells, "after", "reverse_kl", 1.0, ".3f"),
    ]
    return f"| {' | '.join(columns)} |"


def gap_text(cells: Sequence[Mapping[str, Any]]) -> str:
    """The share of the gap closed in percent with its interval, over prompts for one seed and otherwise over seeds."""
    gaps = [cell["gap_closed"] for cell in cells]
    values = [100.0 * gap["value"] for gap in gaps if gap["value"] is not None]
    if not values:
        return "undefined"
    if len(cells) == 1:
        return f"{values[0]:.0f} ({100.0 * gaps[0]['low']:.0f} to {100.0 * gaps[0]['high']:.0f})"
    lacking = f", undefined in {len(cells) - len(values)}" if len(values) < len(cells) else ""
    return with_interval(values, ".0f") + lacking


def _number(cells: Sequence[Mapping[str, Any]], evaluation: str, metric: str, scale: float, digits: str) -> str:
    return spread([scale * cell[evaluation][metric] for cell in cells], digits)


def with_interval(values: Sequence[float], digits: str) -> str:
    """Mean over seeds with its 95% interval; of two, or of equal ones, as in `spread`."""
    if len(set(values)) == 1 or len(values) < 3:
        return spread(values, digits)
    mean, low, high = mean_interval(values)
    return f"{mean:{digits}} ({low:{digits}} to {high:{digits}})"


def spread(values: Sequence[float], digits: str) -> str:
    """Mean, and the sample standard deviation of several seeds."""
    mean = f"{statistics.fmean(values):{digits}}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):{digits}}"


def write_page(page: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Replace what is between the page's marks. Raises: ValueError if it lacks them."""
    before, rest = page.read_text().split(marks[0])
    _, after = rest.split(marks[1])
    page.write_text(f"{before}{marks[0]}\n\n{text}\n{marks[1]}{after}")


def draw(cells: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Gap closed, right steps and response length of every way: a dot for each seed, a line at the mean."""
    import matplotlib

    matplotlib.use("Agg")
    # Ids that do not change from one drawing to the next, and text that can be searched.
    matplotlib.rcParams.update({"svg.hashsalt": "evidence", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    shown = groups(cells)
    rows = [way for way in reversed(WAYS) if any(way in ways for ways in shown.values())]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 1.2 + 0.4 * len(rows)), sharey=True)
    for colour, ((stage, regime), ways) in enumerate(shown.items()):
        label = f"{regime}; {stage} seeds"
        places = [rows.index(way) + 0.12 * colour for way in ways]
        for axis, value in ((left, _share), (middle, _steps), (right, _length)):
            points = [[each for cell in of_way if (each := value(cell)) is not None] for of_way in ways.values()]
            for place, of_way in zip(places, points, strict=True):
                axis.plot(of_way, [place] * len(of_way), "o", color=f"C{colour}", alpha=0.6, label=label)
                if len(of_way) > 1:
                    axis.plot([statistics.fmean(of_way)], [place], "|", color=f"C{colour}", markersize=18)
                label = "_"
            label = "_"
        for place, of_way in zip(places, ways.values(), strict=True):
            if len(of_way) == 1 and of_way[0]["gap_closed"]["value"] is not None:
                bounds = [max(_LOWEST, 100.0 * of_way[0]["gap_closed"][bound]) for bound in ("low", "high")]
                left.plot(bounds, [place, place], "-", color=f"C{colour}", alpha=0.6)
    left.axvline(0.0, color="grey", linewidth=0.8)
    left.axvline(100.0, color="grey", linewidth=0.8, linestyle="--")
    left.set_yticks(range(len(rows)), rows)
    left.set_xlabel("share of the gap closed, % (lower ones at -100)")
    middle.set_xlabel("right steps, %")
    right.axvline(0.0, color="grey", linewidth=0.8, linestyle="--")
    right.set_xlabel("tokens beyond those of a right response")
    # Between responses that broke off and those of the right length there is most room.
    right.legend(*left.get_legend_handles_labels(), fontsize=7, loc="best")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def _share(cell: Mapping[str, Any]) -> float | None:
    share = cell["gap_closed"]["value"]
    return None if share is None else max(_LOWEST, 100.0 * float(share))


def _steps(cell: Mapping[str, Any]) -> float:
    return 100.0 * float(cell["after"]["step_match"])


def _length(cell: Mapping[str, Any]) -> float:
    return float(cell["after"]["response_tokens"]) - REGIMES[cell["regime"]].right_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="seeds to run: all ways of one seed before the next")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY", help="some of the ways")
    parser.add_argument(
        "--regimes", nargs="*", default=["few labels"], choices=list(REGIMES), metavar="REGIME", help="some of the regimes"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many minutes")
    parser.add_argument("--table", action="store_true", help=f"rewrite the table in {PAGE}")
    parser.add_argument("--figure", action="store_true", help=f"rewrite {FIGURE}")
    given = parser.parse_args()
    began, failed = time.monotonic(), 0
    for seed, regime, way in product(given.seeds, given.regimes, given.ways):
        cell = Cell(way, regime, seed)
        if (RESULTS / f"{cell.name}.json").exists():
            continue
        if time.monotonic() - began > 60.0 * given.minutes:
            break
        failed += not run_cell(cell, RESULTS)
    cells = read(RESULTS)
    if given.table:
        write_page(PAGE, page(cells))
    if given.figure:
        draw(cells, FIGURE)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
