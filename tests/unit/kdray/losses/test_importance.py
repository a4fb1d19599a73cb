"""Bounds and means of the importance weights, and the effective sample size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdray.losses.importance import effective_sample_size, mixing_weight, staleness_ratio
from kdray.rollouts.mixture import log_mixture


def rows(seed, count=50, vocab=9, scale=3.0):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(count, vocab)) * scale).log_softmax(-1)


@given(st.floats(0.0, 0.99), st.integers(0, 1000))
def test_mixing_weight_is_bounded_and_has_mean_one_under_the_mixture(alpha, seed):
    teacher, student = rows(seed), rows(seed + 1)
    mixture = log_mixture(teacher, student, torch.full((50, 1), alpha, dtype=torch.float64))
    weights = mixing_weight(student, mixture)
    assert (weights > 0).all()
    assert weights.max().item() <= 1 / (1 - alpha) * (1 + 1e-12)
    # E_m[w | prefix] = sum over ids of m * q / m = 1
    torch.testing.assert_close((mixture.exp() * weights).sum(-1), torch.ones(50, dtype=torch.float64))


def test_mixing_weight_reaches_its_bound_where_the_teacher_never_goes():
    teacher, student = torch.tensor([[-60.0, 0.0]]).log_softmax(-1), torch.tensor([[0.0, 0.0]]).log_softmax(-1)
    weights = mixing_weight(student, log_mixture(teacher, student, torch.tensor([[0.2]])))
    assert weights[0, 0].item() == pytest.approx(1.25)
    assert weights[0, 1].item() == pytest.approx(0.5 / 0.6)


def test_mixing_weight_is_one_without_mixing_and_for_equal_models():
    teacher, student = rows(1), rows(2)
    alone = log_mixture(teacher, student, torch.zeros(50, 1))
    equal = log_mixture(student, student, torch.full((50, 1), 0.3))
    ones = torch.ones(50, 9, dtype=torch.float64)
    assert torch.equal(mixing_weight(student, alone), ones)
    torch.testing.assert_close(mixing_weight(student, equal), ones)


def test_staleness_ratio_is_capped_above_only():
    current = torch.tensor([0.5, 0.25, 0.125, 1.0]).log()
    sampled = torch.tensor([0.25, 0.25, 0.5, 1e-30]).log()
    ratio, clipped = staleness_ratio(current, sampled, cap=1.5)
    torch.testing.assert_close(ratio, torch.tensor([1.5, 1.0, 0.25, 1.5]))
    assert clipped.tolist() == [True, False, False, True]
    # At the cap itself nothing is cut off: under cap 1 the sampler's own version trains.
    kept, clipped = staleness_ratio(sampled, sampled, cap=1.0, handling="mask")
    assert (kept == 1.0).all()
    assert not clipped.any()
    # float32 overflow of the raw ratio still ends at the cap
    assert staleness_ratio(torch.tensor([0.0]), torch.tensor([-200.0]), cap=2.0)[0].item() == 2.0


def test_effective_sample_size_by_hand():
    # w = (1, 3): (1 + 3)^2 / (2 * (1 + 9)) = 16 / 20
    assert effective_sample_size(4.0, 10.0, 2) == pytest.approx(0.8)
    # one weight carries everything: 1 of 4 samples is left
    assert effective_sample_size(5.0, 25.0, 4) == pytest.approx(0.25)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_effective_sample_size_is_a_share(weights):
    array = np.array(weights)
    size = effective_sample_size(array.sum(), (array**2).sum(), len(array))
    assert 1 / len(array) * (1 - 1e-9) <= size <= 1.0


@given(st.floats(1e-3, 1e3), st.integers(1, 100))
def test_equal_weights_are_worth_all_samples(weight, count):
    array = np.full(count, weight)
    assert effective_sample_size(array.sum(), (array**2).sum(), count) == pytest.approx(1.0)


@pytest.mark.parametrize(("total", "count"), [(0.0, 0), (0.0, 3)])
def test_effective_sample_size_of_nothing_is_refused(total, count):
    with pytest.raises(ValueError, match="positive weight"):
        effective_sample_size(total, 0.0, count)
