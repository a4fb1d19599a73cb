"""Whether a replica is the teacher that the run began with: what it is made of, and how it scores a fixed sequence."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

LOGPROBS = "log-softmax over the shared vocabulary at temperature 1"
"""What every kind of replica returns as log p; a teacher that returns another thing is another teacher."""


@dataclass(frozen=True)
class Fingerprint:
    """What a teacher replica says of itself at its start."""

    model: str
    """Hub id, or the name of the folder."""
    revision: str | None
    tokenizer: str
    """Hash of the tokenizer's vocabulary, `kdray.models.vocab.tokenizer_hash`; empty where the teacher's folder has none."""
    vocab_size: int
    """Ids that its rows cover."""
    dtype: str
    """Of its arithmetic."""
    canary: tuple[int, ...]
    """Token ids of the sequence that it scored."""
    scores: tuple[float, ...]
    """log p of every token of the canary but the first, nats."""
    logprobs: str = LOGPROBS

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fingerprint:
        """The inverse of `to_dict`, also after a trip through JSON, which knows no tuples."""
        return cls(**values | {name: tuple(values[name]) for name in ("canary", "scores")})

    @property
    def tolerance(self) -> float:
        """How far the mean score may be off, nats: half precision rounds its own way on every kind of accelerator."""
        return 1e-3 if self.dtype == "float32" else 0.1


def difference(reference: Fingerprint, found: Fingerprint) -> str | None:
    """What makes `found` another teacher than `reference`, as a reason for people; None where it is the same one."""
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
