"""What a resume needs beside the weights, and the proof that every sample was trained once.

Because step s trains samples [s * batch_size, (s + 1) * batch_size) and every draw is seeded by its sample id, the number of
steps done is the whole position: of prompts, of samples, of randomness.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdray.run_folder import read_lines, write_atomically

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
    """`ledger.jsonl`: the sample ids of every trained step, and which of them a filter left out; appended when it is done."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, step: int, sample_ids: list[int], dropped: Mapping[int, str] | None = None) -> None:
        """Note one step. Reaches the disk before the call returns. Args: dropped: the rule by which a sample was left out."""
        by_rule: dict[str, list[int]] = {}
        for sample_id, rule in (dropped or {}).items():
            by_rule.setdefault(rule, []).append(sample_id)
        line = {"step": step, "sample_ids": sample_ids} | ({"dropped": by_rule} if by_rule else {})
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
