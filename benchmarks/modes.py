"""Every way of distilling that kdray knows, one after the other on tasks that grade themselves: one results table.

`python -m benchmarks.modes [FOLDER]` runs the recipes below (one to four minutes each, over an hour on two cores) and writes
modes.md and modes.json into FOLDER (default: benchmarks/results). Runs that are finished already in runs/ under a row's name
are taken as they are, so that an interrupted table can be continued.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One run of the table."""

    mode: str
    recipe: str
    overrides: tuple[str, ...] = ()
    capture: str | None = None
    """Recipe that `kdray capture` runs first."""

    @property
    def name(self) -> str:
        return "mode-" + "".join(c if c.isalnum() else "-" for c in self.mode.lower())


SAME_CONTROL = "evaluation.control=false"
"""The first row's: the same student, data and number of tokens."""
AT_ONCE = "rollout.program={type: direct, max_stage_tokens: 192, max_new_tokens: 32}"
WEAK = "training.sft.steps=15"
"""Of the recipe's 75: a student that can hardly do the task yet."""
UNFILTERED = "rollout.filters=null"
ROWS = [
    Row("online, MiniLLM", "quickstart", ("data.prompts.size=4096", "training.steps=150", "training.sft.steps=50")),
    Row("classical", "classical"),
    Row("response, 30% real data", "response"),
    Row("offline, from a capture", "offline", capture="offline_capture"),
    Row("on-policy, GKD, lambda 0.5", "gkd", (SAME_CONTROL,)),
    Row("on-policy, GKD, lambda 1", "gkd", ("rollout.data_share=0", SAME_CONTROL)),
    Row("mutual", "mutual", (SAME_CONTROL,)),
    Row("self, average", "self_distillation", (SAME_CONTROL,)),
    Row("self, privileged prompt", "privileged"),
    Row("two-stage", "two_stage", (SAME_CONTROL,)),
    Row("adaptive alpha and loss", "adaptive", (SAME_CONTROL,)),
    Row("System 2, letters", "system2_letters"),
    Row("System 2, letters, unfiltered", "system2_letters", (UNFILTERED,)),
    Row("System 1, letters", "system2_letters", (AT_ONCE,)),
    Row("System 2, coins", "system2_coins"),
    Row("System 2, coins, unfiltered", "system2_coins", (UNFILTERED,)),
    Row("System 1, coins", "system2_coins", (AT_ONCE,)),
    Row("Chain of Thought", "system2_thoughts"),
    Row("System 2 Attention", "system2_attention"),
    Row("Branch-Solve-Merge", "system2_judge"),
    Row("step by step", "system2_step_by_step"),
    Row("features", "features"),
    Row("compressed student", "compressed"),
    Row("multi-teacher", "three_teachers"),
    Row("online, 256 questions", "quickstart"),
    Row("features, none", "features", ("training.features=null",)),
    Row("features, weak start", "features", (WEAK,)),
    Row("features, none, weak start", "features", ("training.features=null", WEAK)),
    Row("step by step, labels alone", "system2_step_by_step", ("rollout.program.rationale_weight=0",)),
]


def _run(row: Row) -> dict[str, Any]:
    folder = Path("runs") / row.name
    if not (folder / "summary.json").exists():
        kdray = [sys.executable, "-m", "cluster.cli"]
        settings = [f"run.name={row.name}", "training.checkpoint_every=0", *row.overrides]
        if row.capture is not None:
            subprocess.run([*kdray, "capture", f"configs/{row.capture}.yaml"], check=True, stdout=subprocess.DEVNULL)
        command = [*kdray, "run", f"configs/{row.recipe}.yaml", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    kept = (
        "before",
        "distilled",
        "after",
        "control",
        "program",
        "tokens_generated",
        "tokens_scored",
        "trained_tokens",
        "wall_s",
    )
    return {"mode": row.mode, "recipe": row.recipe, **{key: summary.get(key) for key in kept}}


def _percent(numbers: Mapping[str, Any] | None) -> str:
    return "" if not numbers or "exact_match" not in numbers else f"{100 * numbers['exact_match']:.1f}"


def _nats(numbers: Mapping[str, Any] | None) -> str:
    return "" if not numbers or "reverse_kl" not in numbers else f"{numbers['reverse_kl']:.2f}"


def _line(result: Mapping[str, Any]) -> str:
    before, after, control = result["before"], result["after"], result["control"]
    cells = [
        result["mode"],
        f"`{result['recipe']}.yaml`",
        _percent(before),
        _percent(result["program"]),
        _percent(after),
        _percent(control),
        _nats(before),
        _nats(after),
        _nats(control),
        f"{result['tokens_generated'] / 1000:.0f}k / {result['trained_tokens'] / 1000:.0f}k",
        f"{result['wall_s']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _write(folder: Path, results: list[dict[str, Any]]) -> None:
    date = datetime.now(UTC).date().isoformat()
    text = [
        f"One seed each, held out, {date}. `python -m benchmarks.modes`. The control is the same SFT student trained on "
        "the reference answers alone, for as many tokens; rows without one that begin at the first row's student have its "
        "control. Exact match in %, reverse KL to the teacher in nats per token.",
        "",
        "| way | recipe | match before | program | after | control | KL before | after | control | drawn/trained | wall s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, results),
        "",
    ]
    (folder / "modes.md").write_text("\n".join(text))
    (folder / "modes.json").write_text(json.dumps({"date": date, "results": results}, indent=1) + "\n")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for row in ROWS:
        results.append(_run(row))
        print(_line(results[-1]), flush=True)
        _write(folder, results)


if __name__ == "__main__":
    main()
