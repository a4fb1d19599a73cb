"""Universal Logit Distillation against float64 NumPy, its gradient, and a student that learns from another vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdray.config import ULDLoss, parse_config
from kdray.errors import ConfigError
from kdray.losses import LossBatch, loss_function
from kdray.losses.uld import UNMATCHED

VOCAB, K = 7, 4


def case(seed: int = 0, rows: int = 5) -> tuple[torch.Tensor, LossBatch]:
    """Student logits [1, rows, VOCAB] in float64 and random teacher columns; the last row has none."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(1, rows, VOCAB)))
    ids = np.full((1, rows, K), -1)
    logprobs, tail = np.full((1, rows, K), -np.inf), np.zeros((1, rows))
    for row in range(rows - 1):
        p = rng.dirichlet(np.ones(K + 1))
        used = rng.integers(1, K + 1)
        # Several of the teacher's tokens may begin with one of the student's.
        ids[0, row, :used] = np.where(rng.random(used) < 0.4, UNMATCHED, rng.integers(0, 3, used))
        logprobs[0, row, :used] = np.log(p[:used])
        tail[0, row] = np.log(p[used:].sum())
    batch = LossBatch(
        token_ids=torch.zeros(1, rows, dtype=torch.long),
        mask=torch.ones(1, rows, dtype=torch.bool),
        vocab_size=VOCAB,
        support_ids=torch.from_numpy(ids),
        support_logprobs=torch.from_numpy(logprobs),
        tail_logprobs=torch.from_numpy(tail),
    )
    return logits, batch


def by_hand(logits: torch.Tensor, batch: LossBatch, settings: ULDLoss) -> float:
    total = 0.0
    for row in range(logits.shape[1]):
        q = np.exp(logits[0, row].numpy())
        q /= q.sum()
        assert batch.support_ids is not None
        assert batch.support_logprobs is not None
        assert batch.tail_logprobs is not None
        ids, p = batch.support_ids[0, row].numpy(), np.exp(batch.support_logprobs[0, row].numpy())
        used = ids != -1
        if not used.any():
            continue
        n = used.sum()
        ranked_p, ranked_q = np.sort(p[used])[::-1], np.sort(q)[::-1][:n]
        rest_p = np.exp(float(batch.tail_logprobs[0, row]))
        total += settings.sorted_weight * (np.abs(ranked_p - ranked_q).sum() + abs(rest_p - (1 - ranked_q.sum())))
        masses: dict[int, float] = {}
        for token_id, mass in zip(ids[ids >= 0].tolist(), p[ids >= 0], strict=True):
            masses[token_id] = masses.get(token_id, 0.0) + mass
        other_p, other_q = 1 - sum(masses.values()), 1 - q[list(masses)].sum()
        kl = sum(mass * np.log(mass / q[token_id]) for token_id, mass in masses.items()) + other_p * np.log(other_p / other_q)
        total += settings.matched_weight * kl
    return total


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 2.0), (0.5, 0.0)])
@pytest.mark.parametrize("seed", range(6))
def test_value_against_numpy(seed: int, weights: tuple[float, float]) -> None:
    settings = ULDLoss(type="uld", sorted_weight=weights[0], matched_weight=weights[1])
    logits, batch = case(seed)
    output = loss_function(settings)(logits, batch, settings)
    assert float(output.total) == pytest.approx(by_hand(logits, batch, settings), abs=1e-10)
    assert float(output.sums["aligned"]) == 4


