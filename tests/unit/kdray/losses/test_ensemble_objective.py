"""Losses over whole responses against an ensemble: the objective is sum_i w_i KL(q || p_i), in an enumerated world."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdray.config import (
    ForwardKLLoss,
    ForwardKLSampledLoss,
    HintonLoss,
    LMOpsLoss,
    MiniLLMLoss,
    MSELogitLoss,
    PerDecisionLoss,
    ReverseKLLoss,
    SkewReverseKLLoss,
    VOPDLoss,
)
from kdray.config.losses import LossSettings
from kdray.losses import LossBatch, divergence_of, loss_function
from kdray.losses.policy_gradient import recorded_returns
from kdray.losses.support import full_rows
from kdray.teachers.ensemble import TeacherColumns, at_union, combine, knows, union_ids
from tests.support.toy_world import VOCAB, ToyWorld

torch.set_num_threads(1)

WEIGHTS = np.array([0.5, 0.3, 0.2])
PER_DECISION = PerDecisionLoss(type="per_decision")
LMOPS_PLAIN = LMOpsLoss(
    type="lmops", whitening=False, clip=None, reward_scaling=1.0, single_step=False, length_norm=False, gamma=1.0
)
EXACT_ON_FRESH_SAMPLES = [
    PER_DECISION,
    MiniLLMLoss(length_norm=False),
    MiniLLMLoss(length_norm=False, single_step=False),
    LMOPS_PLAIN,
    VOPDLoss(type="vopd", gamma=1.0),
]


class EnsembleWorld(ToyWorld):
    """Three teachers with free rows, on supports of `width` ids each; `teacher` is the first."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        random = torch.Generator().manual_seed(seed + 100)
        others = [1.5 * torch.randn(self.teacher.shape, generator=random, dtype=torch.float64) for _ in range(2)]
        self.teachers = [self.teacher, *(rows.log_softmax(-1) for rows in others)]

    def objective(self, theta: torch.Tensor) -> torch.Tensor:
        """sum_i w_i KL(student || teacher i) over whole sequences, nats."""
        student = self.token_logprobs(self.student(theta)).sum(-1)
        means = sum(w * self.token_logprobs(rows).sum(-1) for w, rows in zip(WEIGHTS, self.teachers, strict=True))
        return (student.exp() * (student - means)).sum()

    def objective_gradient(self) -> torch.Tensor:
        theta = self.theta.clone().requires_grad_()
        return torch.autograd.grad(self.objective(theta), theta)[0]

    def ensemble_batch(self, alpha: float, width: int = VOCAB, sampler: torch.Tensor | None = None) -> LossBatch:
        """All sequences, with the target that `combine` makes of the teachers; the first teacher samples."""
        places = self.prefix[self.mask]
        tokens = self.tokens[self.mask].numpy()
        answers = [self._columns(rows[places].numpy(), tokens, width) for rows in self.teachers]
        union = union_ids([answer.support_ids for answer in answers])
        columns = [
            at_union(answer if knows(answer, union) else self._columns(rows[places].numpy(), tokens, width, union), union)
            for rows, answer in zip(self.teachers, answers, strict=True)
        ]
        target = combine(columns, WEIGHTS, "geometric")

        def spread(values: np.ndarray, fill: float) -> torch.Tensor:
            # In float64, so that only the records are rounded.
            given = torch.from_numpy(values)
            given = given.double() if given.is_floating_point() else given.long()
            out = torch.full((*self.mask.shape, *given.shape[1:]), fill, dtype=given.dtype)
            out[self.mask] = given
            return out

        return replace(
            self.batch(alpha, sampler),
            teacher_logprobs=spread(target.teacher_logprobs, 0.0),
            support_ids=spread(target.support_ids, -1),
            support_logprobs=spread(target.support_logprobs, -torch.inf),
            tail_logprobs=spread(target.tail_logprobs, 0.0),
            log_z=spread(target.log_z, 0.0),
        )

    @staticmethod
    def _columns(rows: np.ndarray, tokens: np.ndarray, width: int, union: np.ndarray | None = None) -> TeacherColumns:
        ids = np.argsort(-rows, axis=1)[:, :width].astype(np.int32) if union is None else union
        logprobs = np.where(ids >= 0, np.take_along_axis(rows, ids.clip(min=0).astype(np.int64), axis=1), -np.inf)
        outside = np.ones_like(rows)
        for row, named in enumerate(ids):
            outside[row, named[named >= 0]] = 0.0
        with np.errstate(divide="ignore"):
            tail = np.log((np.exp(rows) * outside).sum(1))
        return TeacherColumns(rows[np.arange(len(rows)), tokens], ids, logprobs, tail)

    def expected(
        self, loss: LossSettings, alpha: float, sampler: torch.Tensor | None = None, width: int = VOCAB
    ) -> torch.Tensor:
        chance = self.probabilities(self.mixture(self.theta if sampler is None else sampler, alpha))
        return chance @ self.gradients(loss, self.ensemble_batch(alpha, width, sampler))


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["world0", "world1", "world2"])
def world(request: pytest.FixtureRequest) -> EnsembleWorld:
    return EnsembleWorld(request.param)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# Records are float32: 1e-5 of the gradient is their rounding.
