"""The reward beside distillation: its expected gradient in an enumerated world, and the advantages that it is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdray.config import LossSettings, MiniLLMLoss, PerDecisionLoss, ReverseKLLoss, VOPDLoss, parse_config
from kdray.config.graders import ExactGrader
from kdray.data.graders import Exact, Grader, Grading
from kdray.errors import ConfigError, ResponseError, TrainingError
from kdray.losses import LossBatch, Objective, loss_function
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.rewards import Rewarding
from kdray.types import Prompt, Rollout, Writer, written_by
from tests.support.toy_world import ToyWorld

torch.set_num_threads(1)

WEIGHT = 0.7
LOSSES: list[LossSettings] = [
    MiniLLMLoss(),
    MiniLLMLoss(length_norm=False, gamma=0.5, single_step=False),
    VOPDLoss(type="vopd"),
    ReverseKLLoss(type="reverse_kl"),
    PerDecisionLoss(type="per_decision"),
]


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld(3)


def value_of_each(world: ToyWorld) -> torch.Tensor:
    """A reward of each response that no sum over its tokens gives, [85]."""
    return torch.tensor([float((sum(tokens) * len(tokens)) % 3 == 1) for tokens in world.sequences], dtype=torch.float64)


def exact_gradient(world: ToyWorld) -> torch.Tensor:
    """d E_q[reward] / d theta, by enumeration."""
    theta = world.theta.clone().requires_grad_()
    expected = world.probabilities(world.student(theta)) @ value_of_each(world)
    return torch.autograd.grad(expected, theta)[0]


def term_of_each(
    world: ToyWorld, loss: LossSettings, alpha: float, advantages: torch.Tensor, sampler: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient of each response's reward term alone, [85, PARAMETERS]: with the reward, minus without it."""
    batch = world.batch(alpha, sampler)
    batch = replace(batch, more={"advantages": advantages.unsqueeze(-1).expand(batch.mask.shape).clone()})
    rewarded = loss.model_copy(update={"reward_weight": WEIGHT})
    return world.gradients(rewarded, batch) - world.gradients(loss, batch)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.type)
def test_on_the_students_own_samples_the_expected_gradient_is_that_of_the_expected_reward(
    world: ToyWorld, loss: LossSettings
) -> None:
    chance, values = world.probabilities(world.student(world.theta)), value_of_each(world)
    wanted = -WEIGHT * exact_gradient(world)
    torch.testing.assert_close(chance @ term_of_each(world, loss, 0.0, values), wanted, rtol=1e-9, atol=1e-12)
    # Two independent responses, each the other's baseline: all pairs.
    each = term_of_each(world, loss, 0.0, torch.ones_like(values))
    pairs = torch.outer(chance, chance)
    advantages = values[:, None] - values[None, :]
    torch.testing.assert_close(torch.einsum("ij,ij,id->d", pairs, advantages, each), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.2, 0.5])
@pytest.mark.parametrize("stale", [False, True])
def test_whole_response_weights_make_it_unbiased_under_mixing_and_token_weights_do_not(
    world: ToyWorld, alpha: float, stale: bool
) -> None:
    sampler = world.theta + world.drift if stale else world.theta
    chance, values = world.probabilities(world.mixture(sampler, alpha)), value_of_each(world)
    wanted = -WEIGHT * exact_gradient(world)

    def mean(loss: LossSettings) -> torch.Tensor:
        return chance @ term_of_each(world, loss, alpha, values, sampler)

    exact = PerDecisionLoss(type="per_decision")
    torch.testing.assert_close(mean(exact), wanted, rtol=1e-9, atol=1e-12)
    # A window over the whole of the longest response is exact too; a shorter one is not.
    torch.testing.assert_close(mean(PerDecisionLoss(type="per_decision", horizon=2)), wanted, rtol=1e-9, atol=1e-12)
    for biased in (MiniLLMLoss(), PerDecisionLoss(type="per_decision", horizon=0)):
        assert float((mean(biased) - wanted).norm() / wanted.norm()) > 0.02


