"""Records that travel between the parts: plain frozen dataclasses of ids and numpy arrays.

Dimensions used in comments: T response tokens of one rollout, P prompt tokens, K width of the recorded support,
B rollouts of a batch, S tokens of the longest row of a batch.
All logprobs are natural logarithms (nats), float32: `logprobs[t] = log p(token_ids[t] | prompt, token_ids[:t])`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

Writer = Literal["mixture", "student", "teacher", "data", "environment"]
"""Writer of a token: a model, drawing from its own distribution or from the mixture of both; the data, as part of a reference
answer; or the environment, in answer to what was written before."""

WRITERS: tuple[Writer, ...] = get_args(Writer)
"""By code, as the column `writer` holds them. Files hold the codes too, so the order never changes."""

_ENVIRONMENT = WRITERS.index("environment")
_ENVIRONMENT_BYTE = bytes([_ENVIRONMENT])
_AS_DRAWN = np.empty(0, dtype=np.int8)
"""Stands for a column `writer` that was not given."""


def drawn_by(alpha: float) -> Writer:
    """The writer of what is drawn with the teacher's share `alpha`."""
    return "student" if alpha == 0.0 else "teacher" if alpha == 1.0 else "mixture"


def written_by(writer: Writer, count: int) -> np.ndarray:
    """The column `writer` of `count` tokens by one writer, int8."""
    return np.full(count, WRITERS.index(writer), dtype=np.int8)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a rollout continues."""

    prompt_id: int
    """Position in the source, stable across epochs, runs and restarts."""
    token_ids: np.ndarray  # [P] int32
    text: str = ""
    """The text that was tokenized (after the chat template, where one applies)."""
    answer: str | None = None
    """The reference completion: target of supervised fine-tuning and of the exact-match grader. None where unknown."""
    domain: str | None = None
    """What the prompt is about, by which it may be routed to a teacher: the task's name, or a column of its source."""
    question: str | list[dict[str, Any]] = ""
    """The prompt before any chat template: a text, or chat messages."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sequence to draw. The same request, under the same weights, draws the same sequence."""

    sample_id: int
    """Unique within a run; the admission number of the rollout buffer."""
    prompt_id: int
    prompt_ids: np.ndarray  # [P] int32
    alpha: float
    """Teacher's share of every next-token draw: 0 is the student alone, 1 the teacher alone. 0 too where nothing is drawn."""
    seed: int
    """Unsigned 64-bit seed of this sample's draws; see `kdray.rollouts.seeds.sample_seed`."""
    max_new_tokens: int
    min_version: int = 0
    """Oldest student version that may sample this request; a replica that holds an older one updates first."""
    question: str | None = None
    """What is asked, before any chat template, where that is not the prompt's own question: a call of a program. For teachers
    that read text; replicas read `prompt_ids`."""
    writer: Writer = "mixture"
    """The one asked to write: `data` for the prompt's reference answer; else it follows from `alpha`, whatever is given."""

    def __post_init__(self) -> None:
        if self.writer != "data":
            object.__setattr__(self, "writer", drawn_by(self.alpha))


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled sequence with everything its sampling evaluated. Arrays the route did not produce are None."""

    sample_id: int
    prompt_id: int
    prompt_ids: np.ndarray  # [P] int32
    token_ids: np.ndarray  # [T] int32, end-of-sequence token included when it was drawn
    # Log-densities are None where a black-box teacher wrote the response: nothing is known of how it was drawn.
    mixture_logprobs: np.ndarray | None  # [T] log m: the density each token was really drawn from
    student_logprobs: np.ndarray | None  # [T] log q of the student version that was sampling
    # [T] int32: a rollout can span a weight update. A black-box teacher's response does not depend on the student; every token
    # has the oldest version that its request allows, so that staleness counts from when it was asked for.
    student_versions: np.ndarray
    alpha: float
    finish_reason: str
    """`stop` when the end-of-sequence token was drawn, `length` when max_new_tokens cut the sequence."""
    teacher: str = ""
    """Name of the teacher whose columns follow; empty before scoring."""
    teacher_logprobs: np.ndarray | None = None  # [T] log p
    support_ids: np.ndarray | None = None  # [T, K] int32: teacher top-k, then student top-k not among them; -1 is unused
    support_logprobs: np.ndarray | None = None  # [T, K] teacher log p at support_ids; -inf where unused
    tail_logprobs: np.ndarray | None = None  # [T] log of the teacher's mass outside the support; -inf if it covers all
    reverse_kl: np.ndarray | None = None  # [T] KL(student || teacher) over full rows
    forward_kl: np.ndarray | None = None  # [T] KL(teacher || student) over full rows
    teacher_hidden: np.ndarray | None = None  # [T, d] float16: what the teacher's output head turns into its logits
    writer: np.ndarray = field(default_factory=lambda: _AS_DRAWN)
    """[T] int8, codes of WRITERS. Default: all by the one that `alpha` names. Tokens of the environment are context: never a
    target, never counted as drawn; the other columns may hold anything there."""
    more: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Columns of `kdray.rollouts.columns` that have no field here, by name."""

    def __post_init__(self) -> None:
        if self.writer is None or self.writer is _AS_DRAWN:
            object.__setattr__(self, "writer", written_by(drawn_by(self.alpha), len(self.token_ids)))

    def has_writer(self, writer: Writer) -> bool:
        """True if it has a token by this writer."""
        return bool((self.writer == WRITERS.index(writer)).any())

    @property
    def writers(self) -> tuple[Writer, ...]:
        """Writers of its tokens, in their order; of a response without one, the writer that alpha names."""
        return tuple(WRITERS[code] for code in dict.fromkeys(self.writer.tolist())) or (drawn_by(self.alpha),)

    @property
    def is_target(self) -> np.ndarray:
        """[T] bool: tokens that may be trained, all but the environment's."""
        return self.writer != _ENVIRONMENT

    @property
    def has_context(self) -> bool:
        """True if it has a token by the environment."""
        # Asked of every rollout of a step, several times: a search in bytes takes a tenth of a comparison.
        return _ENVIRONMENT_BYTE in self.writer.tobytes()

    @property
    def num_targets(self) -> int:
        """Number of tokens that may be trained."""
        return int(np.count_nonzero(self.is_target)) if self.has_context else len(self.token_ids)

    @property
    def target_versions(self) -> np.ndarray:
        """`student_versions` of the tokens that may be trained."""
        return self.student_versions[self.is_target] if self.has_context else self.student_versions

    @property
    def oldest_version(self) -> int:
        """The student version that staleness counts from."""
        versions = self.target_versions
        return int(versions.min()) if len(versions) else 0


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The rollouts (or supervised rows) of one optimizer step, right-padded. Row b holds prompt then response.

    `loss_mask[b, s]` is True where token s is a target; its prediction stands at s - 1. Targets are response tokens, not
    always all of them, and may have gaps between them.
    All per-token columns are aligned with the token they describe. Unused rows and positions hold 0 (ids) and False.
    """

    step: int
    sample_ids: np.ndarray  # [B] int64; -1 marks a padding row
    token_ids: np.ndarray  # [B, S] int32
    lengths: np.ndarray  # [B] int32 prompt + response tokens; 0 marks a padding row
    loss_mask: np.ndarray  # [B, S] bool
    num_target_tokens: int
    """Targets of the whole step, over all ranks and micro-batches: what every loss is divided by."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Per-token columns by their names in `kdray.rollouts.columns`: [B, S] or [B, S, K]."""
    groups: tuple[str, ...] = ()
    """Names of the places that the column `group` holds, where metrics are told apart: `teacher/<name>/staleness_<steps>`,
    those of the whole step, the same on every rank."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step gives back, already reduced over ranks and micro-batches."""

    step: int
    """Optimizer steps completed, this one included."""
    loss: float
    """Sum over target tokens divided by their number, nats."""
    num_target_tokens: int
    grad_norm: float
    learning_rate: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
