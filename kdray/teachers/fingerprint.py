"""Fingerprint of a teacher replica: its model and its scores of a fixed sequence, compared with the start of the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

LOGPROBS = "log-softmax over the shared vocabulary at temperature 1"
"""Definition of log p, common to all kinds of replica; a teacher with another definition is a different teacher."""


@dataclass(frozen=True)
class Fingerprint:
    """Identity that a teacher replica reports when it starts."""

    model: str
    """Hub id, or name of the model folder."""
    revision: str | None
    tokenizer: str
    """Hash of the tokenizer's vocabulary, `kdray.models.vocab.tokenizer_hash`; empty if the teacher's folder has none."""
    vocab_size: int
    """Number of ids that its rows cover."""
    dtype: str
    """Dtype of its arithmetic."""
    canary: tuple[int, ...]
    """Token ids of the scored sequence."""
    scores: tuple[float, ...]
    """log p of every token of the canary except the first, nats."""
    logprobs: str = LOGPROBS

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict for JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fingerprint:
        """Inverse of `to_dict`, also after JSON, which has no tuples."""
        return cls(**values | {name: tuple(values[name]) for name in ("canary", "scores")})

    @property
    def tolerance(self) -> float:
        """Allowed deviation of the mean score, nats: half precision rounds differently on each kind of accelerator."""
        return 1e-3 if self.dtype == "float32" else 0.1


def difference(reference: Fingerprint, found: Fingerprint) -> str | None:
    """Describe why `found` is a different teacher than `reference`, for messages; None if it is the same."""
    for field in fields(Fingerprint):
        before, now = getattr(reference, field.name), getattr(found, field.name)
        if field.name != "scores" and before != now:
            shown = ("other token ids", "") if field.name == "canary" else (f"{now!r}", f", the run began with {before!r}")
            return f"its {field.name} is {shown[0]}{shown[1]}"
    if len(reference.scores) != len(found.scores):
        return f"it scored {len(found.scores)} tokens of its canary, the run began with {len(reference.scores)}"
    gaps = np.abs(np.array(reference.scores) - np.array(found.scores))
    if not gaps.mean() <= reference.tolerance:
        return (
            f"its canary no longer matches: log p of {len(found.scores)} fixed tokens is off by {gaps.mean():.3g} nats in the "
            f"mean (allowed {reference.tolerance:g}, worst {gaps.max():.3g}): its weights are not those that the run began with"
        )
    return None
