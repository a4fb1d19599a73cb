"""Draws of a batch's sampling requests, and the records of sampling and scoring requests. Independent of vLLM.

A decode step waits for nothing: what it needs of the requests is on the device when it begins (`set_batch`, `advance`),
tokens are drawn and measured there, and the results reach the host while later steps run. They are read when a request has
finished (`take`).

Records are keyed by request and indexed by position, because vLLM evaluates positions more than once: partial prefills,
preemption and surplus rows after the last token. A later evaluation of a position replaces the earlier one; the reader
truncates to the output's length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from actors.vllm_plugin.record_table import FLOATS, HIDDEN, INTS, Slab
from actors.vllm_plugin.row_statistics import Rows, RowStatistics, draw_rows, probabilities
from actors.vllm_plugin.transfers import Arrival, Readback, to_device
from kdray.rollouts.mixture import hashes, uniforms_of

# Rows that are drawn or measured at once: four temporary arrays [rows, vocab] of float32, 0.6 GiB at a vocabulary of 152k. When
# scoring, the rows themselves and the logits that they come from take as much again.
CHUNK_ROWS = 256

# Of requests whose keys and values are always the present student's.
NEWEST = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Request:
    """What the recorder knows of a request of the engine."""

    key: str
    score: bool
    drawn: Sized
    """As long as the number of tokens drawn for it, which is the position of its next one: the engine's own list of them, or a
    count."""
    alpha: float = 0.0
    seed: int = 0
    sequence: np.ndarray | None = None  # [L] int32: the ids of a sequence to be scored, with its last one
    start: int = 0
    """Number of prompt tokens of `sequence`; the rest is its response."""
    asked: np.ndarray | None = None  # [T, M] int32: ids at which a scoring request wants log p; -1 is unused
    top_k: bool = True
    kv_version: int = NEWEST
    """Version of the student since which the request's keys and values have been written, if updates keep them."""
    student_only: bool = False
    """Drawn from the student alone: the teacher's rows of this request mean nothing, since it has no keys and values of it."""

    @staticmethod
    def of(args: Mapping[str, Any], drawn: Sized) -> Request:
        """A request by the arguments that kdray's engine sent with it. Args: args: `extra_args["kdray"]`."""
        return Request(
            key=args["key"],
            score=args["mode"] == "score",
            drawn=drawn,
            alpha=args.get("alpha", 0.0),
            seed=args.get("seed", 0),
            sequence=np.frombuffer(args["ids"], dtype=np.int32) if "ids" in args else None,
            start=args.get("start", 0),
            asked=np.frombuffer(args["asked"], dtype=np.int32).reshape(-1, args["width"]) if "asked" in args else None,
            top_k=args.get("top_k", True),
            kv_version=args.get("kv_version", NEWEST),
            student_only=args.get("student_only", False),
        )


class Chunk(NamedTuple):
    """Tokens of a request that one forward pass processes."""

    row: int
    """Index of the first one among the tokens of the pass."""
    position: int
    """Its position in the request."""
    length: int


class _Cell(NamedTuple):
    """Recorded position: a row of a step's arrays, which the requests of that step share."""

    arrival: Arrival
    row: int


class _Sampled:
    """Sampling requests of a batch that are drawn from rows of the same models, with what a step needs on the device."""

    def __init__(self, requests: Sequence[tuple[int, Request]], device: torch.device) -> None:
        self.requests = [request for _, request in requests]
        rows = np.array([row for row, _ in requests], dtype=np.int64)
        # The usual batch is alike sampling requests alone, whose rows are then read in place.
        self.in_place = bool((rows == np.arange(len(rows))).all())
        self.rows = to_device(rows, device)
        alpha = np.array([[request.alpha] for request in self.requests], dtype=np.float32).reshape(-1, 1)
        self.alpha = to_device(alpha, device)
        seeds = np.array([request.seed for request in self.requests], dtype=np.uint64)
        self.seeds = to_device(seeds.view(np.int64), device)
        kv_versions = np.array([request.kv_version for request in self.requests], dtype=np.int64)
        self.kv_versions = to_device(kv_versions, device)
        self._device = device
        self.advance()

    def advance(self) -> None:
        """Note how many tokens every request has."""
        self.lengths = np.array([len(request.drawn) for request in self.requests], dtype=np.int64)
        self.positions = to_device(self.lengths, self._device)


