"""Teacher that replays recorded outputs: the stored answers and scores of a prompt, whenever it is requested.

Only the row groups needed are read, so that a capture may be larger than memory. For the files, see `kdray.capturing.format`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdray.capturing.format import (
    MANIFEST,
    SIGNAL_COLUMNS,
    check_model,
    digest,
    find_shards,
    footer_digest,
    read_manifest,
    reading,
    signals,
)
from kdray.config import CaptureTeacherSettings, ModelSource
from kdray.config.signals import Signal
from kdray.errors import ConfigError, DataError, RequestRefused, VocabError
from kdray.interfaces import Availability
from kdray.models.vocab import tokenizer_hash
from kdray.rollouts.arrow import ROLLOUT_SCHEMA, row_writers, table_to_rollouts
from kdray.rollouts.columns import rollout_columns, value_of, with_columns
from kdray.teachers.fingerprint import Fingerprint
from kdray.teachers.kind import Found, TeacherContext, TeacherKind
from kdray.teachers.team import prompts_of
from kdray.types import WRITERS, Prompt, Rollout, SampleRequest

_SAID = frozenset(column.name for column in rollout_columns() if column.stage == "scoring" or column.of_student)
"""Columns read only if they belong to a signal that every row has; those of the capturing run's student are never read."""
_INDEXED = ["sample_id", "alpha", "prompt_ids", "token_ids"]

CACHED_GROUPS = 4
"""Number of row groups that a teacher caches."""


Asked = TypeVar("Asked")


class _Place(NamedTuple):
    """Location of an answer; places sort in the order in which the answers of a prompt take turns."""

    sample_id: int
    """Sample id in the capturing run: the order does not depend on how its rows were split over shards."""
    shard: int
    group: int
    row: int
    num_tokens: int


class CaptureKind(TeacherKind[CaptureTeacherSettings]):
    """Teacher kind that reads answers from disk."""

    def offers(self) -> frozenset[Signal]:
        # `sampled` must hold for any response, and nothing is known about one that was not recorded.
        said: set[Signal] = {signal for signal in signals(self.settings.path) if signal != "sampled"}
        return frozenset(said if self.settings.model is not None else said - {"hidden"})

    def remedy(self, signal: Signal) -> str | None:
        if signal in ("text", "references", "top_k"):
            return "capture what the run needs (`kdray capture` with its settings), or use the teacher itself"
        if signal == "hidden":
            return "capture with rollout.teacher_signal=hidden, and name the teacher's model, whose output head the ranks take"
        return None

    def check(self, tokenizer: Any, student_rows: int) -> Found:
        manifest = read_manifest(self.settings.path)
        if self.settings.model is not None:
            check_model(f"teachers.{self.name}.model", manifest, self.settings.model, self.settings.revision)
        return Found(vocab_size=None if manifest is None else manifest.vocab_size)

    def check_with_data(self, context: TeacherContext) -> str:
        captured, limit = self.open(context), context.config.rollout.max_new_tokens
        if captured.longest_answer > limit:
            raise ConfigError(
                f"rollout.max_new_tokens={limit}, but the longest answer of teachers.{self.name} has "
                f"{captured.longest_answer} tokens; raise it to that"
            )
        return f"teacher {self.name}: recorded answers in {self.settings.path}, with {', '.join(sorted(captured.signals))}"

    @property
    def model(self) -> tuple[ModelSource, str | None] | None:
        # Only its output head, which turns recorded states into rows.
        if self.settings.model is None or self.config.rollout.teacher_signal != "hidden":
            return None
        return self.settings.model, self.settings.revision

    def recorded_answers(self) -> dict[str, str]:
        return {shard.name: footer_digest(shard) for shard in find_shards(self.settings.path)}

    def open(self, context: TeacherContext) -> CapturedTeacher:
        asked = prompts_of(context.config, self.name, context.dataset.train)
        return CapturedTeacher(self.name, self.settings.path, asked, context.vocab_size, tokenizer_hash(context.tokenizer))


