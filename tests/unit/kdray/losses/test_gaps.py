"""Rows whose targets have gaps, as tool turns leave them: every loss as if the context between them were not in the row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdray.config import (
    AdaptiveKLLoss,
    ForwardKLLoss,
    ForwardKLSampledLoss,
    HintonLoss,
    JSDLoss,
    LMOpsLoss,
    LossSettings,
    MiniLLMLoss,
    PerDecisionLoss,
    ReverseKLLoss,
    SequenceLoss,
    ULDLoss,
    VOPDLoss,
)
from kdray.config.losses import LOSSES
from kdray.config.registry import name_of as kind_name
from kdray.losses import LossBatch, Whitening, loss_function, return_sums
from kdray.losses.policy_gradient import by_response, of_tokens, returns_after, returns_from, tokens_after
from kdray.losses.rollout_gap import rollout_gap
from kdray.rollouts.batching import rollouts_to_batch
from kdray.types import WRITERS, Rollout

torch.set_num_threads(1)

VOCAB, WIDTH = 6, 4

LOSSES_WITH_TIME = [
    MiniLLMLoss(length_norm=False),
    MiniLLMLoss(gamma=0.8),
    MiniLLMLoss(gamma=0.8, single_step=False, staleness="mask", staleness_cap=1.2),
    MiniLLMLoss(whitening=True, gamma=0.9),
    LMOpsLoss(type="lmops"),
    LMOpsLoss(type="lmops", whitening=False, length_norm=False, clip=None),
    PerDecisionLoss(type="per_decision"),
    PerDecisionLoss(type="per_decision", horizon=0),
    PerDecisionLoss(type="per_decision", horizon=1),
    PerDecisionLoss(type="per_decision", horizon=3),
    VOPDLoss(type="vopd"),
    VOPDLoss(type="vopd", gamma=0.7),
]
OTHERS = [
    ReverseKLLoss(type="reverse_kl"),
    ForwardKLLoss(type="forward_kl"),
    JSDLoss(type="jsd"),
    AdaptiveKLLoss(type="adaptive_kl"),
    HintonLoss(type="hinton", soft_share=0.4),
    ForwardKLSampledLoss(type="forward_kl_sampled"),
    SequenceLoss(type="sequence"),
    ULDLoss(type="uld"),
]


def name_of(loss: LossSettings) -> str:
    changed = loss.model_dump(exclude_defaults=True, exclude={"type"})
    return " ".join([loss.type, *(f"{key}={value}" for key, value in changed.items())])


def rollout(seed: int, writers: str) -> Rollout:
    """A response whose t-th token is by the writer with this initial; every column, and nan where the environment wrote."""
    rng = np.random.default_rng(seed)
    codes = np.array([next(code for code, name in enumerate(WRITERS) if name[0] == each) for each in writers], np.int8)
    count = len(writers)
    rows = rng.normal(size=(2, count, VOCAB))
    teacher, student = (rows - np.log(np.exp(rows).sum(-1, keepdims=True))).astype(np.float32)
    tokens = rng.integers(0, VOCAB, count).astype(np.int32)
    at = np.arange(count)
    order = np.argsort(-teacher, axis=-1)
    ids = order[:, :WIDTH].astype(np.int32)
    columns: dict[str, Any] = {
        "mixture_logprobs": np.log(0.2 * np.exp(teacher[at, tokens]) + 0.8 * np.exp(student[at, tokens])),
        "student_logprobs": student[at, tokens] + rng.normal(size=count).astype(np.float32) * 0.1,
        "teacher_logprobs": teacher[at, tokens],
        "support_logprobs": np.take_along_axis(teacher, ids, -1),
        "tail_logprobs": np.log(np.exp(np.take_along_axis(teacher, order[:, WIDTH:], -1)).sum(-1)),
    }
    context = codes == WRITERS.index("environment")
    for values in columns.values():
        values[context] = np.nan
    prompt_ids = np.arange(1 + seed % 3, dtype=np.int32)
    versions = np.where(context, -9, seed % 2).astype(np.int32)
    return Rollout(
        seed, seed, prompt_ids, tokens, student_versions=versions, alpha=0.2, finish_reason="stop", teacher="t",
        support_ids=ids, writer=codes, **columns,
    )  # fmt: skip


def squeezed(one: Rollout) -> Rollout:
    """The same without the environment's tokens."""
    keep, columns = one.is_target, {}
    for name in Rollout.__dataclass_fields__:
        value = getattr(one, name)
        if isinstance(value, np.ndarray) and name != "prompt_ids":
            columns[name] = value[keep]
    return replace(one, **columns)