class BatchRecorder:
    """Recorder of one worker process.

    Tensor-parallel ranks draw the same tokens from the same rows; only one of them keeps records.
    """

    def __init__(self, statistics: RowStatistics, device: torch.device, keeps_records: bool) -> None:
        self.statistics = statistics
        self.device = device
        self.keeps_records = keeps_records
        self.readback = Readback(device)
        self.cells: dict[str, dict[int, _Cell]] = {}
        self.readmitted = 0
        self.recomputed_tokens = 0
        self._checksum = torch.zeros((), dtype=torch.int64, device=device)
        self.set_batch({})

    def admit(self, key: str, tokens: int = 0) -> None:
        """Make room for a request's records. One that returns after preemption keeps the positions recorded before.

        Args: tokens: length of the request, which is computed again if it returns.
        """
        if not self.keeps_records:
            return
        if key in self.cells:
            self.readmitted += 1
            self.recomputed_tokens += tokens
        self.cells.setdefault(key, {})

    def set_batch(self, requests: Mapping[int, Request]) -> None:
        """Set the requests of the following steps. Args: requests: row in the batch -> its request."""
        ordered = sorted(requests.items())
        self.scoring = [(row, request) for row, request in ordered if request.score]
        sampling = [(row, request) for row, request in ordered if not request.score]
        mixed = [(row, request) for row, request in sampling if not request.student_only]
        alone = [(row, request) for row, request in sampling if request.student_only]
        self._mixed = _Sampled(mixed, self.device) if mixed else None
        self._alone = _Sampled(alone, self.device) if alone else None
        self.student_only_rows = len(alone)

    def advance(self) -> None:
        """Note how many tokens every request has: a step begins."""
        for sampled in (self._mixed, self._alone):
            if sampled is not None:
                sampled.advance()

    def sample(self, logits: torch.Tensor, rows: Rows, student_version: int) -> None:
        """Draw the next token of every sampling request, force the engine to choose it, and record it.

        Args: logits: [batch, declared vocab], the engine's, in which a drawn token becomes the largest; rows: the batch's rows,
              log-probabilities as the logits are; student_version: that of the present weights.
        """
        if self._mixed is not None:
            self._draw(self._mixed, logits, rows, student_version)
        if self._alone is not None:
            self._draw(self._alone, logits, Rows(None, rows.student, None), student_version)

    def _draw(self, sampled: _Sampled, logits: torch.Tensor, rows: Rows, student_version: int) -> None:
        count = len(sampled.requests)
        for start in range(0, count, CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, count))
            index = part if sampled.in_place else sampled.rows[part]
            alpha = sampled.alpha[part]
            chosen = Rows(*(None if each is None else each[index] for each in rows))
            masses = probabilities(chosen)
            hashed = hashes(sampled.seeds[part], sampled.positions[part])
            tokens = draw_rows(masses, alpha, uniforms_of(hashed))
            # A sum, which does not depend on the order of the rows; each draw's factor is odd, so that no token is lost in it.
            self._checksum += (hashed * (2 * tokens + 1)).sum()
            # No log-probability is as large as 1.
            logits.index_put_((sampled.rows[part], tokens), torch.ones_like(tokens, dtype=logits.dtype))
            if self.keeps_records:
                versions = sampled.kv_versions[part].clamp(max=student_version)
                measured = self.statistics.measure(chosen, masses, tokens, versions, alpha=alpha)
                arrival = self.readback.send(measured)
                for row, request in enumerate(sampled.requests[part]):
                    self.cells[request.key][int(sampled.lengths[start + row])] = _Cell(arrival, row)

    def score(
        self,
        hidden: torch.Tensor,
        chunks: Mapping[int, Chunk],
        log_rows: Callable[[torch.Tensor], Rows],
        student_version: int,
    ) -> None:
        """Record the response tokens of the scoring requests that are predicted in this step's prefill chunks.

        Args: hidden: [tokens, width], outputs of the forward pass; chunks: row in the batch -> tokens of its request in the
              pass; log_rows: the rows of some of these outputs.
        Raises: ValueError if `hidden` is only a part of the step's outputs.
        """
        count = max((chunk.row + chunk.length for chunk in chunks.values()), default=0)
        if count > len(hidden):
            raise ValueError(
                f"only the last {len(hidden)} of {count} tokens of a step were kept for scoring; vLLM must not split batches: "
                f"remove enable_dbo from engine_args"
            )
        # Requests that are measured in the same way share the passes.
        alike: dict[tuple[int | None, bool], list[_Predicted]] = defaultdict(list)
        for row, request in self.scoring:
            width = None if request.asked is None else request.asked.shape[1]
            alike[width, request.top_k].append(_predicted(request, chunks[row]))
        for (_, top_k), predicted in alike.items():
            for part in _parts(predicted):
                rows = log_rows(hidden[to_device(part.rows, self.device)])
                if not self.keeps_records:
                    # The rows were computed because every rank takes part in gathering their logits.
                    continue
                asked = None if part.asked is None else to_device(part.asked, self.device).long()
                tokens = to_device(part.tokens, self.device)
                versions = torch.full_like(tokens, student_version)
                measured = self.statistics.measure(rows, probabilities(rows), tokens, versions, asked=asked, top_k=top_k)
                arrival = self.readback.send(measured)
                for place, (key, position) in enumerate(part.cells):
                    self.cells[key][position] = _Cell(arrival, place)

    def checksum(self) -> int:
        """Sum over all draws since the start, which two processes share only if they drew the same tokens. Waits for the
        device."""
        return int(self._checksum)

    def held_positions(self) -> int:
        """Number of positions whose records are held."""
        return sum(len(cells) for cells in self.cells.values())

    def take(self, wanted: Iterable[tuple[str, int]]) -> list[Slab]:
        """Remove and return the first `length` positions of each (key, length).

        Raises: KeyError naming the request, if a position was never evaluated.
        """
        taken = []
        for key, length in wanted:
            cells = self.cells.pop(key)
            missing = [position for position in range(length) if position not in cells]
            if missing:
                raise KeyError(f"request {key}: positions {missing[:8]} of {length} were never recorded")
            rows = [(Slab(*cells[position].arrival.arrays()), cells[position].row) for position in range(length)]
            floats = np.stack([slab.floats[row] for slab, row in rows]) if rows else FLOATS.empty()
            ints = np.stack([slab.ints[row] for slab, row in rows]) if rows else INTS.empty()
            hidden = np.stack([slab.hidden[row] for slab, row in rows]) if rows else HIDDEN.empty()
            if not np.isfinite(hidden).all():
                raise ValueError(f"request {key}: the teacher's hidden states do not fit half precision")
            taken.append(Slab(floats, ints, hidden))
        return taken

    def drop(self, keys: Iterable[str]) -> None:
        """Discard the records of requests."""
        for key in keys:
            self.cells.pop(key, None)