def test_ranks_are_those_of_the_teachers_own_probabilities() -> None:
    """Two of its tokens begin alike: their masses add up for the KL, and are two ranks for the distance."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    batch = LossBatch(
        token_ids=torch.zeros(1, 1, dtype=torch.long),
        mask=torch.ones(1, 1, dtype=torch.bool),
        vocab_size=VOCAB,
        support_ids=torch.tensor([[[5, 5, 1, UNMATCHED]]]),
        support_logprobs=p.log()[None, None],
        tail_logprobs=torch.full((1, 1), -torch.inf, dtype=torch.float64),
    )
    settings = ULDLoss(type="uld")
    same_shape = torch.full((1, 1, VOCAB), -torch.inf, dtype=torch.float64)
    same_shape[0, 0, [3, 2, 5, 1]] = p.log()
    assert loss_function(settings)(same_shape, batch, settings).sums["uld"].item() == pytest.approx(0.0, abs=1e-12)
    same_masses = torch.full((1, 1, VOCAB), -torch.inf, dtype=torch.float64)
    same_masses[0, 0, [5, 1, 0]] = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    sums = loss_function(settings)(same_masses, batch, settings).sums
    assert sums["matched_kl"].item() == pytest.approx(0.0, abs=1e-12)
    assert sums["uld"].item() == pytest.approx(0.3 + 0.1 + 0.1 + 0.1)


def test_gradient() -> None:
    settings = ULDLoss(type="uld")
    logits, batch = case(3)
    assert torch.autograd.gradcheck(
        lambda given: loss_function(settings)(given, batch, settings).total,
        logits.clone().requires_grad_(),
        eps=1e-7,
        atol=1e-5,
    )


def test_rows_that_are_not_there_have_no_gradient() -> None:
    settings = ULDLoss(type="uld")
    logits, batch = case()
    given = logits.clone().requires_grad_()
    loss_function(settings)(given, batch, settings).total.backward()
    assert given.grad is not None
    assert (given.grad[0, -1] == 0).all()
    assert (given.grad[0, :-1].abs().sum(-1) > 0).all()
    assert torch.isfinite(given.grad).all()


def test_an_equal_student_has_no_loss_and_no_kl_where_all_ids_are_matched() -> None:
    """The whole vocabulary recorded, every id matched: nothing is left for a rest."""
    torch.manual_seed(0)
    logits = torch.randn(1, 3, VOCAB, dtype=torch.float64)
    order = torch.stack([torch.randperm(VOCAB) for _ in range(3)])[None]
    batch = LossBatch(
        token_ids=torch.zeros(1, 3, dtype=torch.long),
        mask=torch.ones(1, 3, dtype=torch.bool),
        vocab_size=VOCAB,
        support_ids=order,
        support_logprobs=logits.log_softmax(-1).gather(-1, order),
        tail_logprobs=torch.full((1, 3), -torch.inf, dtype=torch.float64),
    )
    settings = ULDLoss(type="uld")
    given = logits.clone().requires_grad_()
    output = loss_function(settings)(given, batch, settings)
    output.total.backward()
    assert float(output.total.detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(output.sums["matched_kl"]) == pytest.approx(0.0, abs=1e-12)
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize(("by_rank", "by_id"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_student_learns_the_shape_by_rank_and_the_masses_by_id(by_rank: float, by_id: float) -> None:
    """Half of the teacher's ids have no counterpart. Both at once have local minima: a matched id takes another's rank."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.05], dtype=torch.float64)
    ids = torch.tensor([[[5, UNMATCHED, 1, UNMATCHED]]])
    batch = LossBatch(
        token_ids=torch.zeros(1, 1, dtype=torch.long),
        mask=torch.ones(1, 1, dtype=torch.bool),
        vocab_size=VOCAB,
        support_ids=ids,
        support_logprobs=p.log()[None, None],
        tail_logprobs=torch.tensor([[np.log(0.05)]]),
    )
    settings = ULDLoss(type="uld", sorted_weight=by_rank, matched_weight=by_id)
    torch.manual_seed(1)
    logits = (0.1 * torch.randn(1, 1, VOCAB, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        loss_function(settings)(logits, batch, settings).total.backward()
        optimizer.step()
        schedule.step()
    q = logits.detach().softmax(-1)[0, 0]
    if by_id:
        assert q[[5, 1]].tolist() == pytest.approx([0.4, 0.2], abs=0.01)
    else:
        assert q.sort(descending=True).values[:4].tolist() == pytest.approx(p.tolist(), abs=0.01)


def test_settings_that_contradict_are_refused() -> None:
    tree = {"run": {"name": "x"}, "student": {"model": {"type": "tiny"}}, "teachers": {"a": {"model": "m"}}}
    with pytest.raises(ConfigError, match=r"rollout\.sampler=student"):
        parse_config(tree | {"loss": {"type": "uld"}})
    with pytest.raises(ConfigError, match="both 0"):
        parse_config(
            tree | {"loss": {"type": "uld", "sorted_weight": 0, "matched_weight": 0}, "rollout": {"sampler": "student"}}
        )
    parse_config(tree | {"loss": {"type": "uld"}, "rollout": {"sampler": "student"}})
