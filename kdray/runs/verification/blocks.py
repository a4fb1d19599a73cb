"""Lines of a ledger in blocks, whose columns are compared at once: most runs have nothing wrong, and this shows it.

A block is sound, or it says nothing: its lines are then looked at one by one, by the checks that also say what is wrong. So
what is asked of a block here has to be all that those ask of its lines.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import msgspec
import numpy as np

from kdray.config import Config
from kdray.data.dataset import PromptStream
from kdray.rollouts.training_digest import times
from kdray.runs.ledger import NOT_FINITE
from kdray.runs.verification.proof import Proof
from kdray.runs.verification.step_checks import Rules
from kdray.runs.verification.steps import Number, Outcomes, Shard, Step

SAMPLES = 4_096
"""Samples of a block, about: more of them no longer stay in the cache of a core."""
_LARGEST = 2**40
"""Numbers up to here are summed up without overflow."""
_HEX = frozenset("0123456789abcdef")
_DIGITS = 32


class _Whole(Outcomes, frozen=True):
    """Everything that is checked of a line: with `Records`, which msgspec cannot inherit from as well."""

    dealt: list[Number] | Number
    dealt_digests: list[str]
    trained: list[Shard]
    step: int
    sample_ids: list[int]
    dropped: dict[str, list[int]] = msgspec.field(default_factory=dict)


_WHOLE = msgspec.json.Decoder(_Whole)


class _Irregular(Exception):
    """The lines have to be looked at one by one."""


@dataclass(frozen=True)
class Block:
    """Lines of consecutive steps, without any fault; arrays have a row for each."""

    first: int
    """First step."""
    count: int
    """Number of lines."""
    staleness: list[int]
    """Per line, as for `Step.staleness`."""
    drawn: list[int]
    """Tokens of each line; below, without those of samples that were left out."""
    kept: list[int]
    left_out: list[int]
    """Samples that were left out of each line."""
    rules: Counter[str]
    """Samples by the rule that left them out."""
    scorers: Counter[str]
    """Samples by the teacher that scored them."""
    ranks: int

    @property
    def steps(self) -> range:
        return range(self.first, self.first + self.count)


class BlockChecks:
    """Checks of blocks of one run."""

    def __init__(self, config: Config, rules: Rules, stream: PromptStream | None) -> None:
        """Args: stream: None if the prompts are not there."""
        self._size = config.training.batch_size
        self._siblings = config.rollout.samples_per_prompt
        self._bound = config.rollout.max_staleness
        self._passes = config.training.inner_epochs
        self._updates = config.training.updates_per_step
        self._rules = rules
        self._stream = stream

    @property
    def lines(self) -> int:
        """Lines of a block."""
        return max(1, SAMPLES // self._size)

    def sound(self, raw: Sequence[bytes], left_out: int) -> Block | None:
        """Return what lines say in which nothing is wrong; None if something may be.

        Args: left_out: batches before these that were not finite, for which the optimizer made no update.
        """
        try:
            return self._sound([_WHOLE.decode(line) for line in raw], left_out)
        except (msgspec.MsgspecError, UnicodeDecodeError, _Irregular, TypeError, OverflowError, ValueError):
            # Of numbers, too, which no column can hold.
            return None

    def _sound(self, lines: Sequence[_Whole], left_out: int) -> Block:
        count, size, first = len(lines), self._size, lines[0].step
        for at, line in enumerate(lines, first):
            begin = (at - 1) * size
            _demand(line.step == at and line.sample_ids == list(range(begin, begin + size)) and NOT_FINITE not in line.dropped)
        dropped, rules, numbers = self._left_out(lines)
        tokens = self._column([line.tokens for line in lines])
        _demand(tokens.min() >= 0 and tokens.max() < _LARGEST)
        kept = np.where(dropped, 0, tokens)
        kept_sums = kept.sum(1)
        _demand(kept_sums.tolist() == [line.trained_tokens for line in lines])
        drawn = tokens != 0
        oldest = self._versions([line.oldest for line in lines], drawn)
        newest = self._versions([line.newest for line in lines], drawn)
        before = np.arange(first - 1, first - 1 + count)[:, None]
        within = (oldest >= np.maximum(0, before - self._bound)) & (oldest <= newest) & (newest <= before)
        _demand(bool((within | ~drawn).all()))
        self._check_prompts(first, self._column([line.prompt_ids for line in lines]))
        ranks = self._check_records(lines, kept, (first - left_out) * self._updates)
        staleness = np.where(drawn, before - oldest, 0).max(1)
        return Block(
            first,
            count,
            staleness.tolist(),
            tokens.sum(1).tolist(),
            kept_sums.tolist(),
            numbers,
            rules,
            self._scorers(lines),
            ranks,
        )

    def _column(self, values: Sequence[list[int] | int]) -> np.ndarray:
        """One number per sample, int64 [lines, samples]; a line with one for all repeats it."""
        size = self._size
        # Reads lists several times faster than numpy does.
        numbers = array("q")
        for value in values:
            row = value if isinstance(value, list) else [value] * size
            _demand(len(row) == size)
            numbers.fromlist(row)
        return np.frombuffer(numbers, dtype=np.int64).reshape(-1, size)

    def _versions(self, values: Sequence[list[int | None] | int | None], drawn: np.ndarray) -> np.ndarray:
        """Versions as a column, which are known where a sample has tokens, and nowhere else; 0 stands there."""
        unknown = any(value is None or (isinstance(value, list) and None in value) for value in values)
        if not unknown:
            _demand(bool(drawn.all()))
            return self._column(values)  # type: ignore[arg-type]
        rows = [value if isinstance(value, list) else [value] * self._size for value in values]
        missing = np.array([[each is None for each in row] for row in rows])
        _demand(missing.shape == drawn.shape and bool((missing != drawn).all()))
        return self._column([[0 if each is None else each for each in row] for row in rows])

    def _left_out(self, lines: Sequence[_Whole]) -> tuple[np.ndarray, Counter[str], list[int]]:
        """Which samples were left out, bool [lines, samples]; how many by each rule; how many of each line."""
        found = np.zeros((len(lines), self._size), dtype=bool)
        rules: Counter[str] = Counter()
        numbers = [0] * len(lines)
        for at, line in enumerate(lines):
            if line.dropped:
                judged = Proof()
                step = Step(line.step, line.sample_ids, line.dropped, b"")
                self._rules.check(judged, step)
                _demand(not judged.problems)
                found[at] = step.is_dropped
                rules.update({rule: len(ids) for rule, ids in line.dropped.items()})
                numbers[at] = len(step.dropped)
        return found, rules, numbers

    def _check_prompts(self, first: int, prompts: np.ndarray) -> None:
        """Check that samples of one prompt have one, and that seed and position give it."""
        begin = (first - 1) * self._size
        positions = np.arange(begin, begin + prompts.size) // self._siblings
        rows = positions.reshape(prompts.shape)
        # Within a line, as they are compared one by one.
        _demand(not ((rows[:, 1:] == rows[:, :-1]) & (prompts[:, 1:] != prompts[:, :-1])).any())
        if self._stream is not None:
            _demand(np.array_equal(prompts.ravel(), self._stream.ids_at(np.maximum(0, positions))))

    def _check_records(self, lines: Sequence[_Whole], kept: np.ndarray, updates: int) -> int:
        """Check the ranks' records, of equally many ranks. Args: updates: due in the first line. Returns: ranks."""
        count, size, ranks = len(lines), self._size, len(lines[0].trained)
        _demand(ranks > 0 and all(len(line.trained) == len(line.dealt_digests) == ranks for line in lines))
        records = [record for line in lines for record in line.trained]
        dealt = self._column([line.dealt for line in lines])
        _demand(dealt.min() >= 0 and dealt.max() < ranks)
        # Number of the record that a sample belongs to.
        owner = (dealt + np.arange(0, count * ranks, ranks)[:, None]).ravel()
        begins, lasts = self._ranges(records)
        _demand(begins.min() >= 0 and lasts.max() < size and bool((begins <= lasts).all()))
        lengths = lasts - begins + 1
        _demand(int(lengths.sum()) == count * size)
        of_part = np.repeat(np.arange(len(records)), [len(record.samples) for record in records])
        starts = np.cumsum(lengths) - lengths
        offsets = np.arange(count * size) - np.repeat(starts - begins, lengths)
        of_sample = np.repeat(of_part, lengths)
        told = np.full(count * size, -1)
        # As many as there are places: one that is written twice leaves another out.
        told[of_sample // ranks * size + offsets] = of_sample
        _demand(np.array_equal(told, owner))
        targets = np.bincount(owner, kept.ravel(), minlength=len(records)).astype(np.int64) * self._passes
        _demand(targets.tolist() == [record.targets for record in records])
        due = np.repeat(np.arange(updates, updates + count * self._updates, self._updates), ranks)
        _demand(due.tolist() == [record.updates for record in records])
        self._check_digests([digest for line in lines for digest in line.dealt_digests], [each.digest for each in records])
        return ranks

    def _ranges(self, records: Sequence[Shard]) -> tuple[np.ndarray, np.ndarray]:
        """First and last offset of each part of the records, in order, int64 [parts]."""
        begins, lasts = array("q"), array("q")
        for record in records:
            try:
                # Offsets that stand alone, as where samples are dealt by their length: nothing is asked of each by itself.
                begins.fromlist(record.samples)  # type: ignore[arg-type]
                lasts.fromlist(record.samples)  # type: ignore[arg-type]
            except TypeError:
                parts = [part if isinstance(part, list) else [part, part] for part in record.samples]
                _demand({2}.issuperset(map(len, parts)))
                begins.fromlist([part[0] for part in parts])
                lasts.fromlist([part[1] for part in parts])
        return np.frombuffer(begins, dtype=np.int64), np.frombuffer(lasts, dtype=np.int64)

    def _check_digests(self, dealt: Sequence[str], trained: Sequence[str]) -> None:
        if self._passes == 1 and _HEX.issuperset("".join(dealt)) and all(len(digest) == _DIGITS for digest in dealt):
            _demand(dealt == trained)
        else:
            _demand([times(digest, self._passes) for digest in dealt] == trained)

    def _scorers(self, lines: Sequence[_Whole]) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in lines:
            if isinstance(line.scored_by, list):
                _demand(len(line.scored_by) == self._size)
                found.update(line.scored_by)
            else:
                found[line.scored_by] += self._size
        return found


def in_blocks(lines: Iterable[tuple[int, bytes]], size: int) -> Iterator[list[tuple[int, bytes]]]:
    """Divide numbered lines into blocks of `size`, the last one of what is left."""
    rest = iter(lines)
    while block := list(islice(rest, size)):
        yield block


def _demand(condition: bool | np.bool_) -> None:
    if not condition:
        raise _Irregular