class _Predicted(NamedTuple):
    """Response tokens of scoring requests that one pass predicts."""

    rows: np.ndarray  # [n] int64, of the outputs that predict them
    tokens: np.ndarray  # [n] int64
    asked: np.ndarray | None  # [n, M] int32
    cells: list[tuple[str, int]]  # key and response position of each


def _predicted(request: Request, chunk: Chunk) -> _Predicted:
    # The output at position t - 1 predicts token t; tokens before `start` belong to the prompt and are not recorded.
    assert request.sequence is not None
    first = max(chunk.position, request.start - 1)
    last = max(first, min(chunk.position + chunk.length, len(request.sequence) - 1))
    response = range(first + 1 - request.start, last + 1 - request.start)
    return _Predicted(
        np.arange(first, last, dtype=np.int64) - chunk.position + chunk.row,
        request.sequence[first + 1 : last + 1].astype(np.int64),
        None if request.asked is None else request.asked[response.start : response.stop],
        [(request.key, position) for position in response],
    )


def _parts(predicted: list[_Predicted]) -> Iterable[_Predicted]:
    """The tokens of all requests, at most CHUNK_ROWS at once."""
    rows, tokens = (
        np.concatenate(arrays) for arrays in ([each.rows for each in predicted], [each.tokens for each in predicted])
    )
    asked = [each.asked for each in predicted if each.asked is not None]
    joined = np.concatenate(asked) if asked else None
    cells = [cell for each in predicted for cell in each.cells]
    for start in range(0, len(cells), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        yield _Predicted(rows[part], tokens[part], None if joined is None else joined[part], cells[part])
