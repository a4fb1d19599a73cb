"""Draws and statistics of rows against the plain computation, on ordinary rows and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from actors.vllm_plugin.record_table import FLOATS, INTS
from actors.vllm_plugin.row_statistics import Rows, RowStatistics, Statistics, draw_rows, measured_columns, probabilities
from kdray.rollouts.mixture import hashes, uniforms_of
from tests.support import plain_recorder as plain
from tests.support.plain_recorder import random_rows

torch.set_num_threads(1)
TOP = (6, 3)
VERSIONS = torch.arange(3, 1000)


def named(statistics: Statistics) -> plain.Columns:
    found = {}
    for layout, values in ((FLOATS, statistics.floats), (INTS, statistics.ints)):
        width = (values.shape[-1] - len(layout.single)) // max(1, len(layout.wide))
        widths = [1] * len(layout.single) + [width] * len(layout.wide)
        found |= dict(zip(layout.names, values.split(widths, dim=-1), strict=True))
    return found


def check(statistics: Statistics, expected: plain.Columns) -> None:
    """Ids are equal; what is read from a row is equal to the bit; sums are equal up to the order of their terms."""
    found = named(statistics)
    for name, want in expected.items():
        if name in ("tail_logprobs", "reverse_kl", "forward_kl"):
            torch.testing.assert_close(found[name], want, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(found[name].to(want), want), name


def alphas(count: int) -> torch.Tensor:
    return torch.tensor([0.0, 0.2, 0.5, 1.0]).repeat(count // 4 + 1)[:count].unsqueeze(-1)


def only(rows: Rows, role: str) -> Rows:
    return (
        rows
        if role == "mixture"
        else Rows(**{"teacher": None, "student": None, "hidden": rows.hidden, role: getattr(rows, role)})
    )


@pytest.mark.parametrize("role", ["mixture", "teacher", "student"])
@pytest.mark.parametrize("vocab", [3, 11, 48, 256, 512, 3001])
def test_draws_and_columns_are_those_of_the_plain_computation(role: str, vocab: int) -> None:
    count = 64
    rows = only(random_rows(count, vocab, seed=vocab), role)
    alpha = alphas(count) if role == "mixture" else torch.full((count, 1), float(role == "teacher"))
    rng = np.random.default_rng(vocab)
    seeds, positions = rng.integers(0, 2**64, count, dtype=np.uint64), rng.integers(0, 1000, count)
    masses = probabilities(rows)
    hashed = hashes(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions))
    tokens = draw_rows(masses, alpha, uniforms_of(hashed))
    assert torch.equal(tokens, plain.drawn(rows, alpha, seeds.tolist(), positions.tolist()))
    measured = RowStatistics(*TOP, record_hidden=True).measure(rows, masses, tokens, VERSIONS[:count], alpha=alpha)
    check(measured, plain.columns(rows, tokens, alpha, TOP))
    found = named(measured)
    assert torch.equal(found["student_versions"].squeeze(-1), VERSIONS[:count].int())
    assert rows.hidden is not None
    assert torch.equal(measured.hidden, rows.hidden.half())
    filled = {column.name for column in measured_columns(role != "student", role != "teacher", True)} - {"teacher_hidden"}
    for name, values in found.items():
        assert (name in filled) != (not values.numel() or bool(values.isnan().all())), name


@pytest.mark.parametrize("top_k", [False, True])
def test_a_support_begins_with_the_ids_that_the_caller_asks_for(top_k: bool) -> None:
    """Unused slots among them, in some rows nothing else, and ids that the models' own top ids repeat."""
    count, vocab = 40, 30
    rows = random_rows(count, vocab, seed=5)
    generator = torch.Generator().manual_seed(1)
    asked = torch.stack([torch.randperm(vocab, generator=generator)[:8] for _ in range(count)])
    asked[torch.rand(asked.shape, generator=generator) < 0.4] = -1
    asked[:3] = -1
    asked[3:6] = torch.arange(8)
    tokens = torch.randint(0, vocab, (count,), generator=generator)
    statistics = RowStatistics(*TOP, record_hidden=False)
    measured = statistics.measure(rows, probabilities(rows), tokens, VERSIONS[: len(tokens)], asked=asked, top_k=top_k)
    check(measured, plain.columns(rows, tokens, None, TOP, asked, top_k))