def test_each_token_is_weighted_by_its_own_ratio_bounded_as_the_loss_bounds_it(world: ToyWorld) -> None:
    """By hand: u_t A (onehot - q) at each prefix."""
    sampler, alpha, cap = world.theta + world.drift, 0.3, 1.1
    values = value_of_each(world) - 0.4
    batch = world.batch(alpha, sampler)
    assert batch.student_logprobs is not None
    assert batch.mixture_logprobs is not None
    current = world.token_logprobs(world.student(world.theta))
    ratio = (current - batch.student_logprobs).exp()
    for handling, bounded in (("truncate", ratio.clamp(max=cap)), ("mask", ratio.masked_fill(ratio > cap, 0.0))):
        loss = MiniLLMLoss.model_validate({"staleness": handling, "staleness_cap": cap})
        weights = (batch.student_logprobs - batch.mixture_logprobs).exp() * bounded * values.unsqueeze(-1)
        rows = world.student(world.theta).exp()[world.prefix]
        by_logit = torch.nn.functional.one_hot(world.tokens, rows.shape[-1]) - rows
        by_hand = -WEIGHT * torch.einsum(
            "bs,bsv,bsvd->bd", weights.masked_fill(~world.mask, 0.0), by_logit, world.features[world.prefix]
        )
        torch.testing.assert_close(term_of_each(world, loss, alpha, values, sampler), by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("horizon", [0, 1])
def test_a_window_multiplies_the_ratios_of_the_tokens_around(world: ToyWorld, horizon: int) -> None:
    """By hand: the product of q / m_old over `horizon` tokens to either side, as far as the response goes."""
    alpha, values = 0.3, value_of_each(world) - 0.4
    batch = world.batch(alpha, world.theta + world.drift)
    assert batch.mixture_logprobs is not None
    current = world.token_logprobs(world.student(world.theta))
    ratios = (current - batch.mixture_logprobs).exp().where(world.mask, 1.0)
    length = ratios.shape[1]
    windows = [ratios[:, max(0, at - horizon) : at + horizon + 1].prod(-1) for at in range(length)]
    weights = torch.stack(windows, dim=1) * values.unsqueeze(-1)
    rows = world.student(world.theta).exp()[world.prefix]
    by_logit = torch.nn.functional.one_hot(world.tokens, rows.shape[-1]) - rows
    by_hand = -WEIGHT * torch.einsum(
        "bs,bsv,bsvd->bd", weights.masked_fill(~world.mask, 0.0), by_logit, world.features[world.prefix]
    )
    loss = PerDecisionLoss(type="per_decision", horizon=horizon)
    found = term_of_each(world, loss, alpha, values, world.theta + world.drift)
    torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=1e-12)


def test_float32_logits_have_a_float32_loss(world: ToyWorld) -> None:
    """Products of ratios are float64 in between."""
    batch = world.batch(0.2)
    batch = replace(batch, more={"advantages": value_of_each(world).unsqueeze(-1).expand(batch.mask.shape).clone()})
    logits = (world.features @ world.theta)[world.prefix].float()
    loss = PerDecisionLoss(type="per_decision", reward_weight=WEIGHT)
    assert loss_function(loss)(logits, batch, loss).total.dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.type)
