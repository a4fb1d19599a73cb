"""Every estimator and divergence on the quickstart task for the same steps, and MiniLLM's ablation: one table, one figure.

`python -m benchmarks.losses_on_letters [FOLDER]` runs `kdray run configs/quickstart.yaml` once per variant (about a minute each
on two cores) and writes losses_on_letters.md, .json and .svg into FOLDER (default: benchmarks/results). Runs already in runs/
under the variant's name are taken as they are, so that an interrupted table can be continued.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STEPS = 150
COMMON = [
    "data.prompts.size=4096",
    f"training.steps={STEPS}",
    "training.learning_rate=1e-3",
    "training.checkpoint_every=0",
    "evaluation.control=false",
    "evaluation.every=25",
]
VARIANTS: dict[str, list[str]] = {
    "minillm": [],
    "minillm, no teacher mixing": ["rollout.alpha=0"],
    "minillm, no length norm": ["loss.length_norm=false"],
    "minillm, neither": ["rollout.alpha=0", "loss.length_norm=false"],
    "minillm, no single step": ["loss.single_step=false"],
    "minillm, whitening": ["loss.whitening=true"],
    "lmops": ["loss.type=lmops"],
    "per_decision": ["loss.type=per_decision"],
    "vopd": ["loss.type=vopd"],
    "reverse_kl": ["loss.type=reverse_kl", "rollout.alpha=0"],
    "forward_kl": ["loss.type=forward_kl", "rollout.alpha=0"],
    "jsd": ["loss.type=jsd", "rollout.alpha=0"],
    "skew_forward_kl": ["loss.type=skew_forward_kl", "rollout.alpha=0"],
    "skew_reverse_kl": ["loss.type=skew_reverse_kl", "rollout.alpha=0"],
    "tvd": ["loss.type=tvd", "rollout.alpha=0"],
    "adaptive_kl": ["loss.type=adaptive_kl", "rollout.alpha=0"],
    "mse_logit": ["loss.type=mse_logit", "rollout.alpha=0"],
    "hinton on teacher's samples": ["loss.type=hinton", "rollout.alpha=1"],
    "forward_kl_sampled on teacher's samples": ["loss.type=forward_kl_sampled", "rollout.alpha=1"],
}


def _alpha(name: str) -> str:
    """Teacher's share of the mixture that a variant samples from."""
    setting = "rollout.alpha="
    given = [each.removeprefix(setting) for each in VARIANTS[name] if each.startswith(setting)]
    return given[0] if given else "0.2"


def _run(name: str, overrides: list[str]) -> dict[str, Any]:
    slug = "losses-" + "".join(c if c.isalnum() else "-" for c in name)
    folder = Path("runs") / slug
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "cluster.cli", "run", "configs/quickstart.yaml", f"run.name={slug}"]
        subprocess.run([*command, *COMMON, *overrides], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(0, summary["before"])]
    for line in lines:
        if "heldout/reverse_kl" in line:
            curve.append((line["step"], {k.removeprefix("heldout/"): v for k, v in line.items() if k.startswith("heldout/")}))
    return {"name": name, "before": summary["before"], "after": summary["after"], "curve": curve, "wall_s": summary["wall_s"]}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for name, overrides in VARIANTS.items():
        results.append(_run(name, overrides))
        print(name, {key: round(value, 4) for key, value in results[-1]["after"].items()}, flush=True)
    _write(folder, results)


def _write(folder: Path, results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    date = datetime.now(UTC).date().isoformat()
    before = results[0]["before"]
    rows = [
        f"| {r['name']} | {_alpha(r['name'])} | {r['after']['reverse_kl']:.3f} | {r['after']['forward_kl']:.3f} | "
        f"{100 * r['after']['exact_match']:.1f} | {r['after']['response_tokens']:.2f} |"
        for r in results
    ]
    text = [
        f"Last letters, difficulty 3, {STEPS} steps of 64 rollouts from the same SFT student (reverse KL "
        f"{before['reverse_kl']:.3f}, forward KL {before['forward_kl']:.3f}, exact match "
        f"{100 * before['exact_match']:.1f}%), one seed, held out, {date}. `python -m benchmarks.losses_on_letters`.",
        "",
        "| loss | alpha | reverse KL | forward KL | exact match % | response tokens |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    (folder / "losses_on_letters.md").write_text("\n".join(text))
    (folder / "losses_on_letters.json").write_text(json.dumps({"date": date, "results": results}, indent=1) + "\n")
    figure, axes = plt.subplots(1, 3, figsize=(15, 5))
    for axis, metric in zip(axes, ("reverse_kl", "exact_match", "response_tokens"), strict=True):
        for index, result in enumerate(results):
            steps, points = zip(*result["curve"], strict=True)
            style = "-" if index < 10 else "--"
            axis.plot(steps, [point[metric] for point in points], style, label=result["name"])
        axis.set_title(metric)
        axis.set_xlabel("step")
    axes[0].set_yscale("log")
    axes[2].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(folder / "losses_on_letters.svg")


if __name__ == "__main__":
    main()
