"""Responses that an update of the student meets in flight, enumerated: what `rollout.update_kv` records, and the mean of the
estimators over it.

The student of this world has keys and values: the row of a prefix is a sum of what its last position computes, with the present
weights, and of what every position wrote, with the weights of then. Under `keep` what was written stays, so that tokens after
an update come from a distribution that is no version's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdray.config import (
    ForwardKLLoss,
    ForwardKLSampledLoss,
    LossSettings,
    MiniLLMLoss,
    PerDecisionLoss,
    ReverseKLLoss,
    VOPDLoss,
)
from kdray.losses import LossBatch
from tests.support.toy_world import LENGTH, PARAMETERS, VOCAB, ToyWorld

torch.set_num_threads(1)

EXACT = PerDecisionLoss(type="per_decision")
UNCAPPED = VOPDLoss(type="vopd", staleness_cap=1e9)
CHANCES = (0.1, 0.4, 0.3, 0.2)
"""Of an update before the first, second and third token of a response, and after it."""

Rows = Callable[[int], torch.Tensor]
"""Tokens drawn before an update -> rows of all prefixes."""


class KeptWorld(ToyWorld):
    """A world whose features are sums of what the positions of a prefix wrote; two updates of the student lie behind it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = np.random.default_rng([seed, 1])
        prefixes = sorted({tuple(tokens[:t]) for tokens in self.sequences for t in range(len(tokens))})
        cells = torch.tensor(rng.normal(size=(LENGTH + 1, VOCAB, VOCAB, PARAMETERS)) * 0.5)
        # By position, the prompt's first: what it adds to the rows of the prefixes that hold it, [1 + LENGTH, prefixes, ...].
        self.written = torch.zeros_like(self.features).repeat(LENGTH + 1, 1, 1, 1)
        for row, prefix in enumerate(prefixes):
            for position, token in enumerate((0, *prefix)):
                self.written[position, row] = cells[position, token]
        self.features = self.features + self.written.sum(0)
        self.older = self.theta + self.drift

    def kept(self, drawn: int) -> torch.Tensor:
        """Rows of the new weights over what the prompt and all tokens but the last drawn before the update wrote by older ones.

        The last token's keys and values are written when the next is drawn, by the new weights.
        """
        return ((self.features @ self.theta) + self.written[:drawn].sum(0) @ self.drift).log_softmax(-1)

    def recomputed(self, drawn: int) -> torch.Tensor:
        """Rows of the new weights, which do not depend on when they came."""
        return self.student(self.theta)

    def token_rows(self, after: Rows, drawn: int, alpha: float = 0.0) -> torch.Tensor:
        """Log-probability of every token if the update finds `drawn` of them, [85, 1 + LENGTH]; of the mixture at an alpha."""
        parts = []
        for rows in (self.student(self.older), after(drawn)):
            mixed = torch.logaddexp(self.teacher + math.log(alpha), rows + math.log1p(-alpha)) if alpha else rows
            parts.append(self.token_logprobs(mixed))
        is_before = torch.arange(LENGTH + 1) < 1 + drawn
        return torch.where(is_before, parts[0], parts[1])

    def records(self, drawn: int, alpha: float, after: Rows) -> LossBatch:
        """All sequences as an engine records them whose student is updated when `drawn` tokens are there."""
        return replace(
            self.batch(alpha),
            student_logprobs=self.token_rows(after, drawn),
            mixture_logprobs=self.token_rows(after, drawn, alpha),
        )

    def mean(self, loss: LossSettings, drawn: int, alpha: float, after: Rows, recorded: Rows | None = None) -> torch.Tensor:
        """Mean of a loss's gradient at the new weights over responses drawn with rows `after` the update, [PARAMETERS].

        Args: recorded: rows that the records claim instead.
        """
        chance = self.token_rows(after, drawn, alpha).sum(-1).exp()
        assert float(chance.sum()) == pytest.approx(1.0, abs=1e-12)
        return chance @ self.gradients(loss, self.records(drawn, alpha, recorded or after))


@pytest.fixture(scope="module", params=[0, 1], ids=["world0", "world1"])
def world(request: pytest.FixtureRequest) -> KeptWorld:
    return KeptWorld(request.param)


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def test_kept_rows_are_those_of_no_version(world: KeptWorld) -> None:
    """Nothing is kept of a response that has not begun; the more is kept, the further the rows are from the new version's."""
    new, old = world.student(world.theta), world.student(world.older)
    assert torch.allclose(world.kept(0), new, atol=1e-14)
    longest = world.written[LENGTH - 1].abs().sum((-1, -2)) > 0
    for drawn in (1, 2):
        distances = [float((world.kept(drawn) - rows)[longest].abs().amax(-1).mean()) for rows in (new, old)]
        assert min(distances) > 0.05


