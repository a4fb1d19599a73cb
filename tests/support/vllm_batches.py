"""Batches as vLLM's two model runners form them, as far as a logits processor sees them: one schedule, two views of it.

The schedule has prefills in parts, requests that wait, finish, and are preempted and begin again. Rows of the model are those
of (request, position), whatever batch they are in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from actors.vllm_plugin.row_statistics import Rows
from tests.support.plain_recorder import random_rows


@dataclass
class Sequence:
    """A request, and what has been done of it."""

    key: str
    params: SamplingParams
    prompt: list[int]
    new_tokens: int
    output: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)


@dataclass(frozen=True)
class Step:
    scheduled: dict[str, int]
    """Key -> number of its tokens in this step, in the scheduler's order."""
    added: list[str]
    removed: list[str]
    """Requests that finished or were preempted since the last step."""
    complete: frozenset[str]
    """Those whose next token is taken from this step."""


class Schedule:
    """Steps of a batch of limited size. A caller appends a token to each complete request before it takes the next step."""

    def __init__(self, requests: list[Sequence], running: int, tokens: int, seed: int) -> None:
        """Args: running: most requests at once; tokens: most tokens a step."""
        self.sequences = {each.key: each for each in requests}
        self._waiting, self._running = list(requests), list[Sequence]()
        self.tokens, self._most, self._rng = tokens, running, np.random.default_rng(seed)
        self.preempted = self.parts = 0

    def __iter__(self) -> Iterator[Step]:
        ended: list[str] = []
        while self._running or self._waiting:
            added, removed, ended = [], ended, []
            if len(self._running) > 1 and self._rng.random() < 0.2:
                victim = self._running.pop(int(self._rng.integers(len(self._running))))
                victim.computed = 0
                self._waiting.append(victim)
                removed.append(victim.key)
                self.preempted += 1
            while self._waiting and len(self._running) < self._most:
                self._running.append(self._waiting.pop(0))
                added.append(self._running[-1].key)
            left, scheduled = self.tokens, {}
            for each in list(self._running):
                scheduled[each.key] = min(left, each.length - each.computed)
                left -= scheduled[each.key]
                if not scheduled[each.key]:
                    # vLLM leaves a request that got no token where it is; here it simply waits outside of the batch.
                    del scheduled[each.key]
                    self._running.remove(each)
                    self._waiting.insert(0, each)
                    if each.key in added:
                        added.remove(each.key)
                    else:
                        removed.append(each.key)
            reached = {key: self.sequences[key].computed + count for key, count in scheduled.items()}
            complete = frozenset(key for key, end in reached.items() if end == self.sequences[key].length)
            self.parts += len(reached) - len(complete)
            yield Step(scheduled, added, removed, complete)
            for key, end in reached.items():
                self.sequences[key].computed = end
            for each in list(self._running):
                if len(each.output) >= each.new_tokens:
                    self._running.remove(each)
                    ended.append(each.key)


class Model:
    """Both models in place of `MixtureForCausalLM`: rows by request and position."""

    def __init__(self, sequences: dict[str, Sequence], vocab: int) -> None:
        lengths = [len(each.prompt) + each.new_tokens for each in sequences.values()]
        self._first = dict(zip(sequences, np.cumsum([0, *lengths[:-1]]), strict=True))
        self._rows = random_rows(sum(lengths), vocab, seed=5)
        self.student_version = 0
        self.student_only_step = False
        self.runs = 0
        self.rows: Rows | None = None
        self.outputs: torch.Tensor | None = None

    def run(self, order: list[str], step: Step, sequences: dict[str, Sequence]) -> torch.Tensor:
        """Process the tokens of the requests in this order. Returns: the engine's logits, a row a request."""
        self.runs += 1
        spans = {key: range(sequences[key].computed, sequences[key].computed + step.scheduled[key]) for key in order}
        places = [self._first[key] + position for key in order for position in spans[key]]
        self.outputs = torch.tensor(places, dtype=torch.float64).unsqueeze(-1)
        self.rows = self.log_rows(torch.tensor([[self._first[key] + spans[key][-1]] for key in order], dtype=torch.float64))
        assert self.rows.teacher is not None
        return self.rows.teacher.clone()

    def log_rows(self, outputs: torch.Tensor) -> Rows:
        return Rows(*(None if part is None else part[outputs[:, 0].long()] for part in self._rows))


