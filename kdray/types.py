"""Records passed between components: plain frozen dataclasses of ids and numpy arrays.

Dimensions used in comments: T response tokens of one rollout, P prompt tokens, K width of the recorded support,
B rollouts of a batch, S tokens of the longest row of a batch.
All logprobs are natural logarithms (nats), float32: `logprobs[t] = log p(token_ids[t] | prompt, token_ids[:t])`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

Writer = Literal["mixture", "student", "teacher", "data", "environment"]
"""Writer of a token: a model, sampling from its own distribution or from the mixture of both; the data, as part of a reference
answer; or the environment, in response to the tokens before it."""

WRITERS: tuple[Writer, ...] = get_args(Writer)
"""Writers by their code in the column `writer`. Files store the codes, so the order must never change."""

Early = Literal["now", "soon"]
"""Urgency of a checkpoint that is not due: `now` does not wait for an evaluation."""

_ENVIRONMENT = WRITERS.index("environment")
_ENVIRONMENT_BYTE = bytes([_ENVIRONMENT])
_AS_DRAWN = np.empty(0, dtype=np.int8)
"""Sentinel for a column `writer` that was not given."""


def drawn_by(alpha: float) -> Writer:
    """Return the writer of tokens sampled with mixing coefficient `alpha`."""
    return "student" if alpha == 0.0 else "teacher" if alpha == 1.0 else "mixture"


def written_by(writer: Writer, count: int) -> np.ndarray:
    """Return the column `writer` for `count` tokens by one writer, int8."""
    return np.full(count, WRITERS.index(writer), dtype=np.int8)


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference answer, or a conversation with several, as the tokens of a training row."""

    prompt_ids: np.ndarray  # [P0] int32: tokens before the first target
    token_ids: np.ndarray  # [T] int32: the tokens from the first target on, the last one's end included
    is_target: np.ndarray  # [T] bool: tokens that the assistant wrote; the others are context

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.is_target))

    def __len__(self) -> int:
        """Number of tokens of the whole row."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def answer_ids(self) -> np.ndarray:
        """Tokens of the last answer."""
        context = np.flatnonzero(~self.is_target)
        return self.token_ids[context[-1] + 1 :] if len(context) else self.token_ids


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, with the metadata needed to route and grade its responses."""

    prompt_id: int
    """Position in the source, stable across epochs, runs and restarts."""
    token_ids: np.ndarray  # [P] int32
    text: str = ""
    """The tokenized text (after the chat template, if one applies)."""
    answer: str | None = None
    """Reference answer, with which graders compare responses; the target of supervised fine-tuning, unless there is a `reply`.
    None if unknown."""
    domain: str | None = None
    """Domain by which the prompt may be routed to a teacher: the task's name, or a column of its source."""
    question: str | list[dict[str, Any]] = ""
    """The prompt before any chat template: text or chat messages."""
    reply: dict[str, Any] | None = None
    """The assistant's message that answers the prompt, where the data have one; it may hold more than text, as tool calls."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template for this prompt alone, such as its tools."""
    reference: Reference | None = None
    """The answer under the chat template, as tokens; None if there is neither, or nothing trains on it."""

    @property
    def has_reference(self) -> bool:
        """True if supervised phases can train on the prompt."""
        return bool(self.answer) or self.reply is not None


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Request to sample a sequence. The same request under the same weights gives the same sequence."""

    sample_id: int
    """Unique within a run; the admission number of the rollout buffer."""
    prompt_id: int
    prompt_ids: np.ndarray  # [P] int32
    alpha: float
    """Teacher's weight in the next-token mixture: 0 is the student alone, 1 the teacher alone. 0 also if nothing is sampled."""
    seed: int
    """Unsigned 64-bit seed of this sample's random draws; see `kdray.rollouts.seeds.sample_seed`."""
    max_new_tokens: int
    min_version: int = 0
    """Oldest student version that may sample this request; a replica with an older one updates first."""
    question: str | None = None
    """Question before any chat template, if it is not the prompt's own but that of a program's call. For teachers that read
    text; replicas read `prompt_ids`."""
    writer: Writer = "mixture"
    """Writer of the response: `data` for the prompt's reference answer; any other value is replaced by what `alpha` implies."""
    stop_ids: tuple[int, ...] = ()
    """Further ids at which the draw ends, beside those that end a response."""

    def __post_init__(self) -> None:
        if self.writer != "data":
            object.__setattr__(self, "writer", drawn_by(self.alpha))

    def finish_reason(self, token_ids: Sequence[int] | np.ndarray, end_ids: Collection[int]) -> str:
        """Why a draw of these tokens ended; see `Rollout.finish_reason`. Args: end_ids: end-of-sequence ids."""
        last = int(token_ids[-1]) if len(token_ids) else None
        return "stop" if last in end_ids else "pause" if last in self.stop_ids else "length"


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled sequence with all values computed while sampling it. Arrays that the route did not produce are None."""

    sample_id: int
    prompt_id: int
    prompt_ids: np.ndarray  # [P] int32
    token_ids: np.ndarray  # [T] int32, end-of-sequence token included when it was drawn
    # Log-densities are None if a black-box teacher wrote the response: its sampling distribution is unknown.
    mixture_logprobs: np.ndarray | None  # [T] log m: the density that each token was actually sampled from
    student_logprobs: np.ndarray | None  # [T] log q of the student version that was sampling
    # [T] int32: a rollout can span a weight update. A black-box teacher's response does not depend on the student; every token
    # gets the oldest version that its request allows, so that staleness counts from the time of the request.
    student_versions: np.ndarray
    alpha: float
    finish_reason: str
    """`stop` if the end-of-sequence token was sampled, `length` if the sequence was truncated at max_new_tokens or a limit of
    the environment, `pause` at one of the request's `stop_ids`, `ended` if the environment ended it, `unparsable` if a program
    found no answer."""
    teacher: str = ""
    """Name of the teacher that filled in the columns below; empty before scoring."""
    teacher_logprobs: np.ndarray | None = None  # [T] log p
    support_ids: np.ndarray | None = None  # [T, K] int32: teacher top-k, then student top-k not among them; -1 is unused
    support_logprobs: np.ndarray | None = None  # [T, K] teacher log p at support_ids; -inf where unused
    tail_logprobs: np.ndarray | None = None  # [T] log of the teacher's mass outside the support; -inf if it covers all
    reverse_kl: np.ndarray | None = None  # [T] KL(student || teacher) over full rows
    forward_kl: np.ndarray | None = None  # [T] KL(teacher || student) over full rows
    teacher_hidden: np.ndarray | None = None  # [T, d] float16: input of the teacher's output head
    log_z: np.ndarray | None = None  # [T] log Z of an ensemble's geometric mean; None where one teacher gave the columns
    writer: np.ndarray = field(default_factory=lambda: _AS_DRAWN)
    """[T] int8, codes of WRITERS. Default: the writer that follows from `alpha`. Environment tokens are context: never a
    target, never counted as sampled; the other columns may hold arbitrary values there."""
    more: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Columns of `kdray.rollouts.columns` without a field of their own, by name."""

    def __post_init__(self) -> None:
        if self.writer is None or self.writer is _AS_DRAWN:
            object.__setattr__(self, "writer", written_by(drawn_by(self.alpha), len(self.token_ids)))

    def has_writer(self, writer: Writer) -> bool:
        """Return True if any token is by this writer."""
        return bool((self.writer == WRITERS.index(writer)).any())

    @property
    def writers(self) -> tuple[Writer, ...]:
        """Writers of the tokens, in order of appearance; for an empty response, the writer that follows from alpha."""
        return tuple(WRITERS[code] for code in dict.fromkeys(self.writer.tolist())) or (drawn_by(self.alpha),)

    @property
    def is_target(self) -> np.ndarray:
        """[T] bool: tokens that may be trained on, all but the environment's."""
        return self.writer != _ENVIRONMENT

    @property
    def has_context(self) -> bool:
        """True if any token is by the environment."""
        # Called several times per rollout and step: a byte search takes a tenth of the time of a comparison.
        return _ENVIRONMENT_BYTE in self.writer.tobytes()

    @property
    def num_targets(self) -> int:
        """Number of tokens that may be trained on."""
        return int(np.count_nonzero(self.is_target)) if self.has_context else len(self.token_ids)

    @property
    def target_versions(self) -> np.ndarray:
        """`student_versions` of the tokens that may be trained on."""
        return self.student_versions[self.is_target] if self.has_context else self.student_versions

    @property
    def oldest_version(self) -> int:
        """Oldest student version of any target, from which staleness counts; 0 without targets."""
        versions = self.target_versions
        return int(versions.min()) if len(versions) else 0


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The rollouts (or supervised rows) of one optimizer step, right-padded. Row b holds prompt then response.

    `loss_mask[b, s]` is True where token s is a target; its prediction is at s - 1. Targets are response tokens, not
    necessarily all of them nor contiguous.
    All per-token columns are aligned with the token they describe. Unused rows and positions hold 0 (ids) and False.
    """

    step: int
    sample_ids: np.ndarray  # [B] int64; -1 marks a padding row
    token_ids: np.ndarray  # [B, S] int32
    lengths: np.ndarray  # [B] int32 prompt + response tokens; 0 marks a padding row
    loss_mask: np.ndarray  # [B, S] bool
    num_target_tokens: int
    """Number of targets of the whole step, over all ranks and micro-batches: the denominator of every loss."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Per-token columns by their names in `kdray.rollouts.columns`: [B, S] or [B, S, K]."""
    groups: tuple[str, ...] = ()
    """Names of the metric groups that the column `group` indexes: `teacher/<name>/staleness_<steps>`. They cover the whole step
    and are the same on every rank."""


@dataclass(frozen=True, slots=True)
class TrainedShard:
    """A rank's own record of one step, from the micro-batches whose gradients were applied; text windows are left out."""

    sample_ids: tuple[int, ...]
    """Samples that it trained, in order, each once."""
    digest: str
    """Digest of their tokens, targets and columns, over all passes (`kdray.rollouts.training_digest`)."""
    num_target_tokens: int
    """Targets that the rank counted in its masks, over all passes."""
    updates: int
    """The optimizer's own count of its updates after the step, since the phase began."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """Result of one optimizer step, already reduced over ranks and micro-batches."""

    step: int
    """Optimizer steps completed, this one included."""
    loss: float
    """Sum over target tokens divided by their number, nats."""
    num_target_tokens: int
    """Targets of the step, as the ranks counted them in their masks."""
    grad_norm: float
    learning_rate: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    shards: tuple[TrainedShard, ...] = ()
    """What each rank trained, by rank; empty from a student that keeps no record."""
    left_out: str = ""
    """Reason why the ranks left the batch out, so that no update was made; empty if they trained it."""
