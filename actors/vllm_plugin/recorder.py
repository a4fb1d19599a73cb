"""Logits processor that samples from the mixture and records both models' statistics of every token.

vLLM passes every step's rows to `apply`. For a sampling request the recorder forms m = alpha p + (1 - alpha) q with the
request's own alpha, samples the token from a hash of (seed, position), forces the engine to choose it, and records log m, log
p, log q, the teacher's logprobs on a support (teacher top-k and student top-k), its tail mass, and both exact KLs. For a
scoring request it evaluates the rows of the sequence's own tokens as their prefill chunks pass, also at the ids that the
request lists.

Records are keyed by request and indexed by position, because vLLM evaluates positions more than once: partial prefills,
preemption and surplus rows after the last token. A later evaluation of a position replaces the earlier one; the reader
truncates to the output's length.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from actors.vllm_plugin.mixture_model import MixtureForCausalLM, Rows, register
from actors.vllm_plugin.record_table import FLOATS, HIDDEN, INTS, Slab
from kdray.rollouts.columns import Column, recorded_columns
from kdray.rollouts.mixture import draw, log_mixture
from kdray.rollouts.seeds import uniforms

register()

# Rows that scoring converts to logprobs at once: bounds the temporary memory of a long prefill to this many vocabulary rows.
_SCORE_ROWS = 512


class Cell(NamedTuple):
    """Recorded position: a row of a step's arrays, which the requests of that step share."""

    arrays: Slab
    row: int


class _Request(NamedTuple):
    key: str
    score: bool
    alpha: float
    seed: int
    prompt_ids: list[int]
    output_ids: list[int]
    start: int
    last_id: int
    asked: np.ndarray | None  # [T, M] int32: ids at which a scoring request wants log p; -1 is unused
    top_k: bool