class FirstRunner:
    """V1's batch: rows that stay where they are, holes filled from the end."""

    def __init__(self, sequences: dict[str, Sequence]) -> None:
        self._sequences = sequences
        self.order: list[str] = []
        self.query_start_loc = SimpleNamespace(np=np.zeros(1, dtype=np.int32))
        self.input_batch = SimpleNamespace(num_computed_tokens_cpu=np.zeros(0, dtype=np.int32))

    def begin(self, step: Step) -> BatchUpdate | None:
        rows: list[str | None] = [None if key in step.removed else key for key in self.order]
        added, moved = [], []
        for key in step.added:
            row = rows.index(None) if None in rows else len(rows)
            rows[row : row + 1] = [key]
            each = self._sequences[key]
            added.append((row, each.params, each.prompt, each.output))
        removed = [row for row, key in enumerate(rows) if key is None]
        while None in rows:
            if rows[-1] is not None:
                moved.append((len(rows) - 1, rows.index(None), MoveDirectionality.UNIDIRECTIONAL))
                rows[rows.index(None)] = rows[-1]
            rows.pop()
        self.order = [key for key in rows if key is not None]
        self.query_start_loc.np = np.cumsum([0, *(step.scheduled[key] for key in self.order)])
        self.input_batch.num_computed_tokens_cpu = np.array([self._sequences[key].computed for key in self.order])
        changed = added or removed or moved
        return BatchUpdate(len(self.order), removed, added, moved) if changed else None


class NewerRunner:
    """V2's batch: slots that are given again, rows in a new order at each step (`GPUModelRunner.gather_batch_req_state`)."""

    def __init__(self, sequences: dict[str, Sequence], slots: int) -> None:
        self._sequences = sequences
        self._free = list(range(slots))
        self._slots: dict[str, int] = {}
        lengths = (SimpleNamespace(np=np.zeros(slots, dtype=np.int32)) for _ in range(2))
        self.states: Any = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=slots)
        self.states.prompt_len, self.states.prefill_len = lengths
        self.req_states = SimpleNamespace(num_computed_tokens_np=np.zeros(slots, dtype=np.int32))
        self.order: list[str] = []

    def begin(self, step: Step, processor: Any) -> LogitsContext:
        # `finish_requests`, `add_requests`, `update_requests`: in this order.
        for key in sorted(step.removed):
            self._free.append(self._slots.pop(key))
        for key in step.added:
            slot = self._slots[key] = self._free.pop()
            each = self._sequences[key]
            self.states.prompt_len.np[slot] = len(each.prompt)
            self.states.prefill_len.np[slot] = each.length
            processor.add_request(slot, each.params)
        processor.apply_staged_writes()
        for key, slot in self._slots.items():
            self.req_states.num_computed_tokens_np[slot] = self._sequences[key].computed
        # `sort_batch_req_ids`: decodes first, then prefills by length.
        self.order = sorted(step.scheduled, key=lambda key: (step.scheduled[key] != 1, step.scheduled[key]))
        slots = np.array([self._slots[key] for key in self.order], dtype=np.intp)
        lengths = np.array([self._sequences[key].computed + step.scheduled[key] for key in self.order], dtype=np.int32)
        mapping = torch.from_numpy(slots)
        return LogitsContext(
            expanded_idx_mapping=mapping,
            idx_mapping=mapping,
            idx_mapping_np=slots,
            expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
            input_ids=torch.zeros(len(slots), dtype=torch.int32),
            pos=torch.from_numpy(lengths - 1),
            # A full graph pads it.
            seq_lens_upper_bound_np=np.append(lengths, np.zeros(2, dtype=np.int32)),
        )
