"""Comparison of every rank's own record of what it trained with the rollouts that it was given, over the lines of a ledger."""

from __future__ import annotations

import numpy as np

from kdray.config import TrainingSettings
from kdray.rollouts.training_digest import times
from kdray.runs.training_record import differences
from kdray.runs.verification.proof import Proof
from kdray.runs.verification.steps import Records, Step, offsets


class RecordChecks:
    """Checks of the ranks' records, and of their counters against the updates that were due, line by line."""

    def __init__(self, training: TrainingSettings, recorded_from: int | None = None) -> None:
        """Args: recorded_from: steps that were done when a version began that keeps records of all others; None if none did."""
        self._training = training
        self._recorded_from = recorded_from
        self._first: int | None = None
        """First step of the ledger, and below of those with a record."""
        self._begun: int | None = None
        self._left_out = 0
        self._steps = 0
        self._recorded = 0
        self._ranks = 0

    def check(self, proof: Proof, line: Step) -> None:
        """Compare the records of a line, the next one of the ledger."""
        self._steps += 1
        if self._first is None:
            self._first = line.step
        self._left_out += line.is_left_out
        if not line.is_recorded:
            begun = [step for step in (self._begun, self._recorded_from) if step is not None]
            if begun and line.step > min(begun):
                proof.wrong("training", f"step {line.step}: no rank says what it trained")
            return
        if self._begun is None:
            self._begun = line.step
        if line.records is not None:
            self._recorded += 1
            self._ranks = len(line.records.trained)
        training = self._training
        passes = 0 if line.is_left_out else training.inner_epochs
        updates = (line.step - self._left_out) * training.updates_per_step
        if line.records is None or not _is_sound(line, line.records, training.batch_size, passes, updates):
            for what in differences(line.line, training.batch_size, passes, updates):
                proof.wrong("training", f"step {line.step}: {what}")

    @property
    def left_out(self) -> int:
        """Batches so far that were not finite, for which no update was due."""
        return self._left_out

    def take(self, first: int, count: int, ranks: int) -> None:
        """Count the next lines, of which another check has found the records sound."""
        self._first = first if self._first is None else self._first
        self._begun = first if self._begun is None else self._begun
        self._steps += count
        self._recorded += count
        self._ranks = ranks

    def notes(self) -> list[str]:
        """Say what could not be compared."""
        if self._first is None or self._begun == self._first:
            return []
        which = "its steps" if self._begun is None else f"steps 1 to {self._begun - 1}"
        return [
            f"{which} were trained by an older version: what the ranks say they trained is not known, so that these are proved "
            "from the driver's lines alone"
        ]

    def described(self) -> str:
        """Describe how many ranks and steps have a record."""
        if not self._recorded:
            return "no record of what they trained"
        return f"{self._ranks}, whose own records were compared in {self._recorded} of {self._steps} steps"


def _is_sound(line: Step, records: Records, batch_size: int, passes: int, updates: int) -> bool:
    """Return True if the columns show that nothing differs; False leaves it to `differences`, which says what does."""
    ranks, count = len(records.trained), len(line.sample_ids)
    if not passes or len(records.dealt_digests) != ranks or not line.is_one_batch(batch_size):
        return False
    dealt = np.array(records.dealt, dtype=np.int64) if isinstance(records.dealt, list) else np.full(count, records.dealt)
    if len(dealt) != count or dealt.min() < 0 or dealt.max() >= ranks:
        return False
    kept = np.where(line.is_dropped, 0, line.tokens)
    for rank, record in enumerate(records.trained):
        given = dealt == rank
        own = offsets(record.samples, count)
        if own is None or not np.array_equal(own, np.flatnonzero(given)):
            return False
        if record.targets != passes * int(kept[given].sum()) or record.updates != updates:
            return False
        if record.digest != _times(records.dealt_digests[rank], passes):
            return False
    return True


def _times(digest: str, passes: int) -> str | None:
    try:
        return times(digest, passes)
    except ValueError:
        return None
