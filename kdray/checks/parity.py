"""Check that trainer and replicas hold the same student: log q of the same ids by the training forward and by the engine.

Nothing else compares the two. Importance ratios have mean 1 whatever student samples, divergences do not read the trainer's
log q, and an update counts as complete if all names arrived, whatever they were loaded into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FLOAT32_TOLERANCE = 1e-3
"""Mean |log q - log q'| in nats a token if both sides compute in float32; kernels that differ give about 1e-6."""
HALF_TOLERANCE = 0.05
"""The same if either side computes in half precision and distributions are flat."""
HALF_SHARE = 0.04
"""The same, as a share of the spread of log q: rounding moves every logit by a share of what logits differ by.

Measured: 0.010 to 0.016 on dense models of 2 to 24 layers (`benchmarks/half_precision.py`), 0.022 with experts, since rounding
sends some tokens to others; and 0.066 for weights rounded to FP8, the smallest planted fault
(`tests/integration/test_families.py`)."""
LONG, SHORT = 1024, 64
"""Tokens compared at the start of a phase, and after every update."""


@dataclass(frozen=True)
class TrainedLogprobs:
    """log q of a version's fixed ids by the trainer."""

    logprobs: np.ndarray
    """[ids - 1] float32: of every id but the first."""
    spread: float
    """Standard deviation of log q over the vocabulary, mean over the positions; nats."""

    def tolerance(self, *dtypes: str) -> float:
        """Tolerance between sides that compute in these dtypes. Args: dtypes: `float32`, or a half-precision one."""
        if all(dtype == "float32" for dtype in dtypes):
            return FLOAT32_TOLERANCE
        return max(HALF_TOLERANCE, HALF_SHARE * self.spread)


@dataclass(frozen=True)
class Verdict:
    """Result of a replica's comparison after it has loaded a version."""

    version: int
    gap: float
    """Mean |log q - log q'|, nats a token; nan if either side is not finite."""
    tolerance: float

    @property
    def accepted(self) -> bool:
        return self.gap <= self.tolerance


def judge(version: int, trained: TrainedLogprobs, served: np.ndarray, *dtypes: str) -> Verdict:
    """Compare log q of the ranks with that of a replica. Args: served: of the same ids; dtypes: in which both compute."""
    with np.errstate(invalid="ignore"):
        gap = float(np.abs(trained.logprobs.astype(np.float64) - served.astype(np.float64)).mean())
    return Verdict(version, gap, trained.tolerance(*dtypes))


def parity_ids(prompts: Sequence[Sequence[int]], max_model_len: int) -> tuple[int, ...]:
    """Token ids to compare on: prompts one after the other, as many as a sequence of the run can hold, at most `LONG`."""
    ids: list[int] = []
    for prompt in prompts:
        ids += [int(token_id) for token_id in prompt]
        if len(ids) >= LONG:
            break
    return tuple(ids[: min(LONG, max_model_len)])


def refusal(verdict: Verdict, model: str) -> str:
    """Message about a version that no replica may sample from."""
    return (
        f"student version {verdict.version} of {model} was refused twice: its log q in the replicas differs from the trainer's "
        f"by {verdict.gap:.2g} nats a token on average (at most {verdict.tolerance:.2g} is rounding). Likely causes: an "
        "architecture whose weights the engine cannot replace in place, an attention implementation that leaves out a part of "
        "the model (training.attention), or different dtypes (dtype of the engine, training.precision). "
        "docs/models.md lists the families that were tried"
    )
