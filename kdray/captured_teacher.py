"""A teacher's answers recorded earlier, in Parquet: what it wrote and said of it, given again whenever its prompt is asked.

A capture is a folder of shards of `kdray.records.ROLLOUT_SCHEMA` and a `manifest.json`, which says whose answers they are and
names no file: the shards are the folder's `*.parquet`. One Parquet file alone is a capture without a manifest. Only row groups
that are asked for are read, so that a capture may be larger than memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdray.errors import DataError, RequestRefused, VocabError
from kdray.handshake import Fingerprint, difference
from kdray.outage import Outage
from kdray.records import ROLLOUT_SCHEMA, rollouts_to_table, table_to_rollouts
from kdray.run_folder import write_atomically
from kdray.types import Prompt, Rollout, SampleRequest

MANIFEST = "manifest.json"

Signal = Literal["text", "sampled", "top_k", "hidden"]

_SIGNALS: dict[Signal, tuple[str, ...]] = {
    "text": ("token_ids",),
    "sampled": ("teacher_logprobs",),
    "top_k": ("support_ids", "support_logprobs", "tail_logprobs"),
    "hidden": ("teacher_hidden",),
}
"""The columns that make each; a teacher's words for the same: `kdray.capabilities.Capability`."""

_ALWAYS_READ = ("sample_id", "prompt_id", "alpha", "finish_reason", "teacher", "prompt_ids", "token_ids", "mixture_logprobs")
_WIDTHS = ("support_width", "hidden_width")
_INDEXED = ["sample_id", "alpha", "prompt_ids", "token_ids"]

_GROUP_BYTES = 4 * 2**20
"""Size of a written row group in memory: prompts are asked for in any order, and each may cost the read of one."""
CACHED_GROUPS = 4
"""Row groups that a teacher keeps."""