@pytest.mark.parametrize("alpha", [0.2, 0.5])
@pytest.mark.parametrize("name", ["kept", "recomputed"])
def test_importance_weights_average_to_one(world: KeptWorld, name: str, alpha: float) -> None:
    """At every prefix and over whole responses; with the version's own log m in place of the recorded one they do not."""
    after = getattr(world, name)
    for drawn in range(LENGTH + 1):
        mixture, student = world.token_rows(after, drawn, alpha), world.token_rows(after, drawn)
        trained = world.token_logprobs(world.student(world.theta))
        chance = mixture.sum(-1).exp()
        reached = {row: (world.prefix == row) & world.mask for row in world.prefix[world.mask].unique().tolist()}
        for weights in ((student - mixture).exp(), (trained - mixture).exp()):
            for places in reached.values():
                here = chance.unsqueeze(-1).expand_as(mixture)[places]
                assert float(here @ weights[places] / here.sum()) == pytest.approx(1.0, abs=1e-12)
            assert float(chance @ weights.masked_fill(~world.mask, 1.0).prod(-1)) == pytest.approx(1.0, abs=1e-12)
        claimed = (trained - world.token_rows(world.recomputed, drawn, alpha)).masked_fill(~world.mask, 0.0)
        gap = abs(float(chance @ claimed.exp().mean(-1)) - 1.0)
        assert (gap < 1e-12) == (name == "recomputed" or drawn in (0, LENGTH)), (drawn, gap)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("name", ["kept", "recomputed"])
def test_whole_responses_are_weighted_exactly(world: KeptWorld, name: str, alpha: float) -> None:
    """For an update at each token of a response, and for one whose time is drawn."""
    exact, after = world.finite_difference_gradient(), getattr(world, name)
    means = [world.mean(EXACT, drawn, alpha, after) for drawn in range(LENGTH + 1)]
    for mean in means:
        assert error(mean, exact) < 1e-8
    assert error(sum(chance * mean for chance, mean in zip(CHANCES, means, strict=True)), exact) < 1e-8


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_a_versions_own_log_q_in_place_of_what_was_sampled_is_biased(world: KeptWorld, alpha: float) -> None:
    """What a trainer would compute that knew no more of a token than its version: the reason for the records."""
    exact = world.finite_difference_gradient()
    for drawn in (1, 2):
        assert error(world.mean(EXACT, drawn, alpha, world.kept, recorded=world.recomputed), exact) > 0.005


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(
    ("sampled", "whole"),
    [
        (UNCAPPED, ReverseKLLoss(type="reverse_kl")),
        (PerDecisionLoss(type="per_decision", horizon=0), ReverseKLLoss(type="reverse_kl")),
        (ForwardKLSampledLoss(type="forward_kl_sampled"), ForwardKLLoss(type="forward_kl")),
    ],
    ids=["vopd", "per_decision 0", "forward_kl_sampled"],
)
def test_single_tokens_are_weighted_exactly(world: KeptWorld, sampled: LossSettings, whole: LossSettings, alpha: float) -> None:
    """Estimates from the sampled token have the mean of the divergence of the whole row, at the prefixes that were sampled."""
    for drawn in range(LENGTH + 1):
        assert error(world.mean(sampled, drawn, alpha, world.kept), world.mean(whole, drawn, alpha, world.kept)) < 1e-8


@pytest.mark.parametrize(
    "loss", [MiniLLMLoss(length_norm=False, staleness_cap=1e9), VOPDLoss(type="vopd", gamma=1.0, staleness_cap=1e9)]
)
def test_losses_that_weigh_single_tokens_are_biased_as_on_any_stale_response(world: KeptWorld, loss: LossSettings) -> None:
    """Over whole responses: exact only where the response began under the trained version. The cap of a ratio adds to it."""
    exact = world.finite_difference_gradient()
    assert error(world.mean(loss, 0, 0.0, world.kept), exact) < 1e-8
    for after in (world.kept, world.recomputed):
        for drawn in (1, 2, 3):
            assert error(world.mean(loss, drawn, 0.0, after), exact) > 0.005
