"""Estimators of the sequence-level reverse KL: their expectation in an enumerated world, plain NumPy, hand arithmetic,
and what may not change them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdray.config import (
    ForwardKLLoss,
    LMOpsLoss,
    MiniLLMLoss,
    PerDecisionLoss,
    ReverseKLLoss,
    VOPDLoss,
    parse_config,
)
from kdray.errors import TrainingError
from kdray.losses import LossBatch, Whitening, loss_function, return_sums
from kdray.losses.importance import staleness_ratio
from kdray.losses.policy_gradient import recorded_returns
from kdray.losses.reverse_kl import reverse_kl
from kdray.losses.support import buckets
from kdray.rollouts.batching import micro_batches, rollouts_to_batch, shard
from kdray.runs.metrics import METRICS, batch_metrics, reduce_sums
from kdray.types import Rollout
from tests.support.toy_world import VOCAB, ToyWorld, unweighted, without_baseline

torch.set_num_threads(1)

REVERSE, FORWARD = ReverseKLLoss(type="reverse_kl"), ForwardKLLoss(type="forward_kl")
PUBLISHED = MiniLLMLoss(length_norm=False)
EXACT = PerDecisionLoss(type="per_decision")
VOPD, VOPD_RETURN = VOPDLoss(type="vopd"), VOPDLoss(type="vopd", gamma=1.0)
LMOPS = LMOpsLoss(type="lmops")
# The long term of the reference code alone: neither whitened, nor clipped, nor scaled.
LMOPS_PLAIN = LMOpsLoss(type="lmops", whitening=False, clip=None, reward_scaling=1.0, single_step=False)

ESTIMATORS = [
    PUBLISHED,
    MiniLLMLoss(gamma=0.9, staleness="mask", staleness_cap=1.2),
    MiniLLMLoss(whitening=True, staleness_cap=1.1),
    LMOPS,
    LMOPS_PLAIN,
    LMOpsLoss(type="lmops", whitening=False, length_norm=False, reward_clip=0.5),
    EXACT,
    PerDecisionLoss(type="per_decision", horizon=0),
    PerDecisionLoss(type="per_decision", horizon=1),
    PerDecisionLoss(type="per_decision", horizon=2),
    VOPD,
    VOPDLoss(type="vopd", gamma=0.7, staleness="mask", staleness_cap=1.3),
]


def name_of(loss):
    changed = loss.model_dump(exclude_defaults=True, exclude={"type"})
    return " ".join([loss.type, *(f"{key}={value}" for key, value in changed.items())])


# ------------------------------------------------------------------------------------------------- enumerated world


@pytest.fixture(scope="module", params=[0, 1], ids=["world0", "world1"])
def world(request):
    return ToyWorld(request.param)


@pytest.fixture(scope="module")
def exact(world):
    return world.finite_difference_gradient()


def error(gradient, reference):
    return float((gradient - reference).norm() / reference.norm())


def test_world_is_a_distribution(world):
    assert len(world.sequences) == 85
    for rows in (world.teacher, world.student(world.theta), world.mixture(world.theta, 0.3)):
        assert world.probabilities(rows).sum().item() == pytest.approx(1.0, abs=1e-12)
    assert error(world.exact_gradient(), world.finite_difference_gradient()) < 1e-8


@pytest.mark.parametrize(
    "loss", [PUBLISHED, EXACT, VOPD_RETURN, MiniLLMLoss(length_norm=False, single_step=False)], ids=name_of
)
def test_unbiased_on_the_students_own_samples(world, exact, loss):
    assert error(world.expected_gradient(loss, alpha=0.0), exact) < 1e-8


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("horizon", [None, 2, 50])
def test_per_decision_is_unbiased_whoever_samples(world, exact, alpha, stale, horizon):
    """Under mixing, under older weights, and with any horizon of at least the longest response less one."""
    loss = PerDecisionLoss(type="per_decision", horizon=horizon)
    sampler = world.theta + world.drift if stale else world.theta
    assert error(world.expected_gradient(loss, alpha, sampler), exact) < 1e-8


def test_a_random_number_of_tokens_biases_the_ratio_and_a_constant_does_not():
    """Every response enumerated: what docs/losses.md says of the divisor, and of filters."""
    ratios, filtered = [], []
    for seed in range(4):
        world = ToyWorld(seed)
        chance, lengths = world.probabilities(world.student(world.theta)), world.mask.sum(-1)
        rows = world.gradients(EXACT, world.batch(0.0))
        mean = chance @ rows
        assert error(chance @ (rows / 50.0) * 50.0, mean) < 1e-12
        in_tokens = mean / (chance @ lengths.double())
        finished = chance * (world.tokens.gather(1, lengths[:, None]).squeeze(1) == 0)
        filtered.append(error((finished @ rows) / (finished @ lengths.double()), in_tokens))
        of_length = torch.stack([(chance * (lengths == length)) @ rows for length in range(4)])
        chances = np.bincount(lengths.numpy(), weights=chance.numpy(), minlength=4)
        ratios.append([error(_applied(of_length, chances, responses), in_tokens) for responses in (1, 4, 16, 64)])
    assert filtered == pytest.approx((0.226, 0.818, 0.765, 0.316), abs=0.001)
    assert ratios[0] == pytest.approx((0.0180, 0.0026, 0.0006, 0.0001), abs=5e-5)
    assert ratios[2] == pytest.approx((0.0751, 0.0093, 0.0020, 0.0005), abs=5e-5)
    assert ratios[1] == pytest.approx((0.4891, 0.1335, 0.0310, 0.0075), abs=5e-5)


def _applied(of_length, chances, responses):
    """Exact mean of the sum of the responses' gradients over the sum of their lengths.

    Responses are exchangeable: it is their number times the mean of one's gradient over its length plus that of the others.
    Args: of_length: [4, parameters] mean gradient of the responses of a length, times its probability; chances: of lengths.
    """
    others = np.ones(1)
    for _ in range(responses - 1):
        others = np.convolve(others, chances)
    inverse = [float((others / (length + np.arange(len(others)))).sum()) for length in (1, 2, 3)]
    return responses * torch.tensor(inverse, dtype=torch.float64) @ of_length[1:]


@pytest.mark.parametrize("loss", [PUBLISHED, MiniLLMLoss(), VOPD_RETURN, LMOPS], ids=name_of)
@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_biased_under_mixing_as_published(world, exact, loss, alpha):
    """The single-token weight does not restore the student's expectation: nobody may claim that it does."""
    gradient = world.expected_gradient(loss, alpha)
    assert error(gradient, exact) > 0.1
    assert torch.nn.functional.cosine_similarity(gradient, exact, dim=0) > 0.5


