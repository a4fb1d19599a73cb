"""Bias and variance of every estimator of the sequence-level reverse KL, in a world that can be enumerated.

    python -m benchmarks.estimator_bias_variance

Runs the losses of `kdray.losses` themselves on all 85 responses of a toy world (tests/support/toy_world.py), so that
mean and covariance of one sample's gradient are exact: there is no sampling error. Repeats it for several random
worlds, and writes a table and every number into benchmarks/results/. Takes seconds on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from kdray.config import LMOpsLoss, LossSettings, MiniLLMLoss, PerDecisionLoss, ReverseKLLoss, VOPDLoss
from kdray.losses import LossBatch
from tests.support.toy_world import ToyWorld, unweighted, without_baseline

ALPHAS = (0.0, 0.2, 0.5)
QUANTITIES = ("relative_error", "cosine", "variance")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    loss: LossSettings
    change: Callable[[LossBatch], LossBatch] = lambda batch: batch
    """What is done to the records before the loss sees them."""


ROWS = (
    Row("per_decision, exact", PerDecisionLoss(type="per_decision")),
    Row("per_decision, horizon 1", PerDecisionLoss(type="per_decision", horizon=1)),
    Row("per_decision, horizon 0", PerDecisionLoss(type="per_decision", horizon=0)),
    Row("minillm, no length norm", MiniLLMLoss(length_norm=False)),
    Row("minillm, no length norm, w = 1", MiniLLMLoss(length_norm=False), change=unweighted),
    Row("minillm, no length norm, no single step", MiniLLMLoss(length_norm=False, single_step=False)),
    Row("minillm (default)", MiniLLMLoss()),
    Row("minillm, gamma 0.5", MiniLLMLoss(gamma=0.5)),
    Row("minillm, whitening", MiniLLMLoss(whitening=True)),
    Row("lmops (default)", LMOpsLoss(type="lmops")),
    Row("lmops, not clipped", LMOpsLoss(type="lmops", clip=None)),
    Row("lmops, not clipped, not whitened", LMOpsLoss(type="lmops", clip=None, whitening=False)),
    Row("vopd (default, gamma 0)", VOPDLoss(type="vopd")),
    Row("vopd, gamma 0, no baseline", VOPDLoss(type="vopd"), change=without_baseline),
    Row("vopd, gamma 1", VOPDLoss(type="vopd", gamma=1.0)),
    Row("vopd, gamma 1, no baseline", VOPDLoss(type="vopd", gamma=1.0), change=without_baseline),
    Row("reverse_kl, full rows", ReverseKLLoss(type="reverse_kl")),
)


def measure(world: ToyWorld, row: Row, alpha: float, stale: bool) -> dict[str, float]:
    """Error and cosine of the mean gradient against the exact one, and the trace of one sample's covariance."""
    exact = world.exact_gradient()
    sampler = world.theta + world.drift if stale else world.theta
    mean, covariance = world.moments(row.loss, alpha, sampler, row.change)
    return {
        "relative_error": float((mean - exact).norm() / exact.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(mean, exact, dim=0)),
        "variance": float(covariance.trace()),
    }


def table(results: dict[str, dict[str, dict[str, list[float]]]], columns: list[str]) -> str:
    """Markdown: a row an estimator, medians over worlds of error / cosine / variance in each column."""
    lines = [
        "| estimator | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, by_column in results.items():
        cells = []
        for column in columns:
            error, cosine, variance = (float(np.median(by_column[column][quantity])) for quantity in QUANTITIES)
            cells.append(f"{'**0**' if error < 1e-9 else f'{error:.2f}'} / {cosine:.3f} / {variance:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=40, help="number of random worlds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    settings = [(alpha, stale) for stale in (False, True) for alpha in ALPHAS]
    columns = [f"alpha {alpha:g}{', stale' if stale else ''}" for alpha, stale in settings]
    results: dict[str, dict[str, dict[str, list[float]]]] = {
        row.name: {column: {quantity: [] for quantity in QUANTITIES} for column in columns} for row in ROWS
    }
    for seed in range(arguments.worlds):
        world = ToyWorld(seed)
        for row in ROWS:
            for column, (alpha, stale) in zip(columns, settings, strict=True):
                for quantity, value in measure(world, row, alpha, stale).items():
                    results[row.name][column][quantity].append(float(f"{value:.4g}"))

    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "worlds": arguments.worlds,
        "estimators": {row.name: row.loss.model_dump() for row in ROWS},
    }
    text = "\n".join(
        [
            "# Estimators of the sequence-level reverse KL: bias and variance, by enumeration",
            "",
            f"`python -m benchmarks.estimator_bias_variance` on {facts['date']}, commit {commit}, torch {torch.__version__}, "
            f"{arguments.worlds} random worlds.",
            "",
            "Each cell: relative error of the mean gradient / its cosine with the exact one / trace of the covariance of one "
            "sample's gradient. Medians over the worlds; **0** is below 1e-9.",
            "",
            "## Samples of the current student",
            "",
            table(results, columns[: len(ALPHAS)]),
            "",
            "## Samples of an older student",
            "",
            table(results, columns[len(ALPHAS) :]),
            "",
        ]
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "estimator_bias_variance.md").write_text(text, encoding="utf-8")
    payload = json.dumps(facts | {"results": results}, separators=(",", ":"))
    (arguments.output / "estimator_bias_variance.json").write_text(payload + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
