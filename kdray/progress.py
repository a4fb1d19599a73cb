"""What a resume needs beside the weights, and the proof that every sample was trained once.

Because step s trains samples [s * batch_size, (s + 1) * batch_size) and every draw is seeded by its sample id, the number of
steps done is the whole position: of prompts, of samples, of randomness.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdray.run_folder import read_lines, write_atomically
from kdray.types import Rollout

COMMITTED = "COMMITTED.json"


def newest_checkpoint(checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """The committed checkpoint with the most steps and what its marker holds; None where there is none.

    A folder without a marker was interrupted while it was written, and is passed over.
    """
    found = []
    for marker in checkpoints.glob(f"step-*/{COMMITTED}"):
        progress = json.loads(marker.read_text(encoding="utf-8"))
        found.append((int(progress["step"]), marker.parent, progress))
    if not found:
        return None
    _, folder, progress = max(found, key=lambda item: item[0])
    return folder, progress


def prune_checkpoints(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` committed checkpoints with the most steps, and what an interrupted save left."""
    committed = sorted(marker.parent for marker in checkpoints.glob(f"step-*/{COMMITTED}"))
    torn = [*checkpoints.glob(".step-*.partial")] if committed else []
    for folder in [*committed[:-keep], *torn]:
        shutil.rmtree(folder)


class Ledger:
    """`ledger.jsonl`: what became of every sample, a line a step, appended when the step is done; `kdray.verify` reads it.

    A line holds `step`, `sample_ids`, `dropped` (sample ids by the rule that left them out, where one did), and by `fates`:
    `prompt_ids`, `tokens` (of the response), `oldest` and `newest` (student versions that drew it; null where there is no
    token), `scored_by` (a teacher's name; empty where none scored), in the order of the ids. A column whose values are all
    alike is that one value. `trained_tokens` is what the ranks counted as targets.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(
        self, step: int, sample_ids: list[int], dropped: Mapping[int, str] | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Note one step. Reaches the disk before the call returns.

        Args: dropped: the rule by which a sample was left out; facts: further entries of the line.
        """
        by_rule: dict[str, list[int]] = {}
        for sample_id, rule in (dropped or {}).items():
            by_rule.setdefault(rule, []).append(sample_id)
        line = {"step": step, "sample_ids": sample_ids} | ({"dropped": by_rule} if by_rule else {}) | dict(facts or {})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, step: int) -> None:
        """Forget steps after `step`: a resume trains them again."""
        lines = [line for line in self._lines() if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def check(self, steps: int, batch_size: int) -> tuple[int, int]:
        """(lost, duplicated): samples of the first `steps` steps that were never trained; extra times one was trained."""
        counts = Counter(sample_id for line in self._lines() for sample_id in line["sample_ids"])
        lost = sum(1 for sample_id in range(steps * batch_size) if sample_id not in counts)
        return lost, sum(count - 1 for count in counts.values())

    def _lines(self) -> list[dict[str, Any]]:
        return read_lines(self._path) if self._path.exists() else []


def fates(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The columns of a ledger line that tell what became of rollouts; see `Ledger`."""
    drawn = [rollout.student_versions if len(rollout.token_ids) else None for rollout in rollouts]
    columns: dict[str, list[Any]] = {
        "prompt_ids": [rollout.prompt_id for rollout in rollouts],
        "tokens": [len(rollout.token_ids) for rollout in rollouts],
        "oldest": [None if versions is None else int(versions.min()) for versions in drawn],
        "newest": [None if versions is None else int(versions.max()) for versions in drawn],
        "scored_by": [rollout.teacher for rollout in rollouts],
    }
    return {name: values[0] if len(set(values)) == 1 else values for name, values in columns.items()}