@pytest.mark.parametrize("loss", [PUBLISHED, VOPD_RETURN], ids=name_of)
def test_biased_on_stale_samples(world, exact, loss):
    assert error(world.expected_gradient(loss, 0.0, world.theta + world.drift), exact) > 0.05


@pytest.mark.parametrize(
    "loss",
    [
        MiniLLMLoss(),
        MiniLLMLoss(length_norm=False, gamma=0.5),
        MiniLLMLoss(length_norm=False, whitening=True),
        PerDecisionLoss(type="per_decision", horizon=1),
        PerDecisionLoss(type="per_decision", horizon=0),
        VOPD,
        LMOPS,
        LMOpsLoss(type="lmops", whitening=False, clip=None, reward_scaling=1.0),
    ],
    ids=name_of,
)
def test_every_shortcut_changes_the_expectation(world, exact, loss):
    assert error(world.expected_gradient(loss, alpha=0.0), exact) > 0.01


def test_the_reference_code_counts_each_reward_twice(world, exact):
    """Return from t on, plus the single-step term: undiscounted, the exact gradient plus that of the KL per state."""
    double = LMOpsLoss(type="lmops", whitening=False, clip=None, reward_scaling=1.0, length_norm=False, gamma=1.0)
    extra = world.expected_gradient(REVERSE, alpha=0.0)
    assert error(world.expected_gradient(double, alpha=0.0), exact + extra) < 1e-8
    assert error(world.expected_gradient(double.model_copy(update={"single_step": False}), alpha=0.0), exact) < 1e-8


def test_mixing_weight_enters_the_gradient(world, exact):
    without = world.moments(PUBLISHED, 0.2, change=unweighted)[0]
    assert (world.expected_gradient(PUBLISHED, 0.2) - without).norm() > 1e-3 * exact.norm()
    assert error(world.moments(EXACT, 0.2, change=unweighted)[0], exact) > 0.05


def test_weight_on_the_single_step_term_has_mean_one_and_adds_variance(world):
    """Dropping it is exact: the term depends on the prefix alone, given which the mean of w is 1."""
    batch = world.batch(0.3)
    logits = (world.features @ world.theta)[world.prefix].requires_grad_()
    kl = reverse_kl(buckets(batch.masked_rows(logits), batch))
    chance = world.probabilities(world.mixture(world.theta, 0.3))
    means, variances = [], []
    for weight in (torch.ones_like(kl), (batch.masked("student_logprobs") - batch.masked("mixture_logprobs")).exp()):
        (by_logit,) = torch.autograd.grad((weight * kl).sum(), logits, retain_graph=True)
        rows = torch.einsum("bsv,bsvd->bd", by_logit, world.features[world.prefix])
        means.append(chance @ rows)
        variances.append(float(chance @ (rows - means[-1]).square().sum(-1)))
    assert error(means[1], means[0]) < 1e-12
    assert variances[1] > variances[0]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
