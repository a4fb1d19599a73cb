"""Lines of a ledger for verification: read one at a time, decoded at once, and as columns of numbers.

The checks look at whole columns first. Only a line in which something is wrong is looked at sample by sample, to say what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from kdray.runs.ledger import NOT_FINITE
from kdray.runs.verification.proof import Proof

OUTCOMES = ("prompt_ids", "tokens", "oldest", "newest", "scored_by")
NO_VERSION = -(2**62)
"""Stands in a column of versions for null."""


Number = Annotated[int, msgspec.Meta(gt=NO_VERSION, le=2**62)]
"""Whole number that a column can hold."""


class _Line(msgspec.Struct, frozen=True):
    step: Number
    sample_ids: list[Number]
    dropped: dict[str, list[Number]] = {}


class Shard(msgspec.Struct, frozen=True):
    """A rank's own record of a step."""

    samples: list[Number | list[Number]]
    digest: str
    targets: int
    updates: int


class Outcomes(msgspec.Struct, frozen=True):
    """Columns of a line with the outcomes of its samples."""

    prompt_ids: list[Number] | Number
    tokens: list[Number] | Number
    oldest: list[Number | None] | Number | None
    newest: list[Number | None] | Number | None
    scored_by: list[str] | str
    trained_tokens: Number


class Records(msgspec.Struct, frozen=True):
    """Columns of a line with the ranks' records."""

    dealt: list[Number] | Number
    dealt_digests: list[str]
    trained: list[Shard]


class _Names(msgspec.Struct, frozen=True):
    trained: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_LINE = msgspec.json.Decoder(_Line)
_OUTCOMES = msgspec.json.Decoder(Outcomes)
_RECORDS = msgspec.json.Decoder(Records)
_NAMES = msgspec.json.Decoder(_Names)


@dataclass
class Step:
    """Well-formed line of the ledger."""

    step: int
    sample_ids: list[int]
    by_rule: Mapping[str, list[int]]
    raw: bytes

    @cached_property
    def line(self) -> dict[str, Any]:
        """The whole line."""
        found: dict[str, Any] = json.loads(self.raw)
        return found

    @cached_property
    def outcomes(self) -> Outcomes | None:
        """Outcomes of the samples; None if the line lacks them, or has another number of them."""
        try:
            found = _OUTCOMES.decode(self.raw)
        except msgspec.MsgspecError:
            return None
        count = len(self.sample_ids)
        columns = (found.prompt_ids, found.tokens, found.oldest, found.newest, found.scored_by)
        return found if all(len(each) == count for each in columns if isinstance(each, list)) else None

    @property
    def lacks_outcomes(self) -> bool:
        """True if the line has no columns for them, as in an early version."""
        return not all(name in self.line for name in (*OUTCOMES, "trained_tokens"))

    @cached_property
    def told(self) -> Outcomes:
        """Outcomes of a line that has them."""
        assert self.outcomes is not None
        return self.outcomes

    @cached_property
    def records(self) -> Records | None:
        """The ranks' records; None if there are none, or if they are not what a driver writes."""
        try:
            return _RECORDS.decode(self.raw)
        except msgspec.MsgspecError:
            return None

    @cached_property
    def is_recorded(self) -> bool:
        """True if the line has records of ranks, of whatever form."""
        return self.records is not None or _NAMES.decode(self.raw).trained is not msgspec.UNSET

    @cached_property
    def ids(self) -> np.ndarray:
        """Sample ids, int64 [samples]."""
        return np.array(self.sample_ids, dtype=np.int64)

    @cached_property
    def prompt_ids(self) -> np.ndarray:
        return self._numbers(self.told.prompt_ids)

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._numbers(self.told.tokens)

    @cached_property
    def oldest(self) -> np.ndarray:
        return self._versions(self.told.oldest)

    @cached_property
    def newest(self) -> np.ndarray:
        return self._versions(self.told.newest)

    def _numbers(self, column: list[int] | int) -> np.ndarray:
        return np.array(column, dtype=np.int64) if isinstance(column, list) else np.full(len(self.sample_ids), column, np.int64)

    def _versions(self, column: list[int | None] | int | None) -> np.ndarray:
        if isinstance(column, list):
            return np.array([NO_VERSION if each is None else each for each in column], dtype=np.int64)
        return np.full(len(self.sample_ids), NO_VERSION if column is None else column, dtype=np.int64)

    def column(self, name: str) -> list[Any]:
        """Return one value per sample; see `kdray.runs.ledger.sample_outcomes`."""
        value = self.line[name]
        return value if isinstance(value, list) else [value] * len(self.sample_ids)

    @cached_property
    def dropped(self) -> set[int]:
        return {sample_id for ids in self.by_rule.values() for sample_id in ids}

    @property
    def is_left_out(self) -> bool:
        """True if the whole batch was left out because its loss or gradient was not finite."""
        return NOT_FINITE in self.by_rule

    @cached_property
    def is_dropped(self) -> np.ndarray:
        """True for the samples that were left out, bool [samples]."""
        if not self.by_rule:
            return np.zeros(len(self.sample_ids), dtype=bool)
        return np.isin(self.ids, np.fromiter(self.dropped, np.int64, len(self.dropped)))

    @cached_property
    def kept_tokens(self) -> int:
        return int(self.tokens[~self.is_dropped].sum())

    @cached_property
    def drawn_tokens(self) -> int:
        return int(self.tokens.sum())

    @cached_property
    def staleness(self) -> int:
        known = self.oldest[self.oldest != NO_VERSION]
        return int((self.step - 1 - known).max()) if len(known) else 0

    def is_one_batch(self, batch_size: int) -> bool:
        """True if the samples are those of the step, in order."""
        first = (self.step - 1) * batch_size
        return self.sample_ids == list(range(first, first + batch_size))


def steps_in(proof: Proof, path: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[Step]:
    """Yield those of a ledger's lines that are well-formed; others are problems of the proof."""
    for number, raw in lines:
        try:
            line = _LINE.decode(raw)
        except (msgspec.ValidationError, OverflowError):
            proof.wrong("unreadable", f"{path.name} line {number} does not say which samples a step trained")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            proof.wrong("unreadable", f"{path}:{number}: not valid JSON: {error}; remove the line")
        else:
            yield Step(line.step, line.sample_ids, line.dropped, raw)


def offsets(samples: Sequence[int | list[int]], count: int) -> np.ndarray | None:
    """Expand the samples of a rank's record (`kdray.runs.training_record.training_columns`), int64.

    Args: count: of the samples in the batch. Returns: None if that is no record of such a batch.
    """
    found: list[int] = []
    for each in samples:
        if isinstance(each, int):
            found.append(each)
        elif len(each) == 2 and each[1] - each[0] < count:
            found += range(each[0], each[1] + 1)
        else:
            return None
    return np.array(found, dtype=np.int64)
