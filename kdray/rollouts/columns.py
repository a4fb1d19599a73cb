"""Table of the per-token columns: name, type, fill value, producers and consumers.

Everything that lists columns derives from it: the Arrow schema of rollouts (`kdray.rollouts.arrow`), `TrainBatch.columns`
(`kdray.rollouts.batching`), `LossBatch` (`kdray.losses.batch`), the recorder's arrays and the table that it returns
(`actors.vllm_plugin.record_table`), and the signals of a capture (`kdray.capturing.format`).

To add a column: a line here, a producer that sets it with `with_columns`, and a consumer that reads it with
`LossBatch.masked` or `values_of`. It may have a field of its own in `Rollout` and `LossBatch`; otherwise it is kept in `more`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from kdray.types import WRITERS, Rollout

Width = Literal["token", "support", "hidden"]
"""Values per token: one; K, the size of the support; d, the channels of a hidden state."""

Stage = Literal["draw", "scoring", "batching"]
"""Stage at which a column is filled in: sampling a response, scoring it by a teacher, or batching rollouts."""

Producer = Literal[
    "rollout",
    "recorder",
    "prompt_logprobs",
    "huggingface",
    "openai",
    "program",
    "data",
    "ensemble",
    "cross_tokenizer",
    "environment",
    "batching",
]
"""`rollout`: the default of `Rollout` itself. `data`: reference answers and pretraining text. `environment`: its replies, where
other columns have their fill."""

Consumer = Literal["row", "loss", "output_head", "ensemble", "metrics", "ledger", "report", "capture"]
"""`row`: ids and loss mask of the batch. `output_head`: the loss from hidden states. `report`: samples for inspection."""

Signal = Literal["sampled", "top_k", "hidden"]
"""Signals of a teacher; see `kdray.config.signals`."""


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """Values of the response tokens of a rollout, [T] or [T, K]; in a batch, [B, S] or [B, S, K]."""

    name: str
    dtype: type[np.generic]
    width: Width
    fill: float
    """Value at positions without a response token, and in unused slots."""
    stage: Stage
    written_by: frozenset[Producer]
    read_by: frozenset[Consumer]
    signal: Signal | None = None
    """Teacher signal that the column is part of."""
    of_student: bool = False
    """True if it depends on the student that ran alongside the teacher, so that it is not part of the teacher's output."""
    in_every_file: bool = False
    """True if files of rollouts by every version have it. Files without one of the other columns can be read too."""


def _by(*names: Producer) -> frozenset[Producer]:
    return frozenset(names)


def _for(*names: Consumer) -> frozenset[Consumer]:
    return frozenset(names)


_SCORERS = _by("recorder", "prompt_logprobs", "huggingface", "openai", "ensemble", "cross_tokenizer")
_WRITERS = _by("recorder", "huggingface", "openai", "program", "data", "environment")

COLUMNS: tuple[Column, ...] = (
    # Ids of the response, end-of-sequence token included if it was sampled.
    Column(
        "token_ids", np.int32, "token", 0, "draw",
        _WRITERS, _for("row", "ledger", "report", "capture"), in_every_file=True,
    ),
    # Writer of the token, as a code of `kdray.types.WRITERS`.
    Column(
        "writer", np.int8, "token", 0, "draw",
        _by("rollout", "data", "environment"), _for("row", "metrics", "ledger", "report", "capture"),
    ),
    # Version of the student that was sampling.
    Column(
        "student_versions", np.int32, "token", 0, "draw",
        _WRITERS, _for("metrics", "ledger"), in_every_file=True,
    ),
    # log m, the density that the token was sampled from.
    Column(
        "mixture_logprobs", np.float32, "token", 0.0, "draw",
        _by("recorder", "huggingface"), _for("loss", "metrics", "capture"), in_every_file=True,
    ),
    # log q of the student that was sampling.
    Column(
        "student_logprobs", np.float32, "token", 0.0, "draw",
        _by("recorder"), _for("loss", "metrics"), of_student=True, in_every_file=True,
    ),
    # log p.
    Column(
        "teacher_logprobs", np.float32, "token", 0.0, "scoring",
        _SCORERS, _for("loss", "output_head", "ensemble", "capture"), "sampled", in_every_file=True,
    ),
    # Log of the teacher's mass outside the support; -inf if it covers all.
    Column(
        "tail_logprobs", np.float32, "token", 0.0, "scoring",
        _SCORERS, _for("loss", "ensemble", "capture"), "top_k", in_every_file=True,
    ),
    # log Z of an ensemble's geometric mean at the token's prefix: with log p it adds up to the mean of the teachers' log p.
    Column(
        "log_z", np.float32, "token", 0.0, "scoring",
        _by("ensemble"), _for("loss"),
    ),
    # KL(student || teacher) over full rows.
    Column(
        "reverse_kl", np.float32, "token", 0.0, "scoring",
        _by("recorder", "ensemble"), _for("metrics", "report"), of_student=True, in_every_file=True,
    ),
    # KL(teacher || student) over full rows.
    Column(
        "forward_kl", np.float32, "token", 0.0, "scoring",
        _by("recorder", "ensemble"), _for("metrics"), of_student=True, in_every_file=True,
    ),
    # Teacher's top ids, then the student's that are not among them; -1 is unused.
    Column(
        "support_ids", np.int32, "support", -1, "scoring",
        _SCORERS, _for("loss", "ensemble", "capture"), "top_k", in_every_file=True,
    ),
    # log p at the support; -inf where unused.
    Column(
        "support_logprobs", np.float32, "support", -np.inf, "scoring",
        _SCORERS, _for("loss", "ensemble", "capture"), "top_k", in_every_file=True,
    ),
    # The teacher's last hidden state, which its output head turns into logits.
    Column(
        "teacher_hidden", np.float16, "hidden", 0.0, "scoring",
        _by("recorder"), _for("output_head", "capture"), "hidden", in_every_file=True,
    ),
    # Weight of the token in the loss.
    Column("weights", np.float32, "token", 0.0, "batching", _by("batching"), _for("loss")),
    # Advantage of the token's response in reward.
    Column("advantages", np.float32, "token", 0.0, "batching", _by("batching"), _for("loss")),
    # Index in `TrainBatch.groups`; -1 where there is no response token.
    Column("group", np.int32, "token", -1, "batching", _by("batching"), _for("loss")),
)  # fmt: skip


