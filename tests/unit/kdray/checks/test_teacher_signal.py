"""The checks before the first step: what a sound teacher passes, and each way of saying nothing is caught."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kdray.checks.teacher_signal import check_loss, check_prefill, check_rows
from kdray.config import (
    AdaptiveKLLoss,
    ForwardKLLoss,
    ForwardKLSampledLoss,
    HintonLoss,
    JSDLoss,
    LMOpsLoss,
    MiniLLMLoss,
    MSELogitLoss,
    PerDecisionLoss,
    ReverseKLLoss,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    TVDLoss,
    VOPDLoss,
)
from kdray.errors import SignalError
from kdray.types import Rollout

VOCAB = 31
LOSSES = [
    MiniLLMLoss(),
    MiniLLMLoss(whitening=True),
    LMOpsLoss(type="lmops"),
    PerDecisionLoss(type="per_decision", horizon=2),
    VOPDLoss(type="vopd"),
    ReverseKLLoss(type="reverse_kl"),
    ForwardKLLoss(type="forward_kl"),
    JSDLoss(type="jsd"),
    SkewForwardKLLoss(type="skew_forward_kl"),
    SkewReverseKLLoss(type="skew_reverse_kl"),
    TVDLoss(type="tvd"),
    AdaptiveKLLoss(type="adaptive_kl"),
    MSELogitLoss(type="mse_logit"),
    HintonLoss(type="hinton"),
    ForwardKLSampledLoss(type="forward_kl_sampled"),
]


def recorded(rows: np.ndarray, sample_id: int = 0, width: int = 6, seed: int = 0) -> Rollout:
    """A rollout drawn from the teacher's log-softmax rows [T, vocab], with what the recorder would keep of them."""
    rng = np.random.default_rng(seed)
    tokens = np.array([rng.choice(VOCAB, p=np.exp(row) / np.exp(row).sum()) for row in rows], dtype=np.int32)
    ids = np.argsort(-rows, axis=1, kind="stable")[:, :width]
    support = np.take_along_axis(rows, ids, 1)
    # The last slot is one of the student's, as the recorder leaves it where both agree.
    ids = np.concatenate([ids, np.full((len(rows), 1), -1)], axis=1).astype(np.int32)
    support = np.concatenate([support, np.full((len(rows), 1), -np.inf)], axis=1)
    at_tokens = rows[np.arange(len(rows)), tokens]
    return Rollout(
        sample_id=sample_id,
        prompt_id=sample_id,
        prompt_ids=np.array([3, 4], dtype=np.int32),
        token_ids=tokens,
        mixture_logprobs=at_tokens.astype(np.float32),
        student_logprobs=np.full(len(rows), -3.0, dtype=np.float32),
        student_versions=np.zeros(len(rows), dtype=np.int32),
        alpha=1.0,
        finish_reason="length",
        teacher="wise",
        teacher_logprobs=at_tokens.astype(np.float32),
        support_ids=ids,
        support_logprobs=support.astype(np.float32),
        tail_logprobs=np.log1p(-np.exp(support).sum(1)).astype(np.float32),
    )


def rows_of(seed: int, length: int = 9, scale: float = 2.0) -> np.ndarray:
    logits = scale * np.random.default_rng(seed).normal(size=(length, VOCAB))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


SOUND = [recorded(rows_of(seed), seed, seed=seed) for seed in range(4)]


def test_a_sound_teacher_passes():
    found = check_rows(SOUND, VOCAB)
    assert found["tokens"] == 36
    assert found["top_prob"] == pytest.approx(np.mean([np.exp(rows_of(seed)).max(1) for seed in range(4)]), rel=1e-5)
    assert any(not np.isin(rollout.token_ids, rollout.support_ids).all() for rollout in SOUND), "no token in the tail"


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.type}{'-whitened' * getattr(loss, 'whitening', False)}")
@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.9])
def test_every_loss_is_zero_at_the_teacher_and_pushes_away_from_it(loss, alpha):
    found = check_loss(SOUND, loss, alpha, VOCAB)
    assert abs(found["loss_equal"]) < 1e-5
    assert found["divergence_perturbed"] > 0.1
    assert found["gradient_perturbed"] > 0.01


@pytest.mark.parametrize("weight", [0.0, 1e-6, 100.0])
def test_the_weight_of_the_loss_beside_a_reward_changes_nothing(weight):
    """A run that trains on the reward alone has a teacher that samples with it."""
    settings = MiniLLMLoss(reward_weight=1.0, distillation_weight=weight)
    assert check_loss(SOUND, settings, 0.2, VOCAB) == check_loss(SOUND, MiniLLMLoss(), 0.2, VOCAB)


@pytest.mark.parametrize("width", [VOCAB, 6])
def test_uniform_rows_stop_the_run(width):
    flat = np.full((5, VOCAB), -np.log(VOCAB))
    with pytest.raises(SignalError, match=r"teacher wise: its rows are uniform .*teachers\.wise\.model"):
        check_rows([recorded(flat, width=width)], VOCAB)


def test_rows_that_do_not_depend_on_the_prefix_stop_the_run():
    row = rows_of(0, length=1)
    with pytest.raises(SignalError, match="same after all 8 test prefixes"):
        check_rows([recorded(np.repeat(row, 4, axis=0), seed=seed) for seed in range(2)], VOCAB)
    # One different row is enough to pass.
    check_rows([recorded(np.concatenate([np.repeat(row, 4, axis=0), rows_of(1, length=1)]))], VOCAB)


@pytest.mark.parametrize("column", ["teacher_logprobs", "support_logprobs", "tail_logprobs"])
def test_numbers_that_are_none_stop_the_run(column):
    values = getattr(SOUND[0], column).copy()
    values[2] = np.nan
    with pytest.raises(SignalError, match=r"no valid log p.*dtype=float32"):
        check_rows([replace(SOUND[0], **{column: values}), *SOUND[1:]], VOCAB)


def test_rows_that_are_no_distribution_stop_the_run():
    with pytest.raises(SignalError, match=r"sum to 1\.\d+, not 1"):
        check_rows([replace(SOUND[0], tail_logprobs=SOUND[0].tail_logprobs + 0.5)], VOCAB)


def test_no_tokens_stop_the_run():
    empty = {name: getattr(SOUND[0], name)[:0] for name in ("token_ids", "teacher_logprobs", "tail_logprobs")}
    wide = {name: getattr(SOUND[0], name)[:0] for name in ("support_ids", "support_logprobs")}
    with pytest.raises(SignalError, match="none of 1 test rollouts has a token"):
        check_rows([replace(SOUND[0], **empty, **wide)], VOCAB)


def test_decoding_and_prefill_must_agree():
    moved = [replace(rollout, teacher_logprobs=rollout.teacher_logprobs + 0.01) for rollout in reversed(SOUND)]
    assert check_prefill(SOUND, moved, tolerance=0.02) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(SignalError, match=r"differs by 0\.01 nats between decoding and prefill"):
        check_prefill(SOUND, moved, tolerance=0.001)


def test_a_support_that_lies_about_the_tokens_is_caught():
    """log p of the tokens from another teacher than the support: no student can be equal to both."""
    mixed = [replace(one, teacher_logprobs=np.roll(one.teacher_logprobs, 1)) for one in SOUND]
    with pytest.raises(SignalError, match="do not fit"):
        check_loss(mixed, ReverseKLLoss(type="reverse_kl"), 0.2, VOCAB)
