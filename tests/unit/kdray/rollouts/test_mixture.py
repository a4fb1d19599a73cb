"""The mixture's distribution, the exact draw from it, and the hash that drives the draw."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdray.rollouts.mixture import draw, draw_mixed, hashes, log_mixture, uniforms_of
from kdray.rollouts.seeds import sample_seed, uniforms

torch.set_num_threads(1)

TEACHER = torch.tensor([[0.7, 0.2, 0.1, 0.0]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.1, 0.3, 0.0, 0.6]], dtype=torch.float64).log()


def alphas(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def test_log_mixture_by_hand():
    # 0.2 (0.7, 0.2, 0.1, 0) + 0.8 (0.1, 0.3, 0, 0.6)
    expected = torch.tensor([[0.22, 0.28, 0.02, 0.48]], dtype=torch.float64)
    torch.testing.assert_close(log_mixture(TEACHER, STUDENT, alphas(0.2)).exp(), expected)


def test_log_mixture_at_the_ends_is_one_model_alone_even_where_the_other_has_no_mass():
    assert torch.equal(log_mixture(TEACHER, STUDENT, alphas(0.0)), STUDENT)
    assert torch.equal(log_mixture(TEACHER, STUDENT, alphas(1.0)), TEACHER)
    nowhere = torch.full((1, 4), -torch.inf, dtype=torch.float64)
    assert torch.equal(log_mixture(nowhere, STUDENT, alphas(0.0)), STUDENT)
    assert torch.equal(log_mixture(TEACHER, nowhere, alphas(1.0)), TEACHER)


def test_log_mixture_takes_each_rows_own_alpha():
    both = log_mixture(TEACHER.expand(3, 4), STUDENT.expand(3, 4), alphas(0.0, 0.5, 1.0))
    torch.testing.assert_close(both.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(both[0], STUDENT[0])
    assert torch.equal(both[2], TEACHER[0])
    torch.testing.assert_close(both[1].exp(), (TEACHER.exp() + STUDENT.exp())[0] / 2)


def test_draws_follow_the_mixture():
    """Chi-square over 20,000 hashed draws, one seed a sample, as the recorder makes them."""
    count = 20_000
    seeds = np.array([sample_seed(0, "train", sample) for sample in range(count)], dtype=np.uint64)
    distribution = log_mixture(TEACHER, STUDENT, alphas(0.2))
    tokens = draw(distribution.float().expand(count, 4), torch.from_numpy(uniforms(seeds, np.zeros(count, dtype=np.int64))))
    observed = np.bincount(tokens.numpy(), minlength=4)
    assert stats.chisquare(observed, distribution.exp()[0].numpy() * count).pvalue > 1e-3
    # the test can tell: the same draws do not fit alpha and 1 - alpha exchanged
    swapped = log_mixture(TEACHER, STUDENT, alphas(0.8)).exp()[0].numpy() * count
    assert stats.chisquare(observed, swapped).pvalue < 1e-12


def test_draw_inverts_the_cdf():
    distribution = torch.tensor([[0.25, 0.25, 0.5]]).log().expand(6, 3)
    points = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.9999], dtype=torch.float64)
    assert draw(distribution, points).tolist() == [0, 0, 1, 1, 2, 2]


@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.float64]))
def test_zero_probability_tokens_are_never_drawn(seed, dtype):
    """Not at the ends of the interval either, nor where zeros lead, trail or stand in between."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(2, 12))
    possible = rng.random(vocab) < 0.4
    possible[rng.integers(vocab)] = True
    logits = torch.tensor(np.where(possible, rng.normal(size=vocab) * 3, -np.inf), dtype=dtype)
    points = torch.tensor([0.0, 2.0**-53, *rng.random(60), 1.0 - 2.0**-53], dtype=torch.float64)
    tokens = draw(logits.log_softmax(-1).repeat(len(points), 1), points)
    assert possible[tokens.numpy()].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_leaves_its_rows_as_they_were(dtype):
    """The recorder reads log m from the same rows afterwards."""
    distribution = log_mixture(TEACHER, STUDENT, alphas(0.2)).to(dtype)
    before = distribution.clone()
    draw(distribution, torch.tensor([0.5], dtype=torch.float64))
    assert torch.equal(distribution, before)