def rollout_columns() -> tuple[Column, ...]:
    """Columns of a rollout."""
    return tuple(column for column in COLUMNS if column.stage != "batching")


def batch_columns() -> tuple[Column, ...]:
    """Columns of `TrainBatch.columns`."""
    return tuple(column for column in COLUMNS if column.read_by & {"loss", "output_head"})


def loss_columns() -> tuple[Column, ...]:
    """Columns of a `LossBatch`."""
    return tuple(column for column in COLUMNS if "loss" in column.read_by)


def recorded_columns() -> tuple[Column, ...]:
    """Columns that a vLLM worker records."""
    return tuple(column for column in COLUMNS if "recorder" in column.written_by)


def scored_columns() -> tuple[Column, ...]:
    """Columns that a teacher fills in."""
    return tuple(column for column in COLUMNS if column.stage == "scoring")


def signal_columns() -> dict[Signal, tuple[str, ...]]:
    """Names of the columns that make up each signal of a teacher."""
    found: dict[Signal, tuple[str, ...]] = {}
    for column in COLUMNS:
        if column.signal is not None:
            found[column.signal] = (*found.get(column.signal, ()), column.name)
    return found


# ------------------------------------------------------------------------------------------------- columns of a rollout

_FIELDS = frozenset(each.name for each in fields(Rollout))
_REQUIRED = ("mixture_logprobs", "student_logprobs")
"""Fields without a default, which must be set to None explicitly."""


def value_of(rollout: Rollout, name: str) -> np.ndarray | None:
    """Return a rollout's column; None if it has none."""
    return getattr(rollout, name) if name in _FIELDS else rollout.more.get(name)


def values_of(rollouts: Iterable[Rollout], name: str) -> list[np.ndarray | None]:
    """Return a column of every rollout; None for those without it."""
    if name in _FIELDS:
        return [getattr(rollout, name) for rollout in rollouts]
    return [rollout.more.get(name) for rollout in rollouts]


def at_targets(rollouts: Sequence[Rollout], name: str) -> np.ndarray:
    """Return a column at the targets of the rollouts that have it, concatenated, [N]."""
    values = values_of(rollouts, name)
    known = [rollout for rollout, given in zip(rollouts, values, strict=True) if given is not None]
    found = np.concatenate([given for given in values if given is not None] or [np.empty(0)])
    is_target = target_mask(known)
    return found if is_target.all() else found[is_target]


def target_mask(rollouts: Sequence[Rollout]) -> np.ndarray:
    """Mask of the tokens that are targets, concatenated over rollouts, [T] bool."""
    return np.concatenate([rollout.writer for rollout in rollouts] or [np.empty(0)]) != WRITERS.index("environment")


def with_columns(rollout: Rollout, values: Mapping[str, np.ndarray | None], **changes: Any) -> Rollout:
    """Copy the rollout with these columns set, and `changes` applied to its other fields."""
    own: dict[str, Any] = {name: value for name, value in values.items() if name in _FIELDS}
    others = {name: value for name, value in values.items() if name not in _FIELDS}
    if others:
        kept = {name: value for name, value in rollout.more.items() if name not in others}
        changes["more"] = kept | {name: value for name, value in others.items() if value is not None}
    return replace(rollout, **own, **changes)


def rollouts_of(values: Mapping[str, Sequence[Any]]) -> list[Rollout]:
    """Build rollouts from their columns and other fields, by name; a column that none of them has may be omitted."""
    names = [name for name in values if name in _FIELDS]
    others = [name for name in values if name not in _FIELDS]
    own = [dict(zip(names, row, strict=True)) for row in zip(*(values[name] for name in names), strict=True)]
    missing: dict[str, Any] = {name: None for name in _REQUIRED if name not in names}
    if not others:
        return [Rollout(**each, **missing) for each in own]
    more = [
        {name: value for name, value in zip(others, row, strict=True) if value is not None}
        for row in zip(*(values[name] for name in others), strict=True)
    ]
    return [Rollout(**each, **missing, more=extra) for each, extra in zip(own, more, strict=True)]


def unscored(rollout: Rollout, support_ids: np.ndarray | None = None) -> Rollout:
    """Copy the rollout without the teacher's columns, for scoring. Args: support_ids: [T, K] ids to be scored."""
    blank: dict[str, np.ndarray | None] = {column.name: None for column in scored_columns()}
    return with_columns(rollout, blank | {"support_ids": support_ids})