def measured(loss: LossSettings, rollouts: list[Rollout], logits: list[torch.Tensor]) -> tuple[Any, ...]:
    """Loss, its sums and each row's gradient at targets. Args: logits: [T, VOCAB] of every rollout's tokens."""
    weights = {one.sample_id: 0.5 + one.sample_id for one in rollouts} if loss.type == "sequence" else None
    batch = rollouts_to_batch(rollouts, step=3, weights=weights)
    tensors = LossBatch.from_train_batch(batch, VOCAB)
    assert tensors.groups == batch.groups
    placed = torch.full((*batch.token_ids.shape, VOCAB), torch.nan, dtype=torch.float64)
    for row, (one, given_logits) in enumerate(zip(rollouts, logits, strict=True)):
        placed[row, len(one.prompt_ids) : len(one.prompt_ids) + len(one.token_ids)] = given_logits
    placed.requires_grad_()
    sums = return_sums(batch, loss)
    output = loss_function(loss, None if sums is None else Whitening.from_sums(sums))(placed, tensors, loss)
    (gradient,) = torch.autograd.grad(output.total, placed)
    assert (gradient[~tensors.mask] == 0).all(), "context gets no gradient"
    named = {name: float(value) for name, value in output.sums.items()}
    return float(output.total.detach()), named, gradient[tensors.mask], batch.num_target_tokens, batch.groups


@pytest.mark.parametrize("loss", [*LOSSES_WITH_TIME, *OTHERS], ids=name_of)
def test_a_row_with_gaps_is_the_row_without_them(loss: LossSettings) -> None:
    """Gaps at the begin, inside, side by side and at the end, a row of context alone, and one without any."""
    shapes = ["mmm", "meem", "emmeeeme", "mee", "eee", "memememem", "m"]
    whole = [rollout(seed, writers) for seed, writers in enumerate(shapes)]
    logits = [
        torch.tensor(np.random.default_rng(seed).normal(size=(len(writers), VOCAB))) for seed, writers in enumerate(shapes)
    ]
    bare = [squeezed(one) for one in whole]
    kept = [rows[torch.from_numpy(one.is_target)] for rows, one in zip(logits, whole, strict=True)]
    assert any(one.has_context for one in whole)
    assert not any(one.has_context for one in bare)
    total, sums, gradient, targets, groups = measured(loss, whole, logits)
    wanted_total, wanted_sums, wanted_gradient, wanted_targets, wanted_groups = measured(loss, bare, kept)
    assert targets == wanted_targets == sum(shape.count("m") for shape in shapes)
    assert groups == wanted_groups == ("teacher/t/staleness_1", "teacher/t/staleness_2")
    assert total == wanted_total
    assert sums == wanted_sums
    torch.testing.assert_close(gradient, wanted_gradient, rtol=0, atol=0)
    assert gradient.abs().max() > 0


def test_every_loss_is_among_them() -> None:
    alike = {"skew_forward_kl", "skew_reverse_kl", "tvd", "mse_logit"}  # as the other divergences
    kinds = {kind_name(kind) for kind in LOSSES.known() if kind.__module__ == "kdray.config.losses"}
    assert {loss.type for loss in (*LOSSES_WITH_TIME, *OTHERS)} | alike == kinds


masks = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4)