def test_draw_in_blocks_is_the_same():
    rng = np.random.default_rng(0)
    distribution = torch.tensor(rng.normal(size=(33, 50)), dtype=torch.float32).log_softmax(-1)
    points = torch.tensor(rng.random(33))
    whole = draw(distribution, points, max_rows=1000)
    assert torch.equal(draw(distribution, points, max_rows=1), whole)
    assert torch.equal(draw(distribution, points, max_rows=8), whole)
    assert len(set(whole.tolist())) > 10


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 511, 512, 513, 5000])
def test_a_draw_from_two_distributions_is_that_from_their_mixture(vocab):
    """The same tokens, for blocks of any number and fill; of one distribution alone too."""
    rng = np.random.default_rng(vocab)
    p, q = (torch.tensor(rng.normal(size=(400, vocab)), dtype=torch.float32).mul(3).log_softmax(-1) for _ in range(2))
    alpha = torch.tensor([0.0, 0.3, 0.9, 1.0]).repeat(100).unsqueeze(-1)
    points = torch.tensor(rng.random(400))
    tokens = draw_mixed([(alpha, p.exp()), (1 - alpha, q.exp())], points)
    assert torch.equal(tokens, draw(log_mixture(p, q, alpha), points))
    assert torch.equal(draw_mixed([(torch.ones(400, 1), p.exp())], points), draw(p, points))