class Recorder(LogitsProcessor):
    """Logits processor, loaded by vLLM by name: `logits_processors=["actors.vllm_plugin.recorder:Recorder"]`."""

    active: Recorder | None = None
    """The only recorder of this process; the worker extension returns its records."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        limits = vllm_config.additional_config["kdray"]
        self.teacher_top_k: int = limits["teacher_top_k"]
        self.student_top_k: int = limits["student_top_k"]
        self.record_hidden: bool = limits["record_hidden"]
        self.requests: dict[int, _Request] = {}
        self.cells: dict[str, dict[int, Cell]] = {}
        self.readmitted = 0
        Recorder.active = self

    @cached_property
    def measured(self) -> tuple[Column, ...]:
        """Columns that the models of this engine can fill."""
        model = MixtureForCausalLM.active
        assert model is not None
        return tuple(
            column
            for column in recorded_columns()
            if (model.student is not None or not column.of_student)
            and (model.teacher is not None or column.stage != "scoring")
            and (self.record_hidden or column not in HIDDEN.wide)
        )

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.requests, batch_update, self._admit)

    def _admit(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _Request | None:
        args: dict[str, Any] | None = (params.extra_args or {}).get("kdray")
        if args is None:
            return None
        # A request that returns after preemption keeps the positions recorded before.
        self.readmitted += args["key"] in self.cells
        self.cells.setdefault(args["key"], {})
        return _Request(
            key=args["key"],
            score=args["mode"] == "score",
            alpha=args.get("alpha", 0.0),
            seed=args.get("seed", 0),
            prompt_ids=prompt_ids or [],
            output_ids=output_ids,
            start=args.get("start", 0),
            last_id=args.get("last_id", 0),
            asked=np.frombuffer(args["asked"], dtype=np.int32).reshape(-1, args["width"]) if "asked" in args else None,
            top_k=args.get("top_k", True),
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Force every sampling request's row of `logits` [rows, vocab] to its sampled token; record sampling and scoring
        requests."""
        model = MixtureForCausalLM.active
        assert model is not None
        here = [(row, request) for row, request in self.requests.items() if row < logits.shape[0]]
        sampling = [(row, request) for row, request in here if not request.score]
        if sampling:
            assert model.rows is not None
            self._sample(logits, model.rows, sampling, model.student_version)
        for row, request in here:
            if request.score:
                self._score(model, row, request)
        return logits

    def _sample(self, logits: torch.Tensor, rows: Rows, sampling: list[tuple[int, _Request]], student_version: int) -> None:
        index = torch.tensor([row for row, _ in sampling], device=logits.device)
        chosen = Rows(*(None if part is None else part[index] for part in rows))
        teacher, student = chosen.teacher, chosen.student
        alpha = torch.tensor([[request.alpha] for _, request in sampling], device=logits.device)
        if teacher is not None and student is not None:
            mixture = log_mixture(teacher, student, alpha)
        else:
            # The engine rejects any alpha except the one at which the missing model drops out.
            mixture = _either(teacher, student)
        seeds = np.array([request.seed for _, request in sampling], dtype=np.uint64)
        positions = np.array([len(request.output_ids) for _, request in sampling])
        tokens = draw(mixture, torch.from_numpy(uniforms(seeds, positions)).to(logits.device))
        arrays = self._measure(chosen, mixture, tokens, student_version)
        for cell_row, (_, request) in enumerate(sampling):
            self.cells[request.key][len(request.output_ids)] = Cell(arrays, cell_row)
        logits[index] = -torch.inf
        logits[index, tokens] = 0.0

    def _score(self, model: MixtureForCausalLM, row: int, request: _Request) -> None:
        """Record the tokens of one scoring request that are predicted in this step's prefill chunk."""
        step = model.step
        assert step is not None
        begin, end = int(step.starts[row]), int(step.starts[row + 1])
        first = int(step.positions[begin])
        # The row at position t - 1 predicts token t; tokens before `start` belong to the prompt and are not recorded.
        skip = max(0, request.start - 1 - first)
        targets = [*request.prompt_ids[1:], request.last_id]
        for chunk in range(begin + skip, end, _SCORE_ROWS):
            stop = min(chunk + _SCORE_ROWS, end)
            position = first + chunk - begin
            tokens = torch.tensor(targets[position : position + stop - chunk], device=step.hidden.device)
            if not len(tokens):
                break
            rows = model.log_rows(step.hidden[chunk : chunk + len(tokens)])
            first_token = position + 1 - request.start
            asked = None
            if request.asked is not None:
                asked = torch.tensor(request.asked[first_token : first_token + len(tokens)], device=tokens.device).long()
            mixture = _either(rows.teacher, rows.student)
            arrays = self._measure(rows, mixture, tokens, model.student_version, asked, request.top_k)
            cells = self.cells[request.key]
            for offset in range(len(tokens)):
                cells[first_token + offset] = Cell(arrays, offset)

    def _measure(
        self,
        rows: Rows,
        mixture: torch.Tensor,
        tokens: torch.Tensor,
        student_version: int,
        asked: torch.Tensor | None = None,
        top_k: bool = True,
    ) -> Slab:
        """All recorded columns of rows [n, vocab] at tokens [n]; nan for columns of a model that this engine does not hold.

        Args: asked: [n, M] ids that come first in the support; top_k: whether the support also holds the models' own top ids.
        """
        teacher, student = rows.teacher, rows.student
        count = len(mixture)
        nothing = torch.full((count, 1), torch.nan, device=mixture.device)
        at = tokens.unsqueeze(-1)
        floats = {column.name: nothing for column in FLOATS.single if column not in self.measured}
        floats |= {column.name: nothing[:, :0] for column in FLOATS.wide if column not in self.measured}
        floats["mixture_logprobs"] = mixture.gather(-1, at)
        if student is not None:
            floats["student_logprobs"] = student.gather(-1, at)
        support = torch.empty((count, 0), dtype=torch.long, device=mixture.device)
        if teacher is not None:
            support = self._support(teacher, student, asked, top_k)
            outside = teacher.masked_fill(_named(support, teacher.shape[-1]), -torch.inf)
            floats["teacher_logprobs"] = teacher.gather(-1, at)
            floats["tail_logprobs"] = outside.logsumexp(-1, keepdim=True)
            floats["support_logprobs"] = teacher.gather(-1, support.clamp(min=0)).masked_fill_(support < 0, -torch.inf)
            if student is not None:
                floats |= {"reverse_kl": _kl(student, teacher), "forward_kl": _kl(teacher, student)}
        ints = {"token_ids": at, "student_versions": torch.full_like(at, student_version), "support_ids": support}
        hidden = torch.empty((count, 0), dtype=torch.float16)
        if self.record_hidden:
            assert rows.hidden is not None
            hidden = rows.hidden.to(torch.float16)
        return Slab(
            torch.cat([floats[name] for name in FLOATS.names], dim=-1).cpu().numpy(),
            torch.cat([ints[name] for name in INTS.names], dim=-1).to(torch.int32).cpu().numpy(),
            hidden.cpu().numpy(),
        )

    def _support(
        self, teacher: torch.Tensor, student: torch.Tensor | None, asked: torch.Tensor | None, top_k: bool
    ) -> torch.Tensor:
        """Support [n, K]: requested ids, then the teacher's top-k, then the student's; -1 for an id that already occurs to the
        left."""
        vocab = teacher.shape[-1]
        parts = [] if asked is None else [asked]
        if top_k:
            parts.append(teacher.topk(min(self.teacher_top_k, vocab), dim=-1).indices)
            if student is not None and self.student_top_k and parts[-1].shape[-1] < vocab:
                parts.append(student.topk(min(self.student_top_k, vocab), dim=-1).indices)
        support = torch.empty((len(teacher), 0), dtype=torch.long, device=teacher.device)
        for part in parts:
            taken = _named(support, vocab).gather(-1, part.clamp(min=0))
            support = torch.cat([support, part.masked_fill(taken, -1)], dim=-1)
        return support

    def take(self, wanted: list[tuple[str, int]]) -> list[Slab]:
        """Remove and return the first `length` positions of each (key, length).

        Raises: KeyError naming the request, if a position was never evaluated.
        """
        taken = []
        for key, length in wanted:
            cells = self.cells.pop(key)
            missing = [position for position in range(length) if position not in cells]
            if missing:
                raise KeyError(f"request {key}: positions {missing[:8]} of {length} were never recorded")
            rows = [cells[position] for position in range(length)]
            floats = np.stack([cell.arrays.floats[cell.row] for cell in rows]) if rows else FLOATS.empty()
            ints = np.stack([cell.arrays.ints[cell.row] for cell in rows]) if rows else INTS.empty()
            hidden = np.stack([cell.arrays.hidden[cell.row] for cell in rows]) if rows else HIDDEN.empty()
            if not np.isfinite(hidden).all():
                raise ValueError(f"request {key}: the teacher's hidden states do not fit half precision")
            taken.append(Slab(floats.astype(np.float32), ints.astype(np.int32), hidden.astype(np.float16)))
        return taken

    def drop(self, keys: list[str]) -> None:
        """Discard the records of aborted requests."""
        for key in keys:
            self.cells.pop(key, None)


def _either(teacher: torch.Tensor | None, student: torch.Tensor | None) -> torch.Tensor:
    rows = teacher if teacher is not None else student
    assert rows is not None
    return rows


def _named(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """Mask [n, vocab] bool of the vocabulary ids that a row of `ids` [n, K] contains; -1 is no id."""
    # Unused slots are scattered into an extra column, which is dropped afterwards.
    flags = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
    return flags.scatter_(-1, ids.where(ids >= 0, vocab), True)[:, :vocab]


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first || second) of log-softmax rows [n, vocab], nats, [n, 1]; a zero probability of `first` contributes nothing."""
    mass = first.exp()
    return torch.where(mass > 0, mass * (first - second), 0.0).sum(-1, keepdim=True)
