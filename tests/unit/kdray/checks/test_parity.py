"""Parity of trainer and replicas: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import numpy as np
import pytest

from kdray.checks.parity import HALF_SHARE, HALF_TOLERANCE, LONG, TrainedLogprobs, Verdict, judge, parity_ids, refusal

TRAINED = np.linspace(-4.0, -0.1, 64).astype(np.float32)
FLAT, SHARP = TrainedLogprobs(TRAINED, 1.0), TrainedLogprobs(TRAINED, 6.0)


def test_rounding_of_float32_kernels_is_accepted() -> None:
    verdict = judge(3, SHARP, TRAINED + np.float32(5e-6), "float32", "float32")
    assert verdict.version == 3
    assert verdict.gap == pytest.approx(5e-6, rel=0.1)
    assert verdict.accepted


@pytest.mark.parametrize("served", [TRAINED + 0.01, np.where(np.arange(64) == 7, np.nan, TRAINED), TRAINED - np.inf])
def test_other_weights_and_broken_numbers_are_refused(served: np.ndarray) -> None:
    assert not judge(1, SHARP, served.astype(np.float32), "float32", "float32").accepted


def test_half_precision_on_either_side_has_a_wider_tolerance() -> None:
    assert FLAT.tolerance("float32", "bfloat16") == FLAT.tolerance("bfloat16", "bfloat16") == HALF_TOLERANCE
    assert judge(1, FLAT, TRAINED + np.float32(0.01), "float32", "bfloat16").accepted
    assert not judge(1, FLAT, TRAINED + np.float32(0.1), "bfloat16", "bfloat16").accepted


def test_sharp_distributions_are_rounded_by_more() -> None:
    """bfloat16 moved log q of a model of 24 layers by 0.099 nats on average, whose spread is 6."""
    assert judge(1, SHARP, TRAINED + np.float32(0.099), "bfloat16", "bfloat16").accepted
    assert not judge(1, SHARP, TRAINED + np.float32(1.1 * 6.0 * HALF_SHARE), "bfloat16", "bfloat16").accepted


def test_the_sequence_holds_as_many_prompts_as_fit() -> None:
    prompts = [np.arange(5), np.arange(5, 9)]
    assert parity_ids([prompt.tolist() for prompt in prompts], 7) == (0, 1, 2, 3, 4, 5, 6)
    assert len(parity_ids([[1] * 300] * 10, 10**6)) == LONG


def test_the_refusal_names_version_model_gap_and_causes() -> None:
    message = refusal(Verdict(7, 1.25, 1e-3), "models/student")
    for part in ("version 7", "models/student", "1.2 nats", "0.001", "training.attention", "dtype"):
        assert part in message