@pytest.mark.parametrize("loss", EXACT_ON_FRESH_SAMPLES, ids=lambda loss: loss.type)
def test_the_expected_gradient_is_that_of_the_weighted_sum_over_teachers(world: EnsembleWorld, loss: LossSettings) -> None:
    assert error(world.expected(loss, alpha=0.0), world.objective_gradient()) < 1e-5


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_per_decision_is_unbiased_for_an_ensemble_under_mixing_and_staleness(world: EnsembleWorld, alpha: float) -> None:
    assert error(world.expected(PER_DECISION, alpha, world.theta + world.drift), world.objective_gradient()) < 1e-5


@pytest.mark.parametrize("loss", [LMOPS_PLAIN, VOPDLoss(type="vopd", gamma=1.0)], ids=lambda loss: loss.type)
def test_the_reward_is_exact_on_a_partial_support(world: EnsembleWorld, loss: LossSettings) -> None:
    """Z of the coarse distributions is not Z of the rows; log g + log Z is the mean of the teachers' log p all the same."""
    assert error(world.expected(loss, alpha=0.0, width=2), world.objective_gradient()) < 1e-5


def test_without_log_z_the_objective_would_be_the_kl_to_the_product(world: EnsembleWorld) -> None:
    """The distance of the two objectives' gradients in these worlds, as docs/teachers.md has it: far beyond rounding."""
    batch = replace(world.ensemble_batch(0.0), log_z=None)
    stripped = world.probabilities(world.student(world.theta)) @ world.gradients(PER_DECISION, batch)
    assert 0.09 <= round(error(stripped, world.objective_gradient()), 2) <= 0.22


def test_whitened_returns_have_log_z_too(world: EnsembleWorld) -> None:
    batch = world.ensemble_batch(0.2)
    loss = MiniLLMLoss(whitening=True, length_norm=False)
    assert batch.log_z is not None
    rewards = (batch.teacher_logprobs + batch.log_z - batch.student_logprobs).masked_fill(~batch.mask, 0.0)  # type: ignore[operator]
    later = rewards.flip(-1).cumsum(-1).flip(-1) - rewards
    torch.testing.assert_close(recorded_returns(batch, loss, torch.float64), later[batch.mask])


def test_a_divergence_does_not_read_log_z(world: EnsembleWorld) -> None:
    """With prefixes taken as given log Z is no function of the student."""
    loss = ReverseKLLoss(type="reverse_kl")
    batch = world.ensemble_batch(0.0)
    logits = (world.features @ world.theta)[world.prefix]
    with_z, without = (loss_function(loss)(logits, each, loss).total for each in (batch, replace(batch, log_z=None)))
    assert with_z == without


def test_vopds_baseline_has_log_z(world: EnsembleWorld) -> None:
    """At gamma 0 the advantage of a token is log g / q + KL(q || g), whose mean is 0: no constant is left to add variance."""
    loss = VOPDLoss(type="vopd")
    batch = world.ensemble_batch(0.0)
    torch.testing.assert_close(world.gradients(loss, batch), world.gradients(loss, replace(batch, log_z=None)))