@given(st.integers(0, 10_000))
def test_two_distributions_never_give_a_token_that_neither_has(seed):
    """Whole blocks without a token, the first and the last one too, at the ends of the interval."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(2, 1200))
    possible = (rng.random((2, vocab)) < 0.3) & (rng.random(vocab // 100 + 1) < 0.3).repeat(100)[:vocab]
    possible[:, rng.integers(vocab)] = True
    distributions = [torch.tensor(np.where(each, rng.normal(size=vocab) * 3, -np.inf)).softmax(-1).float() for each in possible]
    points = torch.tensor([0.0, 2.0**-53, *rng.random(60), 1.0 - 2.0**-53], dtype=torch.float64)
    for alpha in (0.0, 0.4, 1.0):
        share = torch.full((len(points), 1), alpha)
        parts = [(share, distributions[0].repeat(len(points), 1)), (1 - share, distributions[1].repeat(len(points), 1))]
        allowed = possible[0] & (alpha > 0) | possible[1] & (alpha < 1)
        assert allowed[draw_mixed(parts, points).numpy()].all()


@pytest.mark.parametrize("vocab", [5, 256, 700])
def test_rows_of_nan_give_an_id_of_the_vocabulary(vocab):
    """The engine does not end in the middle of a step; what the rows are is found where they are recorded."""
    rows = torch.full((3, vocab), torch.nan)
    points = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    for tokens in (draw(rows, points), draw_mixed([(torch.ones(3, 1), rows)], points)):
        assert ((tokens >= 0) & (tokens < vocab)).all()


def test_draws_from_two_distributions_follow_the_mixture_across_blocks():
    count, vocab = 20_000, 700
    seeds = np.array([sample_seed(1, "train", sample) for sample in range(count)], dtype=np.uint64)
    points = torch.from_numpy(uniforms(seeds, np.zeros(count, dtype=np.int64)))
    p, q = (torch.linspace(-2, edge, vocab, dtype=torch.float64).softmax(-1) for edge in (2.0, -4.0))
    share = torch.full((count, 1), 0.3)
    tokens = draw_mixed([(share, p.float().expand(count, vocab)), (1 - share, q.float().expand(count, vocab))], points)
    observed = np.bincount(tokens.numpy(), minlength=vocab)
    assert stats.chisquare(observed, (0.3 * p + 0.7 * q).numpy() * count).pvalue > 1e-3
    assert stats.chisquare(observed, (0.7 * p + 0.3 * q).numpy() * count).pvalue < 1e-12


def test_a_tensors_hash_has_the_bits_of_numpys():
    """At the ends of 64 bits too."""
    rng = np.random.default_rng(0)
    edges = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    seeds = np.concatenate([edges, rng.integers(0, 2**64, 50_000, dtype=np.uint64)])
    positions = rng.integers(0, 200_000, len(seeds))
    hashed = hashes(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions))
    assert np.array_equal(uniforms_of(hashed).numpy(), uniforms(seeds, positions))


def test_uniforms_are_uniform_over_seeds_and_over_positions():
    seeds = np.array([sample_seed(3, "train", sample) for sample in range(20_000)], dtype=np.uint64)
    across = uniforms(seeds, np.zeros(len(seeds), dtype=np.int64))
    along = uniforms(np.full(20_000, seeds[0]), np.arange(20_000))
    consecutive = uniforms(np.arange(20_000, dtype=np.uint64), np.zeros(20_000, dtype=np.int64))
    for values in (across, along, consecutive):
        assert ((values >= 0) & (values < 1)).all()
        assert stats.kstest(values, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(len(values))
    pairs = np.histogram2d(along[:-1], along[1:], bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


def test_uniforms_depend_on_seed_and_position_only():
    seeds = np.array([1, 1, 2, 2], dtype=np.uint64)
    positions = np.array([0, 5, 0, 5])
    values = uniforms(seeds, positions)
    assert len(set(values.tolist())) == 4
    one_by_one = [uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(4)]
    assert values.tolist() == one_by_one
    # splitmix64's first output for state 0 is 0xE220A8397B1DCDAF; its upper 53 bits make the uniform
    assert uniforms(np.array([0], dtype=np.uint64), np.array([0]))[0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


def test_sample_seeds_are_apart_by_run_stream_and_sample():
    seeds = {sample_seed(run, stream, sample) for run in (0, 1) for stream in ("train", "heldout") for sample in range(500)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert sample_seed(0, "train", 7) == sample_seed(0, "train", 7)


@pytest.mark.parametrize("peak", [0.0, 12.0], ids=["flat", "peaked"])
def test_a_large_vocabulary_is_drawn_from_as_its_float64_sums_say(peak: float) -> None:
    """A float32 sum over 150,000 ids is off by a hundred of them in a flat row, and skips most of the tail of a peaked one."""
    vocab = 151_936
    logits = 0.1 * np.random.default_rng(0).normal(size=vocab)
    logits[vocab // 3] += peak
    rows = torch.from_numpy(logits).float().log_softmax(-1)[None]
    uniforms = (torch.arange(2000, dtype=torch.float64) + 0.37) / 2000
    masses = np.exp(rows[0].numpy().astype(np.float64))
    cdf = np.cumsum(masses)
    expected = np.searchsorted(cdf, uniforms.numpy() * cdf[-1], side="right")
    found = draw(rows.expand(len(uniforms), -1), uniforms)
    np.testing.assert_array_equal(found.numpy(), expected)
    # Sums within a block of 256 ids are float32: a neighbour at most, of masses at a boundary.
    blocks = draw_mixed([(torch.ones(len(uniforms), 1), rows.exp().expand(len(uniforms), -1))], uniforms)
    assert np.abs(blocks.numpy() - expected).max() <= 1


def test_the_tail_behind_a_likely_id_is_drawn_from_id_by_id() -> None:
    """Sums near 1, of which a float32 one steps over thirty of these ids at once."""
    vocab = 151_936
    logits = torch.from_numpy(0.1 * np.random.default_rng(1).normal(size=vocab)).float()
    logits[0] = 20.0
    row = logits.log_softmax(-1)[None]
    cdf = np.cumsum(np.exp(row[0].numpy().astype(np.float64)))
    points = torch.from_numpy((cdf[0] + (cdf[-1] - cdf[0]) * (np.arange(100) + 0.37) / 100) / cdf[-1])
    expected = np.searchsorted(cdf, points.numpy() * cdf[-1], side="right")
    np.testing.assert_array_equal(draw(row.expand(100, -1), points).numpy(), expected)
    found = draw_mixed([(torch.ones(100, 1), row.exp().expand(100, -1))], points)
    assert np.abs(found.numpy() - expected).max() <= 1


def test_the_ids_of_a_block_behind_a_likely_one_are_drawn_too() -> None:
    """Masses of 1e-9, which a float32 sum does not add to 1."""
    masses = torch.cat([torch.ones(1), torch.full((255,), 1e-9)])
    cdf = np.cumsum(masses.numpy().astype(np.float64))
    wanted = np.arange(1, 256)
    points = torch.from_numpy((cdf[wanted - 1] + 0.5e-9) / cdf[-1])
    for parts in ([(torch.ones(255, 1), masses.expand(255, -1))], [(torch.full((255, 1), 0.5), masses.expand(255, -1))] * 2):
        assert draw_mixed(parts, points).tolist() == wanted.tolist()