@dataclass(frozen=True)
class Manifest:
    """Whose answers a capture holds."""

    fingerprint: Fingerprint | None
    """Of the teacher that answered; None for a black box."""
    tokenizer: str
    """`kdray.vocab.tokenizer_hash` of the tokenizer that prompts and answers are ids of: the capturing run's student's."""
    vocab_size: int
    """Ids that the recorded laws cover."""
    rollouts: int
    """Rows of all shards, so that a lost one is noticed."""


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a capture; None where it is one file. Raises: DataError."""
    if not path.exists():
        raise DataError(f"capture {path}: no such file or folder; name the folder of a capture, or one Parquet file")
    if path.is_file():
        return None
    file = path / MANIFEST
    if not file.is_file():
        raise DataError(f"capture {path}: the folder has no {MANIFEST}; name the folder of a capture, or one Parquet file")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        given = values["fingerprint"]
        fingerprint = None if given is None else Fingerprint.from_dict(given)
        manifest = Manifest(fingerprint, values["tokenizer"], values["vocab_size"], values["rollouts"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: not the manifest of a capture: {error!r}; capture again") from error
    if not (isinstance(manifest.tokenizer, str) and type(manifest.vocab_size) is type(manifest.rollouts) is int):
        raise DataError(f"{file}: tokenizer must be a text, vocab_size and rollouts whole numbers; capture again")
    return manifest


def write_capture(
    path: Path, rollouts: Sequence[Rollout], fingerprint: Fingerprint | None, tokenizer: str, vocab_size: int
) -> Path:
    """Add one shard to the capture in folder `path`, made where it is not there, and bring its manifest up to date.

    Shard and manifest appear whole or not at all, the shard first. One process at a time writes to a folder.
    Args: fingerprint, tokenizer, vocab_size: see `Manifest`. Returns: the shard.
    Raises: DataError where the capture is another teacher's, or a rollout is not the teacher's alone.
    """
    mixed = [rollout for rollout in rollouts if rollout.alpha != 1.0]
    if mixed:
        raise DataError(
            f"capture {path}: sample {mixed[0].sample_id} was drawn at alpha {mixed[0].alpha:g}, so that a student wrote some "
            "of it; capture with rollout.alpha=1"
        )
    path.mkdir(parents=True, exist_ok=True)
    if (path / MANIFEST).exists():
        before = read_manifest(path)
        assert before is not None
        reason = _another(before, fingerprint, tokenizer, vocab_size)
        if reason is not None:
            raise DataError(f"capture {path}: holds answers of another teacher: {reason}; write to another folder")
    table = rollouts_to_table(rollouts)
    rows = max(1, table.num_rows * _GROUP_BYTES // max(1, table.nbytes))
    numbers = [int(file.stem.removeprefix("part-")) for file in path.glob("part-*.parquet") if file.stem[5:].isdigit()]
    shard = path / f"part-{max(numbers, default=-1) + 1:05d}.parquet"
    # A name that no reader takes for a shard.
    temporary = path / f".{shard.name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, row_group_size=rows, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, shard)
    finally:
        temporary.unlink(missing_ok=True)
    total = sum(pq.read_metadata(file).num_rows for file in _shards(path))
    manifest = asdict(Manifest(fingerprint, tokenizer, vocab_size, total))
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return shard


def signals(path: Path) -> set[Signal]:
    """What every answer of a capture has, from the columns that are never null; nothing where it has no answers.

    Raises: DataError for a missing path, no Parquet files, or a schema that does not fit.
    """
    shards = _shards(path)
    if not any(pq.read_metadata(shard).num_rows for shard in shards):
        return set()
    return {
        signal for signal, columns in _SIGNALS.items() if all(_never_null(shard, name) for shard in shards for name in columns)
    }


class _Place(NamedTuple):
    """Where an answer stands, in the order in which those of one prompt take turns."""

    sample_id: int
    """Of the run that captured: the order does not depend on how its rows were split over shards."""
    shard: int
    group: int
    row: int
    num_tokens: int


class CapturedTeacher:
    """A Teacher (`kdray.interfaces`) that gives recorded answers, and scores nothing else.

    Left out of the answers: what the student of the capturing run said (its log q and KLs), and columns that only some have.
    """

    def __init__(self, name: str, path: Path, prompts: Sequence[Prompt], vocab_size: int, tokenizer: str) -> None:
        """Args: prompts: all that may be asked for, found by their token ids; vocab_size: ids that teacher and student share;
              tokenizer: `kdray.vocab.tokenizer_hash` of the student's.
        Raises: DataError where the capture is missing, broken, of another tokenizer, or lacks a prompt; VocabError where it has
        ids that the student has not.
        """
        self.name = name
        self.outage = Outage()
        """Never begins: a file does not come back."""
        self._path = path
        self._vocab_size = vocab_size
        self.manifest = read_manifest(path)
        self._shards = _shards(path)
        self._check_manifest(tokenizer)
        self.signals = signals(path)
        """What every answer has."""
        said = [column for signal, columns in _SIGNALS.items() if signal in self.signals for column in columns]
        self._read = [*dict.fromkeys([*_ALWAYS_READ, *_WIDTHS, *said])]
        self._places = self._index(prompts)
        self._group = lru_cache(maxsize=CACHED_GROUPS)(self._read_group)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer to the prompts: the least `rollout.max_new_tokens` that refuses none."""
        return max((place.num_tokens for places in self._places.values() for place in places), default=0)

    async def check(self) -> None:
        """Nothing is left to prove: construction looked at all rows."""

    async def close(self) -> None:
        """Let the cached row groups go."""
        self._group.cache_clear()

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`: a prompt's answers take turns by sample id, so a repeated request gets the same.

        Raises: RequestRefused for an alpha other than 1, an unknown prompt, or an answer longer than max_new_tokens; DataError
        where the files changed or an answer does not fit its tokens.
        """
        wanted: dict[tuple[int, int], list[tuple[SampleRequest, _Place]]] = defaultdict(list)
        for request in requests:
            place = self._place(request)
            wanted[place.shard, place.group].append((request, place))
        for (shard, group), asked in wanted.items():
            yield await asyncio.to_thread(self._answers, shard, group, asked)

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`. Raises: RequestRefused, always."""
        if rollouts:
            raise RequestRefused(
                f"teachers.{self.name}.type=capture: recorded answers say nothing of other sequences; set rollout.alpha=1 with "
                "rollout.sampler=mixture and no ensemble, or use the teacher itself"
            )
        yield []

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
                f"{setting}: the capture's laws cover {self.manifest.vocab_size} ids, and the student has {self._vocab_size}; "
                "capture again with this student"
            )
        found = sum(pq.read_metadata(shard).num_rows for shard in self._shards)
        if found < self.manifest.rollouts:
            raise DataError(
                f"{setting}: the shards hold {found} of the {self.manifest.rollouts} rollouts that {MANIFEST} counts; restore "
                "the missing shards, or capture again"
            )

    def _index(self, prompts: Sequence[Prompt]) -> dict[bytes, tuple[_Place, ...]]:
        """The places of every prompt's answers, by the hash of its ids."""
        places: dict[bytes, list[_Place]] = {_digest(prompt.token_ids): [] for prompt in prompts}
        for number, path in enumerate(self._shards):
            with pq.ParquetFile(path) as shard:
                for group in range(shard.num_row_groups):
                    table = shard.read_row_group(group, columns=_INDEXED)
                    columns = [table.column(name) for name in _INDEXED]
                    for row, (sample_id, alpha, prompt_ids, token_ids) in enumerate(zip(*columns, strict=True)):
                        if not prompt_ids.is_valid or not token_ids.is_valid:
                            raise DataError(f"{path}: row {row} of row group {group} has no prompt or no answer; capture again")
                        found = places.get(_digest(_ids(prompt_ids)))
                        if found is None:
                            continue
                        self._check_answer(path, sample_id.as_py(), alpha.as_py(), _ids(token_ids))
                        found.append(_Place(sample_id.as_py(), number, group, row, len(token_ids.values)))
        missing = [prompt for prompt in prompts if not places[_digest(prompt.token_ids)]]
        if missing:
            raise DataError(
                f"teachers.{self.name}.path={self._path}: {len(missing)} of {len(prompts)} prompts have no answer there, first "
                f"prompt {missing[0].prompt_id} ({missing[0].text[:60]!r}, {len(missing[0].token_ids)} tokens); capture them "
                "too, or take them out of data.prompts"
            )
        return {digest: tuple(sorted(found)) for digest, found in places.items()}

    def _check_answer(self, path: Path, sample_id: int, alpha: float, token_ids: np.ndarray) -> None:
        if alpha != 1.0:
            raise DataError(
                f"{path}: sample {sample_id} was drawn at alpha {alpha:g}, so that a student wrote some of it; capture with "
                "rollout.alpha=1"
            )
        strange = token_ids[(token_ids < 0) | (token_ids >= self._vocab_size)]
        if len(strange):
            raise VocabError(
                f"{path}: sample {sample_id} holds id {strange[0]}, and the student has {self._vocab_size}; capture again with "
                "this student"
            )

    def _place(self, request: SampleRequest) -> _Place:
        if request.alpha != 1.0:
            raise RequestRefused(
                f"teachers.{self.name}.type=capture: recorded answers are the teacher's alone, at alpha 1, not "
                f"{request.alpha:g}; set rollout.alpha=1"
            )
        places = self._places.get(_digest(request.prompt_ids))
        if places is None:
            raise RequestRefused(
                f"sample {request.sample_id}: prompt {request.prompt_id} is none of those that teachers.{self.name} was opened "
                f"for; add an answer to it to {self._path}"
            )
        place = places[request.sample_id % len(places)]
        if place.num_tokens > request.max_new_tokens:
            # Cut, it would be a law of other sequences: the teacher did not stop there.
            raise RequestRefused(
                f"rollout.max_new_tokens={request.max_new_tokens}, but the answer of teachers.{self.name} to prompt "
                f"{request.prompt_id} has {place.num_tokens} tokens; set it to {self.longest_answer}, the longest one's, or "
                "capture with fewer"
            )
        return place

    # ------------------------------------------------------------------------------------------------------- rows

    def _read_group(self, shard: int, group: int) -> pa.Table:
        with pq.ParquetFile(self._shards[shard]) as file:
            table = file.read_row_group(group, columns=self._read)
        columns = [
            table.column(field.name) if field.name in self._read else pa.nulls(table.num_rows, field.type)
            for field in ROLLOUT_SCHEMA
        ]
        return pa.table(columns, schema=ROLLOUT_SCHEMA)

    def _answers(self, shard: int, group: int, asked: list[tuple[SampleRequest, _Place]]) -> list[Rollout]:
        # Rows are copied: a view of one would keep its whole row group for as long as the rollout waits.
        stored = table_to_rollouts(self._group(shard, group).take([place.row for _, place in asked]))
        return [
            self._answer(request, rollout, self._shards[shard]) for (request, _), rollout in zip(asked, stored, strict=True)
        ]

    def _answer(self, request: SampleRequest, stored: Rollout, path: Path) -> Rollout:
        tokens = len(stored.token_ids)
        columns: dict[str, Any] = {name: getattr(stored, name) for each in _SIGNALS.values() for name in each}
        columns["mixture_logprobs"] = stored.mixture_logprobs
        lengths = {name: len(values) for name, values in columns.items() if values is not None}
        problems = [f"its {name} does not fit its tokens" for name, length in lengths.items() if length != tokens]
        if not np.array_equal(stored.prompt_ids, request.prompt_ids):
            problems.append("it answers another prompt than at the start of the run")
        if stored.support_ids is not None and stored.support_ids.max(initial=-1) >= self._vocab_size:
            problems.append(f"its support names id {stored.support_ids.max()}, and the student has {self._vocab_size}")
        if problems:
            raise DataError(f"{path}: sample {stored.sample_id}: {problems[0]}; restore the file, or capture again")
        return replace(
            stored,
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            student_versions=np.full(tokens, request.min_version, dtype=np.int32),
            alpha=1.0,
            teacher=self.name,
        )


