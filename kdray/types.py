"""Records that travel between the parts: plain frozen dataclasses of ids and numpy arrays.

Dimensions used in comments: T response tokens of one rollout, P prompt tokens, K width of the recorded support,
B rollouts of a batch, S tokens of the longest row of a batch.
All logprobs are natural logarithms (nats), float32: `logprobs[t] = log p(token_ids[t] | prompt, token_ids[:t])`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


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
    """Teacher's share of every next-token draw: 0 is the student alone, 1 the teacher alone."""
    seed: int
    """Unsigned 64-bit seed of this sample's draws; see `kdray.rollouts.seeds.sample_seed`."""
    max_new_tokens: int
    min_version: int = 0
    """Oldest student version that may sample this request; a replica that holds an older one updates first."""
    question: str | None = None
    """What is asked, before any chat template, where that is not the prompt's own question: a call of a program. For teachers
    that read text; replicas read `prompt_ids`."""


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

    def unscored(self, support_ids: np.ndarray | None = None) -> Rollout:
        """The rollout without a teacher's columns, as it is sent to be scored. Args: support_ids: [T, K] ids to ask for."""
        return replace(
            self,
            support_ids=support_ids,
            support_logprobs=None,
            teacher_logprobs=None,
            tail_logprobs=None,
            reverse_kl=None,
            forward_kl=None,
            teacher_hidden=None,
        )

    @property
    def oldest_version(self) -> int:
        """The student version that staleness counts from."""
        return int(self.student_versions.min()) if len(self.student_versions) else 0


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The rollouts (or supervised rows) of one optimizer step, right-padded. Row b holds prompt then response.

    `loss_mask[b, s]` is True where token s is a response token, that is, a target; its prediction stands at s - 1.
    All per-token columns are aligned with the token they describe. Unused rows and positions hold 0 (ids) and False.
    """

    step: int
    sample_ids: np.ndarray  # [B] int64; -1 marks a padding row
    token_ids: np.ndarray  # [B, S] int32
    lengths: np.ndarray  # [B] int32 prompt + response tokens; 0 marks a padding row
    loss_mask: np.ndarray  # [B, S] bool
    num_target_tokens: int
    """Response tokens of the whole step, over all ranks and micro-batches: what every loss is divided by."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Per-token columns by Rollout field name: [B, S] or [B, S, K]."""
    group: np.ndarray | None = None  # [B, S] int32: index of a token in `groups`, -1 where there is no response token
    groups: tuple[str, ...] = ()
    """Where metrics are told apart: `teacher/<name>/staleness_<steps>`, those of the whole step, the same on every rank."""


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