def _gradients_in_logits(
    loss: LossSettings, seed: int, vocab: int, spread: float = 1.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients in one row's logits: of the weighted sum over two teachers, and of the loss to each mean of them.

    Args: spread: standard deviation of all logits.
    """
    random = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(vocab, generator=random, dtype=torch.float64)).requires_grad_()
    rows = (spread * torch.randn(2, vocab, generator=random, dtype=torch.float64)).log_softmax(-1)
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)

    def gradient(teacher: torch.Tensor) -> torch.Tensor:
        if loss.divergence:
            # Of the token that `hinton` compares with as well.
            full = full_rows(teacher[None], logits.log_softmax(-1)[None], torch.tensor([1]))
            return torch.autograd.grad(divergence_of(loss)(full).sum(), logits)[0]
        batch = LossBatch(
            token_ids=torch.tensor([[0, 1]]),
            mask=torch.tensor([[False, True]]),
            vocab_size=vocab,
            mixture_logprobs=torch.tensor([[0.0, -1.5]], dtype=torch.float64),
            student_logprobs=torch.zeros(1, 2, dtype=torch.float64),
            teacher_logprobs=torch.stack([torch.zeros((), dtype=torch.float64), teacher[1]])[None],
        )
        return torch.autograd.grad(loss_function(loss)(logits.expand(1, 2, vocab), batch, loss).total, logits)[0]

    exact = torch.stack([weight * gradient(row) for weight, row in zip(weights, rows, strict=True)]).sum(0)
    means = {
        "arithmetic": gradient((rows + weights.log()[:, None]).logsumexp(0)),
        "geometric": gradient((rows * weights[:, None]).sum(0).log_softmax(-1)),
    }
    return exact, means


LINEAR = [
    ReverseKLLoss(type="reverse_kl"),
    MSELogitLoss(type="mse_logit"),
    ForwardKLLoss(type="forward_kl"),
    HintonLoss(type="hinton", temperature=1.0),
    ForwardKLSampledLoss(type="forward_kl_sampled"),
]


@pytest.mark.parametrize("loss", LINEAR, ids=lambda loss: loss.type)
def test_the_mean_of_a_linear_loss_has_the_gradient_of_the_sum(loss: LossSettings) -> None:
    exact, means = _gradients_in_logits(loss, 0, 7)
    torch.testing.assert_close(means[loss.ensemble_mean], exact)


def _medians(loss: LossSettings, spread: float = 1.0) -> dict[str, float]:
    """Error of the gradient to each mean, relative to that of the sum over teachers: medians of 100 rows of 20 ids."""
    found = [_gradients_in_logits(loss, seed, 20, spread) for seed in range(100)]
    return {
        name: float(np.median([error(means[name], exact) for exact, means in found])) for name in ("arithmetic", "geometric")
    }


@pytest.mark.parametrize(
    ("spread", "arithmetic", "geometric"),
    [(1.0, 0.12, 0.10), (4.0, 0.26, 0.56)],
    ids=["flat rows", "peaked rows"],
)
def test_skew_reverse_kl_is_linear_in_neither(spread: float, arithmetic: float, geometric: float) -> None:
    """The figures of docs/teachers.md: on peaked rows the mean that it takes is the closer one."""
    found = _medians(SkewReverseKLLoss(type="skew_reverse_kl", skew=0.1), spread)
    assert found == pytest.approx({"arithmetic": arithmetic, "geometric": geometric}, abs=0.005)


def test_hinton_at_another_temperature_is_linear_in_neither() -> None:
    assert min(_medians(HintonLoss(type="hinton", temperature=2.0)).values()) > 0.005


def test_skew_reverse_kl_takes_the_closer_mean() -> None:
    loss = SkewReverseKLLoss(type="skew_reverse_kl", skew=0.5)
    found = _medians(loss)
    assert min(found.values()) > 0.01, "not the gradient of the sum"
    assert found[loss.ensemble_mean] == min(found.values())