def test_vopd_without_discounted_rewards_is_the_full_row_reverse_kl_in_the_mean(world, alpha):
    """Under any mixing, and with any support: the baseline depends on the prefix alone."""
    reference, covariance = world.moments(REVERSE, alpha)
    gradient, sampled_covariance = world.moments(VOPD, alpha)
    assert error(gradient, reference) < 1e-12
    # the full row is the sampled token with the draw taken out
    assert sampled_covariance.trace() > covariance.trace()
    chance = world.probabilities(world.mixture(world.theta, alpha))
    assert error(chance @ world.gradients(VOPD, world.batch(alpha, support=2)), reference) < 1e-12
    assert error(world.expected_gradient(PerDecisionLoss(type="per_decision", horizon=0), alpha), reference) < 1e-12


def test_vopd_baseline_changes_samples_and_not_the_mean(world):
    """The variance may go either way: the best baseline weighs by the size of grad log q, and this one does not."""
    batch = world.batch(0.0)
    chance = world.probabilities(world.student(world.theta))
    with_baseline, without = (world.gradients(VOPD, item) for item in (batch, without_baseline(batch)))
    assert not torch.allclose(with_baseline, without)
    torch.testing.assert_close(chance @ with_baseline, chance @ without)


def test_k1_k2_k3_as_losses_pull_where_they_should_and_should_not(world):
    """On samples of the student: k1 = log q/p has no mean gradient, k2 has that of reverse KL, k3 that of forward KL.

    vopd is what k2 promises, by another route; k1 differentiated through would have trained nothing.
    """
    logits = (world.features @ world.theta)[world.prefix].requires_grad_()
    batch = world.batch(0.0)
    chance = world.probabilities(world.student(world.theta))
    rows = batch.masked_rows(logits)
    k1 = rows.gather(-1, batch.masked("token_ids").unsqueeze(-1)).squeeze(-1) - batch.masked("teacher_logprobs")

    def mean_gradient(values):
        (by_logit,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
        return chance @ torch.einsum("bsv,bsvd->bd", by_logit, world.features[world.prefix])

    reverse, forward = (world.expected_gradient(loss, 0.0) for loss in (REVERSE, FORWARD))
    assert mean_gradient(k1).norm() < 1e-12
    assert error(mean_gradient(k1.square() / 2), reverse) < 1e-12
    assert error(mean_gradient((-k1).exp() - 1 + k1), forward) < 1e-12
    assert error(world.expected_gradient(VOPD, 0.0), reverse) < 1e-12
    # and the value: k1 and k3 have the KL as their mean, k2 has not
    weights = chance.unsqueeze(-1).expand_as(batch.mask)[batch.mask]
    values = {"k1": k1, "k2": k1.square() / 2, "k3": (-k1).exp() - 1 + k1}
    means = {name: float((weights * value).sum().detach()) for name, value in values.items()}
    divergence = world.divergence(world.theta).item()
    assert means["k1"] == pytest.approx(divergence)
    assert means["k3"] == pytest.approx(divergence)
    assert means["k2"] != pytest.approx(divergence, rel=0.05)


def test_shortcuts_buy_variance(world):
    """What the exact estimator pays under mixing, and what a horizon and length normalisation give back."""
    variance = {name_of(loss): float(world.moments(loss, 0.5)[1].trace()) for loss in (*ESTIMATORS, MiniLLMLoss(), REVERSE)}
    order = [
        name_of(loss) for loss in (REVERSE, MiniLLMLoss(), PUBLISHED, PerDecisionLoss(type="per_decision", horizon=1), EXACT)
    ]
    values = [variance[name] for name in order]
    assert values == sorted(values)


# ----------------------------------------------------------------------------------------- a second implementation


def log_softmax(rows):
    rows = rows - rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def make(seed, prompts=(1, 2, 1), responses=(4, 2, 3), vocab=6, support=3):
    """Float64 logits [B, S, vocab] and a batch sampled at alpha 0.3 by a student with other weights."""
    rng = np.random.default_rng(seed)
    shape = (len(prompts), max(p + t for p, t in zip(prompts, responses, strict=True)) + 1)
    mask = np.zeros(shape, dtype=bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        mask[row, prompt : prompt + response] = True
    teacher, old = (log_softmax(rng.normal(size=(*shape, vocab))) for _ in range(2))
    tokens = rng.integers(0, vocab, size=shape)
    at = lambda rows: np.take_along_axis(rows, tokens[..., None], -1)[..., 0]  # noqa: E731
    order = np.argsort(-teacher, axis=-1)
    kept, rest = (np.take_along_axis(teacher, part, -1) for part in (order[..., :support], order[..., support:]))
    columns = {
        "mixture_logprobs": np.log(0.3 * np.exp(at(teacher)) + 0.7 * np.exp(at(old))),
        "student_logprobs": at(old),
        "teacher_logprobs": at(teacher),
        "support_ids": order[..., :support],
        "support_logprobs": kept,
        "tail_logprobs": np.log(np.exp(rest).sum(-1)),
    }
    batch = LossBatch(
        token_ids=torch.tensor(tokens),
        mask=torch.tensor(mask),
        vocab_size=vocab,
        **{name: torch.tensor(value) for name, value in columns.items()},
    )
    return torch.tensor(rng.normal(size=(*shape, vocab))), batch


def numpy_loss(loss, logits, batch, whitening=None, frozen=None):
    """Token by token in plain Python. `frozen` [B, S, V]: log rows that stand in wherever no gradient may flow."""
    rows = log_softmax(logits)
    frozen = rows if frozen is None else frozen
    columns = {name: None if value is None else np.asarray(value) for name, value in vars(batch).items()}
    total, sums = 0.0, {}

    def add(name, value):
        sums[name] = sums.get(name, 0.0) + value

    def kl_at(table, b, t):
        ids = columns["support_ids"][b, t]
        q = [math.exp(table[b, t, i]) for i in ids]
        p = [math.exp(value) for value in columns["support_logprobs"][b, t]]
        q, p = [*q, 1 - sum(q)], [*p, math.exp(columns["tail_logprobs"][b, t])]
        return sum(a * math.log(a / b_) for a, b_ in zip(q, p, strict=True)), p[-1], q[-1]

    for b in range(len(rows)):
        places = np.flatnonzero(columns["mask"][b])
        token = lambda t: columns["token_ids"][b, t]  # noqa: B023, E731
        log_p, log_old, log_m = (
            [columns[f"{name}_logprobs"][b, t] for t in places] for name in ("teacher", "student", "mixture")
        )
        log_q = [frozen[b, t, token(t)] for t in places]
        live = [rows[b, t, token(t)] for t in places]
        count = len(places)
        for k, t in enumerate(places):
            reverse, teacher_tail, student_tail = kl_at(rows, b, t)
            add("reverse_kl_support", reverse)
            add("teacher_tail_mass", teacher_tail)
            add("student_tail_mass", student_tail)
            w = math.exp(log_old[k] - log_m[k])
            stale = math.exp(log_q[k] - log_old[k])
            add("log_ratio", log_p[k] - log_q[k])
            single = reverse if getattr(loss, "single_step", True) else 0.0
            if loss.type in ("minillm", "vopd"):
                above = stale > loss.staleness_cap
                stale = stale if not above else {"truncate": loss.staleness_cap, "mask": 0.0}[loss.staleness]
                add("staleness_clipped", float(above))
            add("staleness_ratio", stale)
            if loss.type == "minillm":
                base = log_old if whitening else log_q
                first = k + 1 if loss.single_step else k
                value = sum(loss.gamma ** (j - first) * (log_p[j] - base[j]) for j in range(first, count))
                value /= max(count - first, 1) if loss.length_norm else 1
                value = (value - whitening.mean) / whitening.std if whitening else value
                term = -w * stale * value * live[k]
            elif loss.type == "vopd":
                single = 0.0
                value = sum(loss.gamma ** (j - k) * (log_p[j] - log_q[j]) for j in range(k, count))
                term = -w * stale * (value + kl_at(frozen, b, t)[0]) * live[k]
            elif loss.type == "lmops":
                reward = [
                    max(-loss.reward_clip, min(loss.reward_clip, (p - q) / loss.reward_scaling))
                    for p, q in zip(log_p, log_old, strict=True)
                ]
                value = sum(loss.gamma ** (j - k) * reward[j] for j in range(k, count))
                value /= count - k if loss.length_norm else 1
                value = (value - whitening.mean) / whitening.std if whitening else value
                rho = w * math.exp(live[k] - log_old[k])
                low, high = (0, math.inf) if loss.clip is None else (1 - loss.clip, 1 + loss.clip)
                term = max(-value * rho, -value * min(max(rho, low), high))
                add("ppo_clipped", float((value > 0 and rho > high) or (value < 0 and rho < low)))
            else:
                reach = count if loss.horizon is None else loss.horizon
                rho = [math.exp(q - m) for q, m in zip(log_q, log_m, strict=True)]
                history = math.prod(rho[max(0, k - reach) : k])
                value = sum(
                    math.prod(rho[k + 1 : j + 1]) * (log_p[j] - log_q[j]) for j in range(k + 1, min(k + reach + 1, count))
                )
                single *= history if frozen is rows else math.prod(rho[max(0, k - reach) : k])
                term = -history * rho[k] * value * live[k]
                add("trajectory_weight", history * rho[k])
                add("trajectory_weight_sq", (history * rho[k]) ** 2)
            total += single + term
            add("policy_gradient", term)
            if loss.type != "vopd":
                add("single_step", single)
    return total, sums


WHITENING = Whitening(mean=-0.4, std=1.7)


def whitening_for(loss):
    return WHITENING if getattr(loss, "whitening", False) else None


@pytest.mark.parametrize("loss", ESTIMATORS, ids=name_of)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_numpy(loss, seed):
    logits, batch = make(seed)
    output = loss_function(loss, whitening_for(loss))(logits, batch, loss)
    total, sums = numpy_loss(loss, logits.numpy(), batch, whitening_for(loss))
    assert output.total.dtype == torch.float64
    assert output.total.item() == pytest.approx(total, rel=1e-11)
    assert output.sums.keys() == sums.keys()
    for name, value in sums.items():
        assert float(output.sums[name]) == pytest.approx(value, rel=1e-11, abs=1e-13), name
        assert not output.sums[name].requires_grad
    reduced = reduce_sums({name: float(value) for name, value in output.sums.items()}, int(batch.mask.sum()))
    assert set(reduced) <= set(METRICS)


@pytest.mark.parametrize("loss", ESTIMATORS, ids=name_of)
def test_gradient_holds_weights_and_advantages_fixed(loss):
    """Central differences of the NumPy loss with returns, weights and baselines held: advantages carry no gradient."""
    logits, batch = make(2)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_function(loss, whitening_for(loss))(logits, batch, loss).total, logits)
    base = logits.detach().numpy()
    frozen = log_softmax(base)
    for index in itertools.product(range(3), range(1, base.shape[1]), (0, 2, 5)):
        step = np.zeros_like(base)
        step[index] = 1e-5
        up, down = (numpy_loss(loss, base + sign * step, batch, whitening_for(loss), frozen)[0] for sign in (1, -1))
        assert gradient[index].item() == pytest.approx((up - down) / 2e-5, abs=2e-7)


# -------------------------------------------------------------------------------------------------------- by hand


def row(rewards, mixing, stale=None):
    """Logits and batch of one response with these r_t (under the current student), q_old / m, and q / q_old.

    Every student row is uniform over four ids, so log q = -2 ln 2 at each token.
    """
    count = len(rewards)
    log_q = torch.full((count,), -2 * math.log(2.0), dtype=torch.float64)
    log_old = log_q - torch.tensor(stale or [1.0] * count, dtype=torch.float64).log()
    column = lambda values: torch.cat([torch.full((1,), torch.nan), values])[None]  # noqa: E731
    batch = LossBatch(
        token_ids=torch.zeros(1, count + 1, dtype=torch.long),
        mask=torch.tensor([[False] + [True] * count]),
        vocab_size=4,
        student_logprobs=column(log_old),
        mixture_logprobs=column(log_old - torch.tensor(mixing, dtype=torch.float64).log()),
        teacher_logprobs=column(log_q + torch.tensor(rewards, dtype=torch.float64)),
        support_ids=torch.arange(4).repeat(1, count + 1, 1),
        support_logprobs=torch.full((1, count + 1, 4), -2 * math.log(2.0), dtype=torch.float64),
        tail_logprobs=torch.full((1, count + 1), -torch.inf, dtype=torch.float64),
    )
    return torch.zeros(1, count + 1, 4, dtype=torch.float64, requires_grad=True), batch


def pushes(loss, logits, batch, whitening=None):
    """What multiplies grad log q(y_t) at each token: d total / d z_y = push x (1 - q_y), with q_y = 1/4."""
    (gradient,) = torch.autograd.grad(loss_function(loss, whitening)(logits, batch, loss).total, logits)
    return (gradient[0, 1:, 0] / 0.75).tolist()


def test_returns_of_the_reference_code_by_hand():
    # r = (1, -2, 3): 3; -2 + .95 x 3 = .85; 1 + .95 x .85 = 1.8075; over the tokens left: 1.8075/3, .85/2, 3
    _, batch = row([1.0, -2.0, 3.0], [1.0, 1.0, 1.0])
    assert recorded_returns(batch, LMOPS_PLAIN, torch.float64).tolist() == pytest.approx([0.6025, 0.425, 3.0])
    raw = LMOPS_PLAIN.model_copy(update={"length_norm": False})
    assert recorded_returns(batch, raw, torch.float64).tolist() == pytest.approx([1.8075, 0.85, 3.0])
    # the code's scale of 0.5 doubles them, and the clip acts after it: (2, -4, 6) -> (2, -3, 3)
    scaled = LMOpsLoss(type="lmops", whitening=False, gamma=1.0, length_norm=False, reward_clip=3.0)
    assert recorded_returns(batch, scaled, torch.float64).tolist() == pytest.approx([2.0, 0.0, 3.0])
    # MiniLLM's return starts one later: (-2 + 3) / 2, 3 / 1, nothing
    assert recorded_returns(batch, MiniLLMLoss(), torch.float64).tolist() == pytest.approx([0.5, 3.0, 0.0])


def test_per_decision_by_hand():
    # rho = (1/2, 3, 2), r = (1, -2, 3). Returns: 3 x -2 + 3 x 2 x 3 = 12; 2 x 3 = 6; 0. Times W rho: 1/2; 3/2.
    logits, batch = row([1.0, -2.0, 3.0], [0.5, 1.5, 1.0], stale=[1.0, 2.0, 2.0])
    assert pushes(EXACT, logits, batch) == pytest.approx([-6.0, -9.0, 0.0])
    # horizon 1: 3 x -2; the second token sees rho_1 and its next reward; W rho as before, but at the third rho_2 rho_3
    one = PerDecisionLoss(type="per_decision", horizon=1)
    assert pushes(one, logits, batch) == pytest.approx([3.0, -9.0, 0.0])
    assert loss_function(one)(logits, batch, one).sums["trajectory_weight"].item() == pytest.approx(0.5 + 1.5 + 6.0)
    # horizon 0: no return and no history; the rows agree, so nothing is left
    none = PerDecisionLoss(type="per_decision", horizon=0)
    assert pushes(none, logits, batch) == pytest.approx([0.0, 0.0, 0.0])
    assert loss_function(none)(logits, batch, none).sums["trajectory_weight"].item() == pytest.approx(0.5 + 3.0 + 2.0)


def test_vopd_by_hand():
    logits, batch = row([1.0, -2.0, 3.0], [0.5, 1.0, 1.0], stale=[1.0, 1.0, 3.0])
    # the state KL is 0: w r = 1/2, -2, and 3 at a ratio of 3, cut to 2
    assert pushes(VOPD, logits, batch) == pytest.approx([-0.5, 2.0, -6.0])
    half = VOPDLoss(type="vopd", gamma=0.5, staleness="mask")
    assert pushes(half, logits, batch) == pytest.approx([-0.5 * 0.75, 0.5, 0.0])


@pytest.mark.parametrize(("handling", "second"), [("truncate", 2.0), ("mask", 0.0)])
def test_stale_tokens_are_truncated_or_left_out(handling, second):
    logits, batch = row([0.0, 1.0, 1.0], [1.0, 0.5, 1.0], stale=[0.25, 5.0, 1.0])
    loss = MiniLLMLoss(length_norm=False, staleness=handling)
    # returns 2, 1, 0; the mixing weight 1/2 is never bounded, the ratio 1/4 is kept
    assert pushes(loss, logits, batch) == pytest.approx([-0.5, -0.5 * second, 0.0])
    sums = loss_function(loss)(logits, batch, loss).sums
    assert sums["staleness_clipped"].item() == 1
    assert sums["staleness_ratio"].item() == pytest.approx(0.25 + second + 1.0)


def test_masked_ratio_survives_overflow():
    ratio, above = staleness_ratio(torch.tensor([0.0, 0.0]), torch.tensor([-200.0, 0.0]), cap=2.0, handling="mask")
    assert ratio.tolist() == [0.0, 1.0]
    assert above.tolist() == [True, False]


def test_ppo_at_the_samplers_weights_is_w_times_advantage():
    logits, batch = row([1.0, -2.0, 3.0], [1.25, 0.5, 0.25])
    advantages = [0.6025, 0.425, 3.0]
    expected = [-w * a for w, a in zip([1.25, 0.5, 0.25], advantages, strict=True)]
    assert pushes(LMOPS_PLAIN, logits, batch) == pytest.approx(expected)


def test_ppo_ratio_is_that_of_the_current_student_to_the_mixture():
    """In an inner epoch q_theta has left the sampler's q, and the advantage has not."""
    logits, batch = row([1.0], [0.8], stale=[1.4])
    # reward under the sampler: log p - log q_old = 1 + ln 1.4; rho = 0.8 x 1.4
    assert pushes(LMOPS_PLAIN, logits, batch) == pytest.approx([-(1 + math.log(1.4)) * 1.12])


@pytest.mark.parametrize(
    ("sign", "ratio", "kept"),
    [(1, 1.25, False), (1, 1.19, True), (1, 0.5, True), (-1, 0.75, False), (-1, 0.81, True), (-1, 1.25, True)],
)
def test_ppo_clip_zones(sign, ratio, kept):
    """No gradient at {A > 0, rho > 1.2} and {A < 0, rho < 0.8}, the whole gradient everywhere else."""
    loss = LMOpsLoss(type="lmops", whitening=False, single_step=False, reward_scaling=1.0)
    logits, batch = row([2.0 * sign], [ratio])
    assert pushes(loss, logits, batch) == pytest.approx([-2.0 * sign * ratio if kept else 0.0])
    assert loss_function(loss)(logits, batch, loss).sums["ppo_clipped"].item() == (0 if kept else 1)


@pytest.mark.parametrize("loss", [*ESTIMATORS, VOPD_RETURN], ids=name_of)
def test_student_equal_to_teacher_is_a_fixed_point(loss):
    world = ToyWorld(0)
    world.teacher = world.student(world.theta)
    assert world.gradients(loss, world.batch(0.2), world.whitening(loss, 0.2)).abs().max() < 1e-12
    output = loss_function(loss, whitening_for(loss) and Whitening(0.0, 1.0))(
        (world.features @ world.theta)[world.prefix], world.batch(0.2), loss
    )
    assert output.total.item() == pytest.approx(0.0, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ whitening


def rollouts(seed, lengths):
    """Random rollouts with all columns over VOCAB ids; prompts of two tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for sample, count in enumerate(lengths):
        teacher, student = (log_softmax(rng.normal(size=(count, VOCAB))).astype(np.float32) for _ in range(2))
        tokens = rng.integers(0, VOCAB, size=count).astype(np.int32)
        at = lambda rows: rows[range(count), tokens]  # noqa: B023, E731
        made.append(
            Rollout(
                sample_id=sample,
                prompt_id=sample,
                prompt_ids=np.array([1, 2], dtype=np.int32),
                token_ids=tokens,
                mixture_logprobs=np.log(0.2 * np.exp(at(teacher)) + 0.8 * np.exp(at(student))),
                student_logprobs=at(student),
                student_versions=np.zeros(count, dtype=np.int32),
                alpha=0.2,
                finish_reason="stop",
                teacher_logprobs=at(teacher),
                support_ids=np.tile(np.arange(VOCAB, dtype=np.int32), (count, 1)),
                support_logprobs=teacher,
                tail_logprobs=np.full(count, -np.inf, dtype=np.float32),
            )
        )
    return made


@pytest.mark.parametrize("loss", [MiniLLMLoss(whitening=True), LMOPS], ids=name_of)
def test_whitened_returns_have_mean_zero_and_variance_one_over_real_tokens(loss):
    """Padding takes no part: long and short rows in one batch."""
    batch = rollouts_to_batch(rollouts(0, [9, 1, 4, 0]), step=1)
    returns = recorded_returns(LossBatch.from_train_batch(batch, VOCAB), loss, torch.float64)
    assert len(returns) == 14
    count, total, squares = return_sums(batch, loss)
    assert (count, total, squares) == pytest.approx((14, float(returns.sum()), float(returns.square().sum())))
    whitening = Whitening.from_sums([count, total, squares])
    whitened = (returns - whitening.mean) / whitening.std
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert whitened.square().mean().item() == pytest.approx(1.0, abs=1e-6)


def test_whitening_needs_the_statistics_of_the_step():
    logits, batch = make(3)
    for loss in (MiniLLMLoss(whitening=True), LMOPS):
        with pytest.raises(TrainingError, match=r"loss.whitening=true with loss.type=.*return_sums"):
            loss_function(loss)(logits, batch, loss)
    empty = rollouts_to_batch(rollouts(0, [3]), step=1)
    assert all(return_sums(empty, loss) is None for loss in (MiniLLMLoss(), EXACT, VOPD, REVERSE, LMOPS_PLAIN, None))


def test_whitening_of_nothing_and_of_equal_returns_is_finite():
    assert Whitening.from_sums([0, 0, 0]).mean == 0.0
    equal = Whitening.from_sums([5, 10, 20])
    assert (2.0 - equal.mean) / equal.std == 0.0


# ------------------------------------------------------------------------------------------------------ invariances


@settings(max_examples=40)
@given(
    st.sampled_from([*ESTIMATORS, VOPD_RETURN]),
    st.lists(st.integers(0, 6), min_size=1, max_size=7),
    st.integers(1, 3),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_order_ranks_and_micro_batches_change_nothing(loss, lengths, world_size, micro_batch_size, random):
    """Through the real batching: any order of rollouts, number of ranks and micro-batches; whitening included."""
    samples = rollouts(4, lengths)
    weights = torch.tensor(np.random.default_rng(5).normal(size=(VOCAB, VOCAB)))
    place = torch.tensor(np.random.default_rng(6).normal(size=(16, VOCAB)))

    def gradient(batches, statistics):
        whitening = None if statistics[0] is None else Whitening.from_sums(np.sum(statistics, axis=0))
        parameter = weights.clone().requires_grad_()
        total, sums = torch.zeros((), dtype=torch.float64), {}
        for part in batches:
            tensors = LossBatch.from_train_batch(part, VOCAB)
            logits = parameter[tensors.token_ids.roll(1, dims=1)] + place[: tensors.token_ids.shape[1]]
            output = loss_function(loss, whitening)(logits, tensors, loss)
            total = total + output.total
            for name, value in output.sums.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return torch.autograd.grad(total, parameter)[0], total.item(), sums

    whole = rollouts_to_batch(samples, step=1)
    expected, value, sums = gradient([whole], [return_sums(whole, loss)])
    random.shuffle(samples)
    shuffled = rollouts_to_batch(samples, step=1)
    shards = [shard(shuffled, rank, world_size) for rank in range(world_size)]
    parts = [part for piece in shards for part in micro_batches(piece, micro_batch_size)]
    found, value_again, sums_again = gradient(parts, [return_sums(piece, loss) for piece in shards])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    assert value_again == pytest.approx(value, rel=1e-10, abs=1e-10)
    assert sums_again == pytest.approx(sums, rel=1e-10, abs=1e-10)


@settings(max_examples=25)
@given(st.sampled_from(ESTIMATORS), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_padding_changes_nothing_and_may_hold_anything(loss, left, right, garbage):
    logits, batch = make(7)
    whitening = whitening_for(loss)
    whole = logits.clone().requires_grad_()
    expected = loss_function(loss, whitening)(whole, batch, loss)
    expected.total.backward()
    padded = {}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            column = value
            if garbage and value.dtype == torch.float64:
                away = ~batch.mask if value.ndim == 2 else ~batch.mask.unsqueeze(-1)
                column = value.masked_fill(away, torch.nan)
            fill = column.new_zeros((len(column), 1, *column.shape[2:]))
            padded[name] = torch.cat([fill.repeat_interleave(left, 1), column, fill.repeat_interleave(right, 1)], 1)
    longer = torch.nn.functional.pad(logits, (0, 0, left, right)).requires_grad_()
    output = loss_function(loss, whitening)(longer, replace(batch, **padded), loss)
    output.total.backward()
    assert output.total.item() == pytest.approx(expected.total.item(), rel=1e-12)
    torch.testing.assert_close(longer.grad[:, left : left + logits.shape[1]], whole.grad, rtol=1e-11, atol=1e-13)
    assert longer.grad.abs().sum() == pytest.approx(whole.grad.abs().sum().item())


@pytest.mark.parametrize("loss", ESTIMATORS, ids=name_of)
def test_no_target_at_all_still_gives_a_gradient_of_zeros(loss):
    """A micro-batch of padding rows must take part in the collective backward pass."""
    logits, batch = make(8)
    logits.requires_grad_()
    output = loss_function(loss, whitening_for(loss))(logits, replace(batch, mask=torch.zeros_like(batch.mask)), loss)
    output.total.backward()
    assert output.total.item() == 0.0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("loss", ESTIMATORS, ids=name_of)
def test_half_precision_logits_are_reduced_in_float32(loss):
    logits, batch = make(9)
    half = logits.to(torch.bfloat16).requires_grad_()
    output = loss_function(loss, whitening_for(loss))(half, batch, loss)
    output.total.backward()
    assert output.total.dtype == torch.float32
    assert torch.isfinite(half.grad).all()
    exact = loss_function(loss, whitening_for(loss))(half.detach().double(), batch, loss).total.item()
    assert output.total.item() == pytest.approx(exact, rel=1e-4)


def test_long_products_stay_finite():
    """600 ratios of 1.25 are 1e58: beyond float32, which must not turn a token without a return into 0 x inf."""
    logits, batch = row([0.0] * 600, [1.25] * 600)
    loss = PerDecisionLoss(type="per_decision", horizon=3)
    output = loss_function(loss)(logits.float(), batch, loss)
    assert output.sums["trajectory_weight"].item() == pytest.approx(1.25**4 * 597 + 1.25 + 1.25**2 + 1.25**3, rel=1e-5)
    assert math.isfinite(output.total.item())


# ---------------------------------------------------------------------------------------------- metrics, settings


def test_weights_by_teacher_and_staleness_by_hand():
    def sampled(teacher, weights, versions):
        (rollout,) = rollouts(0, [len(weights)])
        log_q = rollout.mixture_logprobs + np.log(np.array(weights, dtype=np.float32))
        return replace(rollout, teacher=teacher, student_logprobs=log_q, student_versions=np.array(versions, dtype=np.int32))

    # teacher a: (1, 3) at version 7 of 7; 1 at version 5, from both of its rollouts; teacher b: 2
    metrics = batch_metrics([sampled("a", [1, 1, 3], [5, 7, 7]), sampled("b", [2], [7]), sampled("a", [1], [5])], 7)
    assert {name: value for name, value in metrics.items() if "importance_weight" in name} == pytest.approx(
        {
            "importance_weight_mean": 8 / 5,
            "importance_weight_ess": 8**2 / (5 * (1 + 1 + 9 + 4 + 1)),
            "teacher/a/staleness_0/importance_weight_mean": 2.0,
            "teacher/a/staleness_0/importance_weight_ess": 0.8,
            "teacher/a/staleness_2/importance_weight_mean": 1.0,
            "teacher/a/staleness_2/importance_weight_ess": 1.0,
            "teacher/b/staleness_0/importance_weight_mean": 2.0,
            "teacher/b/staleness_0/importance_weight_ess": 1.0,
        },
        rel=1e-5,
    )
    assert {name.rsplit("/")[-1] for name in metrics} <= set(METRICS)


@pytest.mark.parametrize("loss", [*ESTIMATORS, VOPD_RETURN], ids=name_of)
def test_settings_are_read_from_a_config(loss):
    tree = {
        "run": {"name": "x"},
        "student": {"model": "tiny:gpt2"},
        "teachers": {"t": {"model": "tiny:gpt2"}},
        "loss": loss.model_dump(exclude_defaults=True) | {"type": loss.type},
    }
    assert parse_config(tree).loss == loss