def _shards(path: Path) -> list[Path]:
    """The Parquet files of a capture. Raises: DataError where there is none, or one has another schema."""
    if not path.exists():
        raise DataError(f"capture {path}: no such file or folder; name the folder of a capture, or one Parquet file")
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not shards:
        raise DataError(f"capture {path}: the folder has no *.parquet; name the folder of a capture, or one Parquet file")
    for shard in shards:
        try:
            schema = pq.read_schema(shard)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{shard}: cannot be read as Parquet: {error}; restore it, or capture again") from error
        for field in ROLLOUT_SCHEMA:
            found = schema.field(field.name).type if schema.names.count(field.name) == 1 else "absent"
            if found != field.type:
                raise DataError(
                    f"{shard}: column {field.name} is {found}, and rollouts have {field.type}; name a capture of this version"
                )
    return shards


def _never_null(path: Path, column: str) -> bool:
    with pq.ParquetFile(path) as shard:
        metadata = shard.metadata
        leaf = [metadata.schema.column(index).path.split(".")[0] for index in range(metadata.num_columns)].index(column)
        for group in range(metadata.num_row_groups):
            counts = metadata.row_group(group).column(leaf).statistics
            # The count is of values, where an answer without tokens counts like a null: only zero decides without a look.
            if counts is not None and counts.has_null_count and counts.null_count == 0:
                continue
            if shard.read_row_group(group, columns=[column]).column(0).null_count:
                return False
    return True


def _another(before: Manifest, fingerprint: Fingerprint | None, tokenizer: str, vocab_size: int) -> str | None:
    """What makes new answers another teacher's than those before; None where they are the same one's."""
    if before.tokenizer != tokenizer:
        return f"its tokenizer is {before.tokenizer}, not {tokenizer}"
    if before.vocab_size != vocab_size:
        return f"it has {before.vocab_size} ids, not {vocab_size}"
    if before.fingerprint is None or fingerprint is None:
        return None if before.fingerprint is fingerprint else "one of them is a black box"
    return difference(before.fingerprint, fingerprint)


def _ids(values: pa.ListScalar) -> np.ndarray:
    return values.values.to_numpy(zero_copy_only=False)


def _digest(token_ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.asarray(token_ids, dtype="<i4").tobytes(), digest_size=16).digest()