def test_no_ids_at_all_leave_all_mass_outside() -> None:
    rows = random_rows(5, 9, seed=2)
    statistics = RowStatistics(*TOP, record_hidden=False)
    found = named(statistics.measure(rows, probabilities(rows), torch.zeros(5, dtype=torch.long), VERSIONS[:5], top_k=False))
    assert (found["tail_logprobs"] == 0).all()
    assert found["support_ids"].shape == (5, 0)


def test_impossible_tokens_contribute_nothing_and_are_never_drawn() -> None:
    count, vocab = 200, 300
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, count, vocab, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.4] = -torch.inf
    logits[:, :, 7] = 0.0
    # The teacher's possible tokens are among the student's, so that one divergence is finite and the other is not.
    logits[1][logits[0] > -torch.inf] = 0.5
    rows = Rows(logits[0].log_softmax(-1), logits[1].log_softmax(-1), None)
    alpha = alphas(count)
    masses = probabilities(rows)
    tokens = draw_rows(masses, alpha, torch.rand(count, generator=generator, dtype=torch.float64))
    assert (plain.mixture(rows, alpha).gather(-1, tokens.unsqueeze(-1)) > -torch.inf).all()
    measured = RowStatistics(*TOP, record_hidden=False).measure(rows, masses, tokens, VERSIONS[: len(tokens)], alpha=alpha)
    expected = plain.columns(rows, tokens, alpha, TOP)
    check(measured, expected)
    assert (expected["reverse_kl"] == torch.inf).any()
    assert expected["forward_kl"].isfinite().all()


def test_a_tail_too_small_for_float32_has_a_logprob_all_the_same() -> None:
    """Its largest token stands for it; one of the student's ids, in the support, is not taken for outside."""
    logits = torch.tensor([[0.0, -1.0, -130.0, -140.0, -150.0]])
    rows = Rows(logits.log_softmax(-1), torch.tensor([[0.0, 0.0, 9.0, 0.0, 0.0]]).log_softmax(-1), None)
    assert rows.teacher is not None
    statistics = RowStatistics(2, 1, record_hidden=False)
    found = named(statistics.measure(rows, probabilities(rows), torch.tensor([0]), VERSIONS[:1], alpha=torch.tensor([[0.5]])))
    assert found["support_ids"].tolist() == [[0, 1, 2]]
    assert found["tail_logprobs"].item() == rows.teacher[0, 3].item()


def test_a_support_of_the_whole_vocabulary_leaves_no_tail() -> None:
    rows = random_rows(6, 5, seed=4)
    found = named(RowStatistics(9, 9, False).measure(rows, probabilities(rows), torch.zeros(6, dtype=torch.long), VERSIONS[:6]))
    assert (found["tail_logprobs"] == -torch.inf).all()
    assert (found["support_ids"].sort(-1).values == torch.arange(5)).all()


@pytest.mark.parametrize("broken", ["teacher", "student"])
def test_a_broken_model_shows(broken: str) -> None:
    """Its nan is not mistaken for a token of no probability, and the draw stays within the vocabulary."""
    rows = random_rows(2, 300, seed=6)
    getattr(rows, broken)[1] = torch.nan
    alpha = torch.full((2, 1), 0.5)
    masses = probabilities(rows)
    tokens = draw_rows(masses, alpha, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < 300)).all()
    found = named(RowStatistics(*TOP, False).measure(rows, masses, tokens, VERSIONS[: len(tokens)], alpha=alpha))
    for name in ("mixture_logprobs", f"{broken}_logprobs", "reverse_kl", "forward_kl"):
        assert math.isnan(found[name][1].item()), name
        assert math.isfinite(found[name][0].item()), name