@given(masks, st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.integers(0, 5))
def test_returns_count_the_targets_after_a_token_in_their_order(rows: list[list[bool]], gamma: float, seed: int) -> None:
    """Against sums written out: discounted by how many targets lie between, not by how many positions."""
    mask = torch.tensor(rows)
    rewards = torch.tensor(np.random.default_rng(seed).normal(size=int(mask.sum())))
    after, following, left = [], [], []
    numbers = iter(rewards.tolist())
    for row in rows:
        own = [next(numbers) for there in row if there]
        for t in range(len(own)):
            later = [gamma**ahead * reward for ahead, reward in enumerate(own[t + 1 :])]
            after.append(sum(later))
            following.append(own[t] + gamma * sum(later))
            left.append(len(later))
    assert tokens_after(mask).tolist() == left
    assert returns_after(rewards, mask, gamma, length_norm=False).tolist() == pytest.approx(after, abs=1e-12)
    assert returns_from(rewards, mask, gamma, length_norm=False).tolist() == pytest.approx(following, abs=1e-12)
    means = [value / max(1, count) for value, count in zip(after, left, strict=True)]
    assert returns_after(rewards, mask, gamma, length_norm=True).tolist() == pytest.approx(means, abs=1e-12)
    means = [value / (count + 1) for value, count in zip(following, left, strict=True)]
    assert returns_from(rewards, mask, gamma, length_norm=True).tolist() == pytest.approx(means, abs=1e-12)
    assert of_tokens(by_response(rewards, mask), mask).tolist() == rewards.tolist()


def test_per_decision_with_a_gap_by_hand() -> None:
    """The example of `test_per_decision_by_hand` with context between: the ratio and the reward there are nobody's."""
    log_q = -2 * np.log(2.0)
    rewards, mixing, stale = [1.0, -2.0, 3.0], [0.5, 1.5, 1.0], [1.0, 2.0, 2.0]
    mask = torch.tensor([[False, True, False, True, False, False, True]])
    logits = torch.zeros(1, 7, 4, dtype=torch.float64, requires_grad=True)

    def column(values: list[float]) -> torch.Tensor:
        filled = torch.full((1, 7), torch.nan, dtype=torch.float64)
        filled[mask] = torch.tensor(values, dtype=torch.float64)
        return filled

    old = [log_q - np.log(ratio) for ratio in stale]
    batch = LossBatch(
        token_ids=torch.zeros(1, 7, dtype=torch.long),
        mask=mask,
        vocab_size=4,
        student_logprobs=column(old),
        mixture_logprobs=column([log - np.log(ratio) for log, ratio in zip(old, mixing, strict=True)]),
        teacher_logprobs=column([log_q + reward for reward in rewards]),
        support_ids=torch.arange(4).repeat(1, 7, 1),
        support_logprobs=torch.full((1, 7, 4), log_q, dtype=torch.float64),
        tail_logprobs=torch.full((1, 7), -torch.inf, dtype=torch.float64),
    )
    for horizon, wanted in ((None, [-6.0, -9.0, 0.0]), (1, [3.0, -9.0, 0.0])):
        loss = PerDecisionLoss(type="per_decision", horizon=horizon)
        (gradient,) = torch.autograd.grad(loss_function(loss)(logits, batch, loss).total, logits)
        assert (gradient[mask][:, 0] / 0.75).tolist() == pytest.approx(wanted)


def _of_groups() -> LossBatch:
    """Four tokens, one of which no loss reads; two groups are of the trained version, as of two teachers."""
    return LossBatch(
        token_ids=torch.zeros(1, 5, dtype=torch.long),
        mask=torch.tensor([[True, True, False, True, True]]),
        vocab_size=3,
        student_logprobs=torch.tensor([[-1.0, -2.0, -9.0, -3.0, -4.0]]),
        group=torch.tensor([[0, 1, 0, 2, 0]]),
        groups=("a/staleness_0", "b/staleness_0", "a/staleness_1", "c/staleness_0"),
    )


def test_shares_of_groups_by_hand() -> None:
    found = _of_groups().shares("clipped", torch.tensor([True, False, True, False]))
    assert {name: int(value) for name, value in found.items()} == {
        "clipped": 2,
        "a/staleness_0/clipped": 1,
        "a/staleness_0/tokens": 2,
        "b/staleness_0/clipped": 0,
        "b/staleness_0/tokens": 1,
        "a/staleness_1/clipped": 1,
        "a/staleness_1/tokens": 1,
        "c/staleness_0/clipped": 0,
        "c/staleness_0/tokens": 0,
    }


def test_the_gap_of_rollouts_is_over_all_fresh_groups() -> None:
    """Of several teachers, whose groups are compared one after the other."""
    found = rollout_gap(torch.tensor([-1.5, -2.25, -7.0, -4.125]), _of_groups())
    assert {name: float(value) for name, value in found.items()} == {"rollout_gap": 0.875, "rollout_gap_tokens": 3.0}