class CapturedTeacher:
    """A Teacher (`kdray.interfaces`) that returns recorded answers, and scores the responses that it holds.

    Answers omit the signals of the capturing run's student (its log q and KLs), and columns that only some rows have.
    """

    def __init__(self, name: str, path: Path, prompts: Sequence[Prompt], vocab_size: int, tokenizer: str) -> None:
        """Args: prompts: all that may be requested, found by their token ids; vocab_size: ids that teacher and student share;
              tokenizer: `kdray.models.vocab.tokenizer_hash` of the student's.
        Raises: DataError if the capture is missing, broken, of another tokenizer, or lacks a prompt; VocabError if it has ids
        that the student lacks.
        """
        self.name = name
        self.retried = 0
        """Always 0: nothing is sent, so nothing is retried."""
        self.availability = Availability()
        """No outage ever begins: a missing file does not come back."""
        self._path = path
        self._vocab_size = vocab_size
        self.manifest = read_manifest(path)
        self._shards = find_shards(path)
        self._check_manifest(tokenizer)
        self.signals = signals(path)
        """Signals that every row of the capture has."""
        self._said = [column for signal, columns in SIGNAL_COLUMNS.items() if signal in self.signals for column in columns]
        self._read = [name for name in ROLLOUT_SCHEMA.names if name not in _SAID or name in self._said]
        self._drawn: dict[bytes, list[_Place]] = {digest(prompt.token_ids): [] for prompt in prompts}
        """Answers sampled by the teacher, by the digest of the prompt's ids."""
        self._by_seed: dict[bytes, _Place] = {}
        """The same answers by prompt and seed (`_seeded`), if the seeds were recorded."""
        self._by_tokens: dict[bytes, _Place] = {}
        """Every row, by the digests of prompt and response."""
        self._index(prompts)
        self._group = lru_cache(maxsize=CACHED_GROUPS)(self._read_group)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest sampled answer to the prompts: the smallest `rollout.max_new_tokens` that rejects none."""
        return max((place.num_tokens for places in self._drawn.values() for place in places), default=0)

    async def check(self) -> None:
        """No-op: the constructor has checked all rows."""

    async def fingerprint(self, canary: Sequence[int]) -> Fingerprint | None:
        """The recorded teacher's fingerprint, over the recorded canary; None for a black box."""
        return None if self.manifest is None else self.manifest.fingerprint

    async def close(self) -> None:
        """Release the cached row groups."""
        self._group.cache_clear()

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`: returns the answer sampled with the request's own seed, if there is one.

        Otherwise a prompt's answers take turns by sample id. In both cases a repeated request gets the same answer.
        Raises: RequestRefused for an alpha other than 1, an unknown prompt, or an answer longer than max_new_tokens; DataError
        if the files changed or an answer does not fit its tokens.
        """
        found = self._groups([(request, self._place(request)) for request in requests])
        for shard, asked in found:
            yield await asyncio.to_thread(self._answers, *shard, asked)

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`, for recorded responses only, such as reference answers, found by their ids.

        Raises: RequestRefused for another response, or for ids listed by the caller; DataError as for `sample`.
        """
        found = self._groups([(rollout, self._scored_place(rollout, top_k)) for rollout in rollouts])
        for shard, asked in found:
            yield await asyncio.to_thread(self._scores, *shard, asked)

    def _groups(self, asked: Sequence[tuple[Asked, _Place]]) -> Iterator[tuple[tuple[int, int], list[tuple[Asked, _Place]]]]:
        """Requested items by (shard, row group), so that each group is read once."""
        wanted: dict[tuple[int, int], list[tuple[Asked, _Place]]] = defaultdict(list)
        for each, place in asked:
            wanted[place.shard, place.group].append((each, place))
        yield from wanted.items()

    # ------------------------------------------------------------------------------------------------------ index

    def _check_manifest(self, tokenizer: str) -> None:
        if self.manifest is None:
            return
        setting = f"teachers.{self.name}.path={self._path}"
        if self.manifest.tokenizer != tokenizer:
            raise DataError(
                f"{setting}: the capture was made with tokenizer {self.manifest.tokenizer}, and the student's is {tokenizer}: "
                "ids would mean other tokens; capture again with this student, or use a student with that tokenizer"
            )
        if self.manifest.vocab_size > self._vocab_size:
            raise VocabError(
                f"{setting}: the capture's distributions cover {self.manifest.vocab_size} ids, and the student has "
                f"{self._vocab_size}; "
                "capture again with this student"
            )
        found = sum(pq.read_metadata(shard).num_rows for shard in self._shards)
        if found < self.manifest.rollouts:
            raise DataError(
                f"{setting}: the shards hold {found} of the {self.manifest.rollouts} rollouts that {MANIFEST} counts; restore "
                "the missing shards, or capture again"
            )

    def _index(self, prompts: Sequence[Prompt]) -> None:
        """Build the index of every answer to the prompts."""
        answered = set()
        for number, path in enumerate(self._shards):
            with reading(path), pq.ParquetFile(path) as shard:
                # Captures made by `kdray capture` record the seed of each sample.
                names = [name for name in (*_INDEXED, "writer", "seed") if name in shard.schema_arrow.names]
                for group in range(shard.num_row_groups):
                    table = shard.read_row_group(group, columns=names)
                    columns = [table.column(name) for name in _INDEXED]
                    writers = [WRITERS[code] for code in row_writers(table)]
                    seeds = table.column("seed").to_pylist() if "seed" in names else [None] * table.num_rows
                    for row, (seed, writer, sample_id, alpha, prompt_ids, token_ids) in enumerate(
                        zip(seeds, writers, *columns, strict=True)
                    ):
                        if not prompt_ids.is_valid or not token_ids.is_valid:
                            raise DataError(f"{path}: row {row} of row group {group} has no prompt or no answer; capture again")
                        prompt = digest(_ids(prompt_ids))
                        if prompt not in self._drawn:
                            continue
                        answered.add(prompt)
                        if writer not in ("teacher", "data"):
                            raise DataError(
                                f"{path}: sample {sample_id} was drawn at alpha {alpha.as_py():g}, so that a student wrote "
                                "some of it; capture with rollout.alpha=1"
                            )
                        self._check_ids(path, sample_id.as_py(), _ids(token_ids))
                        place = _Place(sample_id.as_py(), number, group, row, len(token_ids.values))
                        self._by_tokens[prompt + digest(_ids(token_ids))] = place
                        if writer == "teacher":
                            self._drawn[prompt].append(place)
                            if seed is not None:
                                self._by_seed[_seeded(prompt, seed)] = place
        for places in self._drawn.values():
            places.sort()
        missing = [prompt for prompt in prompts if digest(prompt.token_ids) not in answered]
        if missing:
            unfinished = self.manifest is not None and not self.manifest.complete
            raise DataError(
                f"teachers.{self.name}.path={self._path}: {len(missing)} of {len(prompts)} prompts have no answer there, first "
                f"prompt {missing[0].prompt_id} ({missing[0].text[:60]!r}, {len(missing[0].token_ids)} tokens); "
                + ("the capture is not complete: start `kdray capture` again, it goes on" if unfinished else "capture them too")
                + ", or take them out of data.prompts"
            )

    def _check_ids(self, path: Path, sample_id: int, token_ids: np.ndarray) -> None:
        strange = token_ids[(token_ids < 0) | (token_ids >= self._vocab_size)]
        if len(strange):
            raise VocabError(
                f"{path}: sample {sample_id} holds id {strange[0]}, and the student has {self._vocab_size}; capture again with "
                "this student"
            )

    def _place(self, request: SampleRequest) -> _Place:
        if request.writer != "teacher":
            raise RequestRefused(
                f"teachers.{self.name}.type=capture: recorded answers are the teacher's alone, at alpha 1, not "
                f"{request.alpha:g}; set rollout.alpha=1"
            )
        prompt = digest(request.prompt_ids)
        places = self._drawn.get(prompt)
        if places is None:
            raise RequestRefused(
                f"sample {request.sample_id}: prompt {request.prompt_id} is none of those that teachers.{self.name} was opened "
                f"for; add an answer to it to {self._path}"
            )
        if not places:
            raise RequestRefused(
                f"sample {request.sample_id}: {self._path} holds the reference answer of prompt {request.prompt_id}, and none "
                "that the teacher wrote; set rollout.data_share=1, or capture more"
            )
        place = self._by_seed.get(_seeded(prompt, request.seed)) or places[request.sample_id % len(places)]
        if place.num_tokens > request.max_new_tokens:
            # Truncated, it would come from a different distribution over sequences: the teacher did not stop there.
            raise RequestRefused(
                f"rollout.max_new_tokens={request.max_new_tokens}, but the answer of teachers.{self.name} to prompt "
                f"{request.prompt_id} has {place.num_tokens} tokens; set it to {self.longest_answer}, the longest one's, or "
                "capture with fewer"
            )
        return place

    def _scored_place(self, rollout: Rollout, top_k: bool) -> _Place:
        if rollout.support_ids is not None or not top_k:
            raise RequestRefused(
                f"teachers.{self.name}.type=capture: recorded rows say nothing at ids that another teacher names; take it out "
                "of the ensemble, or use the teacher itself"
            )
        if not self._said:
            raise RequestRefused(f"teachers.{self.name}.type=capture: {self._path} holds text alone; set loss.type=sequence")
        place = self._by_tokens.get(digest(rollout.prompt_ids) + digest(rollout.token_ids))
        if place is None:
            raise RequestRefused(
                f"teachers.{self.name}.type=capture: recorded answers say nothing of other sequences, such as sample "
                f"{rollout.sample_id} of prompt {rollout.prompt_id}; set rollout.alpha=1 with rollout.sampler=mixture and no "
                "ensemble, capture the reference answers (rollout.data_share), or use the teacher itself"
            )
        return place

    # ------------------------------------------------------------------------------------------------------- rows

    def _read_group(self, shard: int, group: int) -> pa.Table:
        path = self._shards[shard]
        with reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            there = set(file.schema_arrow.names)
            return file.read_row_group(group, columns=[name for name in self._read if name in there])

    def _rows(self, shard: int, group: int, places: list[_Place]) -> list[Rollout]:
        # Rows are copied: a view of one would keep its whole row group in memory for as long as the rollout waits.
        return table_to_rollouts(self._group(shard, group).take([place.row for place in places]))

    def _answers(self, shard: int, group: int, asked: list[tuple[SampleRequest, _Place]]) -> list[Rollout]:
        stored = self._rows(shard, group, [place for _, place in asked])
        return [
            self._answer(request, rollout, self._shards[shard]) for (request, _), rollout in zip(asked, stored, strict=True)
        ]

    def _answer(self, request: SampleRequest, stored: Rollout, path: Path) -> Rollout:
        self._check_row(request.prompt_ids, stored, path)
        return replace(
            stored,
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            student_versions=np.full(len(stored.token_ids), request.min_version, dtype=np.int32),
            alpha=1.0,
            teacher=self.name,
        )

    def _scores(self, shard: int, group: int, asked: list[tuple[Rollout, _Place]]) -> list[Rollout]:
        stored = self._rows(shard, group, [place for _, place in asked])
        return [self._scored(rollout, row, self._shards[shard]) for (rollout, _), row in zip(asked, stored, strict=True)]

    def _scored(self, rollout: Rollout, stored: Rollout, path: Path) -> Rollout:
        self._check_row(rollout.prompt_ids, stored, path)
        return with_columns(rollout, {name: value_of(stored, name) for name in self._said}, teacher=self.name)

    def _check_row(self, prompt_ids: np.ndarray, stored: Rollout, path: Path) -> None:
        columns = {column.name: value_of(stored, column.name) for column in rollout_columns()}
        lengths = {name: len(values) for name, values in columns.items() if values is not None}
        problems = [
            f"its {name} does not fit its tokens" for name, length in lengths.items() if length != len(stored.token_ids)
        ]
        if not np.array_equal(stored.prompt_ids, prompt_ids):
            problems.append("it answers another prompt than at the start of the run")
        if stored.support_ids is not None and stored.support_ids.max(initial=-1) >= self._vocab_size:
            problems.append(f"its support names id {stored.support_ids.max()}, and the student has {self._vocab_size}")
        if problems:
            raise DataError(f"{path}: sample {stored.sample_id}: {problems[0]}; restore the file, or capture again")


def _seeded(prompt: bytes, seed: int) -> bytes:
    """A prompt's digest and a seed as one compact key: millions of them are kept."""
    return prompt + seed.to_bytes(8, "little")


def _ids(values: pa.ListScalar) -> np.ndarray:
    return values.values.to_numpy(zero_copy_only=False)
