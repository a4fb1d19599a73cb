"""Record of every sample of a run, `ledger.jsonl`, and the counters that are kept across a resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kdray.runs.folder import unguarded
from kdray.runs.lines.occurrences import Occurrences
from kdray.runs.lines.streams import StepLine, drop_later_steps, stream
from kdray.types import Rollout

NOT_FINITE = "not_finite"
"""Rule under which a whole batch is left out whose loss or gradient was not finite (`training.on_not_finite: skip`)."""


class Ledger:
    """`ledger.jsonl`: the outcome of every sample, one line per step, appended when it is done; read by `kdray.runs.verify`.

    A line holds `step`, `sample_ids`, `dropped` (excluded sample ids by the rule that excluded them, if any), and from
    `sample_outcomes`: `prompt_ids`, `tokens` (of the response, without those of the environment), `oldest` and `newest`
    (student versions that sampled them; null if there is none), `scored_by` (a teacher's name; empty if none scored), in the
    order of the ids. A column whose values are all equal is stored as that single value. `responses_sha256` is a digest of
    all responses, for comparing two runs; `trained_tokens` is the number of targets that the ranks counted. What each rank
    was given and has trained follows in the columns of `kdray.runs.training_record`, which lines of earlier versions lack.
    """

    def __init__(self, path: Path, guard: Callable[[], None] = unguarded) -> None:
        """Args: guard: called before every write; raises if another driver has taken over the run."""
        self._path = path
        self._guard = guard

    def append(
        self, step: int, sample_ids: list[int], dropped: Mapping[int, str] | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record a step. The line reaches the disk before the call returns. Args: as for `ledger_line`."""
        line = json.dumps(ledger_line(step, sample_ids, dropped, facts)) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            # As late as can be: a driver that stops after it writes on waking what its successor has written, too.
            self._guard()
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def not_finite_steps(self) -> list[int]:
        """Return the steps whose batch was left out under the rule NOT_FINITE."""
        return [line.step for line, _ in stream(self._path, _Dropped) if NOT_FINITE in line.dropped]

    def truncate(self, step: int) -> None:
        """Drop steps after `step`, which a resume trains again."""
        drop_later_steps(self._path, step, self._guard)
        if not self._path.exists():
            self._path.touch()

    def check(self, steps: int, batch_size: int) -> tuple[int, int]:
        """Count (lost, duplicated): samples of the first `steps` steps never trained, and repeated trainings of a sample."""
        found = Occurrences()
        for line, _ in stream(self._path, _SampleIds):
            found.add(line.sample_ids)
        lost = sum(end - begin for begin, end in found.missing(0, steps * batch_size))
        return lost, found.repeated


class _Dropped(StepLine):
    dropped: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict)


class _SampleIds(StepLine):
    sample_ids: list[int]


def ledger_line(
    step: int, sample_ids: list[int], dropped: Mapping[int, str] | None = None, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Build the line of a step.

    Args: dropped: the rule that excluded a sample, by sample id; facts: further entries of the line.
    """
    by_rule: dict[str, list[int]] = {}
    for sample_id, rule in (dropped or {}).items():
        by_rule.setdefault(rule, []).append(sample_id)
    return {"step": step, "sample_ids": sample_ids} | ({"dropped": by_rule} if by_rule else {}) | dict(facts or {})


def sample_outcomes(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Build the columns of a ledger line with the outcomes of rollouts; see `Ledger`."""
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
        # Lengths too, or responses split at another token could give the same bytes.
        responses.update(len(rollout.token_ids).to_bytes(4, "little") + rollout.token_ids.astype("<i4").tobytes())
    return told | {"responses_sha256": responses.hexdigest()}


@dataclass
class Totals:
    """Counters of a run, kept across a resume."""

    prompts_consumed: int = 0
    tokens_generated: int = 0
    tokens_scored: int = 0
    trained_tokens: int = 0
