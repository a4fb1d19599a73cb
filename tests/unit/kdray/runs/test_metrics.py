"""Sums to means, what rollouts tell, and that every name is in the table."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdray.config import ForwardKLLoss, JSDLoss, MiniLLMLoss, ReverseKLLoss
from kdray.losses import LossBatch, loss_function
from kdray.runs.metrics import METRICS, batch_metrics, reduce_sums
from kdray.types import Rollout

ROLLOUT = Rollout(
    sample_id=0,
    prompt_id=0,
    prompt_ids=np.array([1], dtype=np.int32),
    token_ids=np.array([2, 3], dtype=np.int32),
    mixture_logprobs=np.zeros(2, dtype=np.float32),
    student_logprobs=np.zeros(2, dtype=np.float32),
    student_versions=np.array([5, 6], dtype=np.int32),
    alpha=0.2,
    finish_reason="stop",
)


def test_context_of_the_environment_is_in_no_mean():
    """A rollout with turns tells what it tells without them, whatever stands there."""
    mixture, kl = np.array([-1.0, np.nan, -2.0], np.float32), np.array([0.5, np.nan, 1.5], np.float32)
    turns = replace(
        ROLLOUT,
        token_ids=np.array([2, 9, 3], np.int32),
        writer=np.array([0, 4, 0], np.int8),
        mixture_logprobs=mixture,
        student_logprobs=mixture - 0.5,
        student_versions=np.array([5, -3, 6], np.int32),
        reverse_kl=kl,
    )
    bare = {name: getattr(turns, name)[[0, 2]] for name in ("token_ids", "writer", "mixture_logprobs", "student_logprobs")}
    bare |= {name: getattr(turns, name)[[0, 2]] for name in ("student_versions", "reverse_kl")}
    metrics = batch_metrics([turns], trained_version=7)
    assert (metrics.pop("turns"), metrics.pop("environment_tokens")) == (2.0, 1.0)
    assert metrics == batch_metrics([replace(turns, **bare)], trained_version=7)
    assert (metrics["reverse_kl"], metrics["response_tokens"], metrics["staleness_max"]) == (1.0, 2.0, 2.0)


def test_sums_become_means_over_tokens():
    metrics = reduce_sums({"single_step": 6.0, "staleness_clipped": 1.0}, 4)
    assert metrics == {"single_step": 1.5, "staleness_clipped": 0.25}


def test_weights_become_mean_and_effective_sample_size():
    # w = (1, 3): mean 2, (1 + 3)^2 / (2 * (1 + 9)) = 0.8
    metrics = reduce_sums({"trajectory_weight": 4.0, "trajectory_weight_sq": 10.0}, 2)
    assert metrics == {"trajectory_weight_mean": 2.0, "trajectory_weight_ess": pytest.approx(0.8)}


def test_sums_of_a_group_become_means_over_its_own_tokens():
    of_a, of_b = {"teacher/a/clipped": 2.0, "teacher/a/tokens": 4.0}, {"teacher/b/clipped": 0.0, "teacher/b/tokens": 0.0}
    assert reduce_sums({"clipped": 3.0, **of_a, **of_b}, 6) == {"clipped": 0.5, "teacher/a/clipped": 0.5}


def test_the_gap_is_a_mean_over_fresh_tokens_alone():
    assert reduce_sums({"rollout_gap": 0.5, "rollout_gap_tokens": 2.0}, 8) == {"rollout_gap": 0.25}
    assert reduce_sums({"rollout_gap": 0.0, "rollout_gap_tokens": 0.0}, 8) == {}


def test_no_tokens_no_means():
    assert reduce_sums({"trajectory_weight": 0.0, "trajectory_weight_sq": 0.0, "single_step": 0.0}, 0) == {}


def test_rollouts_tell_staleness_length_and_truncation():
    longer = replace(
        ROLLOUT,
        token_ids=np.arange(5, dtype=np.int32),
        mixture_logprobs=np.zeros(5, dtype=np.float32),
        student_logprobs=np.zeros(5, dtype=np.float32),
        student_versions=np.full(5, 7, dtype=np.int32),
        finish_reason="length",
    )
    metrics = batch_metrics([ROLLOUT, longer], trained_version=7)
    # the first began under version 5, the second under 7
    metrics = {name: value for name, value in metrics.items() if "importance_weight" not in name}
    assert metrics == {"staleness_mean": 1.0, "staleness_max": 2.0, "response_tokens": 3.5, "truncated": 0.5}


def test_recorded_divergences_are_means_over_tokens_not_rollouts():
    one = replace(ROLLOUT, reverse_kl=np.array([1.0, 1.0], dtype=np.float32), forward_kl=np.zeros(2, dtype=np.float32))
    long = replace(ROLLOUT, reverse_kl=np.full(6, 3.0, dtype=np.float32))
    metrics = batch_metrics([one, long, ROLLOUT], trained_version=6)
    assert metrics["reverse_kl"] == pytest.approx((2 * 1.0 + 6 * 3.0) / 8)
    assert metrics["forward_kl"] == 0.0


def test_design_names_are_in_the_table():
    promised = """loss reverse_kl forward_kl response_tokens importance_weight_mean importance_weight_ess
        staleness_mean staleness_max tokens_per_s wait_rollout_s wait_teacher_s wait_sync_s teacher_replicas
        learning_rate grad_norm train_step_s queue_age_s published_bytes"""
    assert set(promised.split()) <= set(METRICS)
    assert all(metric.unit and metric.meaning for metric in METRICS.values())


@pytest.mark.parametrize(
    "settings",
    [MiniLLMLoss(), ReverseKLLoss(type="reverse_kl"), ForwardKLLoss(type="forward_kl"), JSDLoss(type="jsd"), None],
)
def test_every_loss_reports_under_names_of_the_table(settings):
    ones = torch.full((1, 3), -1.0)
    batch = LossBatch(
        token_ids=torch.tensor([[1, 2, 3]]),
        mask=torch.tensor([[False, True, True]]),
        vocab_size=4,
        mixture_logprobs=ones,
        student_logprobs=ones,
        teacher_logprobs=ones,
        support_ids=torch.tensor([0]).repeat(1, 3, 1),
        support_logprobs=ones.unsqueeze(-1),
        tail_logprobs=torch.log1p(-ones.exp()),
    )
    sums = loss_function(settings)(torch.zeros(1, 3, 4), batch, settings).sums
    metrics = reduce_sums({name: float(value) for name, value in sums.items()}, 2)
    assert set(metrics) <= set(METRICS)
    assert {name.rsplit("/")[-1] for name in [*metrics, *batch_metrics([ROLLOUT], 6)]} <= set(METRICS)
    if settings is not None:
        assert metrics["teacher_tail_mass"] == pytest.approx(1 - np.exp(-1))
        assert metrics["student_tail_mass"] == pytest.approx(3 / 4)