def test_the_objective_that_ranks_use_has_the_same_term(world: ToyWorld, loss: LossSettings) -> None:
    batch = world.batch(0.2)
    advantages = value_of_each(world).unsqueeze(-1).expand(batch.mask.shape).clone()
    batch = replace(batch, more={"advantages": advantages})
    rewarded = loss.model_copy(update={"reward_weight": WEIGHT})
    found = []
    for function in (loss_function(rewarded), lambda logits, batch, settings: Objective.of(settings).of_logits(logits, batch)):
        logits = (world.features @ world.theta)[world.prefix].requires_grad_()
        output = function(logits, batch, rewarded)
        found.append((output.total.detach(), *torch.autograd.grad(output.total, logits), output.sums["reward_gradient"]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_distillation_term_has_a_weight_of_its_own(world: ToyWorld, weight: float) -> None:
    batch = world.batch(0.2)
    batch = replace(batch, more={"advantages": value_of_each(world).unsqueeze(-1).expand(batch.mask.shape).clone()})
    plain = MiniLLMLoss()
    alone = world.gradients(plain.model_copy(update={"reward_weight": WEIGHT, "distillation_weight": 0.0}), batch)
    both = world.gradients(plain.model_copy(update={"reward_weight": WEIGHT, "distillation_weight": weight}), batch)
    torch.testing.assert_close(both, alone + weight * world.gradients(plain, batch), rtol=1e-9, atol=1e-12)


def test_a_batch_without_advantages_is_refused(world: ToyWorld) -> None:
    logits = (world.features @ world.theta)[world.prefix]
    with pytest.raises(TrainingError, match="no column advantages"):
        Objective.of(MiniLLMLoss(reward_weight=0.1)).of_logits(logits, world.batch(0.2))


# ------------------------------------------------------------------------------------------------------- advantages

PROMPTS = {
    number: Prompt(number, np.array([7], np.int32), answer=answer) for number, answer in ((0, "ab"), (1, None), (2, "b"))
}


def rollout(sample_id: int, text: str, prompt_id: int = 0, by: Writer = "mixture") -> Rollout:
    ids = np.array([ord(letter) for letter in text], dtype=np.int32)
    zeros = np.zeros(len(ids), np.float32)
    own = None if by == "data" else zeros
    prompt, versions = np.array([7], np.int32), np.zeros(len(ids), np.int32)
    return Rollout(sample_id, prompt_id, prompt, ids, own, own, versions, 0.2, "stop", writer=written_by(by, len(ids)))


def rewarding(grader: Any = None) -> Rewarding:
    grade = Grading("data.grader", grader or Exact(ExactGrader()))
    return Rewarding(lambda ids: "".join(chr(token) for token in ids), grade, PROMPTS)


def test_advantages_are_over_the_other_responses_to_the_same_prompt() -> None:
    rollouts = [rollout(0, "ab"), rollout(1, "x"), rollout(2, "y"), rollout(3, "ab", 1), rollout(4, "b", 2), rollout(5, "b", 2)]
    rewards = rewarding()(rollouts)
    assert rewards.values == {0: 1.0, 1: 0.0, 2: 0.0, 4: 1.0, 5: 1.0}
    # 3 has no reference answer, and so no reward; 4 and 5 are alike.
    assert rewards.advantages == {0: 1.0, 1: -0.5, 2: -0.5, 3: 0.0, 4: 0.0, 5: 0.0}
    assert rewards.metrics() == {"reward": 0.6, "reward_contrast": 0.5}
    batch = rollouts_to_batch(rollouts, 1, advantages=rewards.advantages)
    column = batch.columns["advantages"]
    assert column[0].tolist() == [0.0, 1.0, 1.0]
    assert column[1, 1] == -0.5
    assert (column[~batch.loss_mask] == 0).all()
    assert LossBatch.from_train_batch(batch, 128).masked("advantages").tolist() == [1, 1, -0.5, -0.5, 0, 0, 0, 0]


def test_the_datas_answers_and_a_response_alone_have_no_advantage() -> None:
    rewards = rewarding()([rollout(0, "ab"), rollout(1, "ab", by="data")])
    assert (rewards.values, rewards.advantages) == ({0: 1.0}, {0: 0.0, 1: 0.0})
    assert rewarding()([rollout(3, "ab", 1)]).metrics() == {}


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_advantages_of_a_prompt_add_up_to_zero(values: list[float]) -> None:
    rewards = rewarding(_Graded(values))([rollout(number, "x") for number in range(len(values))])
    assert sum(rewards.advantages.values()) == pytest.approx(0.0, abs=1e-9)


class _Graded(Grader):
    """Grader with a value of its own for each response in turn."""

    def __init__(self, values: list[float]) -> None:
        self._values = iter(values)

    def grade(self, prompt: Prompt, response: str) -> bool:
        return False

    def value(self, prompt: Prompt, response: str) -> float:
        return next(self._values)


class _Plain(Grader):
    """Grader that knows right and wrong alone."""

    def grade(self, prompt: Prompt, response: str) -> bool:
        return response == prompt.answer


def test_a_graders_own_value_counts_and_has_to_be_finite() -> None:
    assert rewarding(_Graded([0.25, 0.5]))([rollout(0, "x"), rollout(1, "x")]).advantages == {0: -0.25, 1: 0.25}
    assert rewarding(_Plain())([rollout(0, "ab"), rollout(1, "x")]).values == {0: 1.0, 1: 0.0}
    with pytest.raises(ResponseError, match="value gave inf, no finite number"):
        rewarding(_Graded([float("inf")]))([rollout(0, "x")])
    with pytest.raises(ResponseError, match="StopIteration"):
        rewarding(_Graded([]))([rollout(0, "x")])


# ------------------------------------------------------------------------------------------------------------ config


def config(loss: dict[str, Any], **rollout: Any) -> Any:
    return parse_config(
        {
            "run": {"name": "rewarded"},
            "data": {"prompts": {"type": "task"}},
            "student": {"model": {"type": "tiny"}},
            "teachers": {"t": {"model": {"type": "tiny"}}},
            "rollout": {"samples_per_prompt": 4, **rollout},
            "loss": {"reward_weight": 0.5, **loss},
        }
    )


@pytest.mark.parametrize(
    ("loss", "rollout", "reason"),
    [
        ({}, {"samples_per_prompt": 1}, "raise rollout.samples_per_prompt"),
        ({"type": "sequence"}, {"alpha": 1.0}, "a reward joins the divergences and the policy-gradient losses"),
        ({"type": "reverse_kl"}, {"alpha": 1.0}, "rollout.alpha=1: .*set it below 1"),
        ({"type": "reverse_kl"}, {"data_share": 0.5}, "rollout.data_share=0.5: .*set it to 0"),
        ({"type": "reverse_kl"}, {"teacher_share": 0.5}, "rollout.teacher_share=0.5: .*set it to 0"),
        ({"type": "reverse_kl"}, {"teacher_signal": "hidden"}, "use rollout.teacher_signal=support"),
        ({"reward_weight": 0.0, "distillation_weight": 0.5}, {}, "without a reward: .*set that, or remove it"),
    ],
)
def test_what_a_reward_needs_is_said_at_start(loss: dict[str, Any], rollout: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(loss, **rollout)


def test_a_reward_is_allowed_beside_divergences_and_may_be_scheduled() -> None:
    assert config({"type": "reverse_kl"}).rewarded
    assert not config({"reward_weight": 0.0}).rewarded
