"""The record of every sample of a run: `ledger.jsonl`, and the counters that a resume carries on."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdray.runs.folder import read_lines, write_atomically
from kdray.types import Rollout


class Ledger:
    """`ledger.jsonl`: what became of every sample, a line a step, appended when the step is done; `kdray.runs.verify` reads it.

    A line holds `step`, `sample_ids`, `dropped` (sample ids by the rule that left them out, where one did), and by `fates`:
    `prompt_ids`, `tokens` (of the response, without those of the environment), `oldest` and `newest` (student versions that
    drew them; null where there is none), `scored_by` (a teacher's name; empty where none scored), in the order of the ids. A
    column whose values are all alike is that one value. `responses_sha256` is a digest of all responses, by which two runs are
    compared; `trained_tokens` is what the ranks counted as targets.
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
    versions = [rollout.target_versions for rollout in rollouts]
    columns: dict[str, list[Any]] = {
        "prompt_ids": [rollout.prompt_id for rollout in rollouts],
        "tokens": [len(drawn) for drawn in versions],
        "oldest": [int(drawn.min()) if len(drawn) else None for drawn in versions],
        "newest": [int(drawn.max()) if len(drawn) else None for drawn in versions],
        "scored_by": [rollout.teacher for rollout in rollouts],
    }
    told: dict[str, Any] = {name: values[0] if len(set(values)) == 1 else values for name, values in columns.items()}
    responses = hashlib.sha256()
    for rollout in rollouts:
        # Lengths too, or two responses could be cut elsewhere and give the same bytes.
        responses.update(len(rollout.token_ids).to_bytes(4, "little") + rollout.token_ids.astype("<i4").tobytes())
    return told | {"responses_sha256": responses.hexdigest()}


@dataclass
class Totals:
    """Counters of a run, carried across a resume."""

    prompts_consumed: int = 0
    tokens_generated: int = 0
    tokens_scored: int = 0
    trained_tokens: int = 0
