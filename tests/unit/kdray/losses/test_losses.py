"""Losses against NumPy, hand arithmetic, numerical gradients and identities."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdray.config import ForwardKLLoss, JSDLoss, LMOpsLoss, MiniLLMLoss, ReverseKLLoss, SequenceLoss
from kdray.errors import TrainingError, VocabError
from kdray.losses import LossBatch, loss_function

torch.set_num_threads(1)

LN2 = math.log(2.0)
REVERSE, FORWARD, JSD = (
    ReverseKLLoss(type="reverse_kl"),
    ForwardKLLoss(type="forward_kl"),
    JSDLoss(type="jsd", beta=0.3),
)
PLAIN = MiniLLMLoss(length_norm=False, gamma=1.0)
SEQUENCE = SequenceLoss(type="sequence")
DIVERGENCES = [REVERSE, FORWARD, JSD]
ALL = [*DIVERGENCES, MiniLLMLoss(gamma=0.9), PLAIN, None]


def name_of(settings):
    return "sft" if settings is None else settings.type


def log_softmax(rows):
    rows = rows - rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def make(rng, vocab=7, prompts=(1, 2, 1), responses=(4, 2, 3), width=3, extra=1, columns=9):
    """Random float64 logits [B, S, columns] and a batch; its support is the teacher's top-`width`, then `extra` slots
    that may be unused."""
    seq = max(p + t for p, t in zip(prompts, responses, strict=True)) + 1
    shape = (len(prompts), seq)
    mask = np.zeros(shape, dtype=bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        mask[row, prompt : prompt + response] = True
    teacher = log_softmax(rng.normal(size=(*shape, vocab)) * 1.5)
    old = log_softmax(rng.normal(size=(*shape, vocab)))
    token_ids = rng.integers(0, vocab, size=shape)
    order = np.argsort(-teacher, axis=-1)
    ids = order[..., : width + extra].copy()
    ids[..., width:] = np.where(rng.random((*shape, extra)) < 0.5, -1, ids[..., width:])
    batch = batch_of(teacher, old, token_ids, mask, ids, alpha=0.2)
    return torch.tensor(rng.normal(size=(*shape, columns))), batch, teacher


def batch_of(teacher, old, token_ids, mask, ids, alpha):
    """A LossBatch of float64 columns out of full log rows [B, S, V]."""
    at = lambda rows: np.take_along_axis(rows, token_ids[..., None], -1)[..., 0]  # noqa: E731
    support = np.where(ids >= 0, np.take_along_axis(teacher, np.maximum(ids, 0), -1), -np.inf)
    outside = np.exp(teacher)
    for slot in range(ids.shape[-1]):
        used = ids[..., slot] >= 0
        place = np.maximum(ids[..., slot : slot + 1], 0)
        kept = np.where(used[..., None], 0.0, np.take_along_axis(outside, place, -1))
        np.put_along_axis(outside, place, kept, -1)
    with np.errstate(divide="ignore"):
        mixture = np.log(alpha * np.exp(at(teacher)) + (1 - alpha) * np.exp(at(old)))
        tail = np.log(outside.sum(-1))
    return LossBatch(
        token_ids=torch.tensor(token_ids),
        mask=torch.tensor(mask),
        vocab_size=teacher.shape[-1],
        mixture_logprobs=torch.tensor(mixture),
        student_logprobs=torch.tensor(at(old)),
        teacher_logprobs=torch.tensor(at(teacher)),
        support_ids=torch.tensor(ids),
        support_logprobs=torch.tensor(support),
        tail_logprobs=torch.tensor(tail),
    )


# ----------------------------------------------------------------------------------------- a second implementation


def numpy_loss(settings, logits, batch, frozen=None):
    """Position by position in plain NumPy. `frozen` [B, S, V]: log rows that stand in wherever no gradient may flow."""
    rows = log_softmax(logits[..., : batch.vocab_size])
    frozen = rows if frozen is None else frozen
    columns = {name: None if value is None else np.asarray(value) for name, value in vars(batch).items()}
    total, sums = 0.0, {}

    def add(name, value):
        sums[name] = sums.get(name, 0.0) + value

    for b in range(len(rows)):
        targets = np.flatnonzero(columns["mask"][b])
        for k, t in enumerate(targets):
            y = columns["token_ids"][b, t]
            if settings is None:
                total -= rows[b, t, y]
                continue
            used = [i for i, token in enumerate(columns["support_ids"][b, t]) if token >= 0]
            tokens = [int(columns["support_ids"][b, t, i]) for i in used]
            p = [math.exp(columns["support_logprobs"][b, t, i]) for i in used]
            q = [math.exp(rows[b, t, token]) for token in tokens]
            rest = [math.exp(rows[b, t, v]) for v in range(batch.vocab_size) if v not in tokens]
            if rest:
                p, q = [*p, math.exp(columns["tail_logprobs"][b, t])], [*q, sum(rest)]
            reverse = sum(b_ * math.log(b_ / a) for a, b_ in zip(p, q, strict=True))
            add("reverse_kl_support", reverse)
            add("teacher_tail_mass", p[-1] if rest else 0.0)
            add("student_tail_mass", q[-1] if rest else 0.0)
            if settings.type == "reverse_kl":
                total += reverse
            elif settings.type == "forward_kl":
                total += sum(a * math.log(a / b_) for a, b_ in zip(p, q, strict=True))
            elif settings.type == "jsd":
                beta = settings.beta
                for a, b_ in zip(p, q, strict=True):
                    m = beta * a + (1 - beta) * b_
                    total += beta * a * math.log(a / m) + (1 - beta) * b_ * math.log(b_ / m)
            else:
                later = targets[k + 1 :] if settings.single_step else targets[k:]
                ids = columns["token_ids"][b, later]
                rewards = columns["teacher_logprobs"][b, later] - frozen[b, later, ids]
                value = sum(settings.gamma**i * r for i, r in enumerate(rewards))
                if settings.length_norm and len(later):
                    value /= len(later)
                ratio = math.exp(frozen[b, t, y] - columns["student_logprobs"][b, t])
                w = math.exp(columns["student_logprobs"][b, t] - columns["mixture_logprobs"][b, t])
                w = w if settings.mixing_weight else 1.0
                term = -w * min(ratio, settings.staleness_cap) * value * rows[b, t, y]
                total += term + (reverse if settings.single_step else 0.0)
                add("policy_gradient", term)
                add("single_step", reverse if settings.single_step else 0.0)
                add("staleness_ratio", min(ratio, settings.staleness_cap))
                add("staleness_clipped", float(ratio > settings.staleness_cap))
                add("log_ratio", columns["teacher_logprobs"][b, t] - frozen[b, t, y])
    return total, sums


@pytest.mark.parametrize(
    "loss",
    [
        *ALL,
        MiniLLMLoss(),
        MiniLLMLoss(single_step=False, length_norm=False, gamma=0.5),
        MiniLLMLoss(gamma=0.0, staleness_cap=1.1),
        MiniLLMLoss(mixing_weight=False),
        JSDLoss(type="jsd", beta=0.9),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_numpy(loss, seed):
    logits, batch, _ = make(np.random.default_rng(seed))
    output = loss_function(loss)(logits, batch, loss)
    total, sums = numpy_loss(loss, logits.numpy(), batch)
    assert output.total.dtype == torch.float64
    assert output.total.item() == pytest.approx(total, rel=1e-12)
    assert output.sums.keys() == sums.keys()
    for name, value in sums.items():
        assert float(output.sums[name]) == pytest.approx(value, rel=1e-12, abs=1e-14), name
        assert not output.sums[name].requires_grad


@pytest.mark.parametrize("full", [False, True], ids=["tail", "covered"])
@pytest.mark.parametrize("loss", [*DIVERGENCES, None], ids=name_of)
def test_gradcheck(loss, full):
    width = {"width": 7, "extra": 0} if full else {}
    logits, batch, _ = make(np.random.default_rng(2), prompts=(1, 1), responses=(2, 1), **width)
    assert full == bool((batch.tail_logprobs == -torch.inf).all())
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_function(loss)(z, batch, loss).total, (logits,))


@pytest.mark.parametrize("loss", [PLAIN, MiniLLMLoss(gamma=0.9, staleness_cap=1.2), MiniLLMLoss(single_step=False)])
def test_minillm_gradient_holds_weights_and_returns_fixed(loss):
    """Returns and weights are numbers, not functions: finite differences of the NumPy loss with them held fixed."""
    logits, batch, _ = make(np.random.default_rng(3))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_function(loss)(logits, batch, loss).total, logits)
    base = logits.detach().numpy()
    frozen = log_softmax(base[..., : batch.vocab_size])
    for index in itertools.product(range(3), range(base.shape[1]), (0, 3, 6, 8)):
        step = np.zeros_like(base)
        step[index] = 1e-5
        up, down = (numpy_loss(loss, base + sign * step, batch, frozen)[0] for sign in (1, -1))
        assert gradient[index].item() == pytest.approx((up - down) / 2e-5, abs=1e-7)


def test_minillm_gradcheck_where_nothing_is_held_fixed():
    """A response of one token has an empty return, which leaves the single-step term alone."""
    logits, batch, _ = make(np.random.default_rng(4), prompts=(1, 2), responses=(1, 1))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_function(PLAIN)(z, batch, PLAIN).total, (logits,))


# -------------------------------------------------------------------------------------------------------- by hand

# One row: a prompt token, then the response 0, 1, 2. At every position, over four ids,
#   student q = (1/2, 1/4, 1/8, 1/8), teacher p = (1/8, 1/2, 1/4, 1/8), so log2(q / p) = (2, -1, -1, 0).
Q = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
P = np.array([1 / 8, 1 / 2, 1 / 4, 1 / 8])


def by_hand(ids=(0, 1, 2, 3)):
    logits = torch.tensor(np.log(Q)).repeat(1, 4, 1) + 3.0  # a shift that the softmax takes out
    outside = 1.0 - P[list(ids)].sum()
    return logits, LossBatch(
        token_ids=torch.tensor([[3, 0, 1, 2]]),
        mask=torch.tensor([[False, True, True, True]]),
        vocab_size=4,
        # q_old = (1/8, 1/4, 1/8) and m = (1/8, 1/2, 1/8) at the three tokens
        student_logprobs=torch.tensor([[0.0, 1 / 8, 1 / 4, 1 / 8]], dtype=torch.float64).log(),
        mixture_logprobs=torch.tensor([[0.0, 1 / 8, 1 / 2, 1 / 8]], dtype=torch.float64).log(),
        teacher_logprobs=torch.tensor([[0.0, 1 / 8, 1 / 2, 1 / 4]], dtype=torch.float64).log(),
        support_ids=torch.tensor(ids).repeat(1, 4, 1),
        support_logprobs=torch.tensor(np.log(P[list(ids)])).repeat(1, 4, 1),
        tail_logprobs=torch.tensor(outside, dtype=torch.float64).log().repeat(1, 4),
    )


def test_reverse_and_forward_kl_by_hand():
    # KL(q || p) = ln2 (1/2 * 2 - 1/4 * 1 - 1/8 * 1 + 0) = 5/8 ln2 a position, three positions
    assert loss_function(REVERSE)(*by_hand(), REVERSE).total.item() == pytest.approx(3 * 5 / 8 * LN2, rel=1e-14)
    # KL(p || q) = ln2 (1/8 * -2 + 1/2 * 1 + 1/4 * 1 + 0) = 1/2 ln2
    assert loss_function(FORWARD)(*by_hand(), FORWARD).total.item() == pytest.approx(3 * 1 / 2 * LN2, rel=1e-14)


def test_tail_bucket_by_hand():
    # Support {0, 1}: the tail holds q = 1/4, p = 3/8; KL = 1/2 * 2 ln2 - 1/4 ln2 + 1/4 ln(2/3)
    output = loss_function(REVERSE)(*by_hand(ids=(0, 1)), REVERSE)
    assert output.total.item() == pytest.approx(3 * (3 / 4 * LN2 + 1 / 4 * math.log(2 / 3)), rel=1e-14)
    assert output.sums["teacher_tail_mass"].item() == pytest.approx(3 * 3 / 8)
    assert output.sums["student_tail_mass"].item() == pytest.approx(3 * 1 / 4)


def test_jsd_by_hand():
    # M = (p + q) / 2 = (5/16, 3/8, 3/16, 1/8): p/M = (2/5, 4/3, 4/3, 1), q/M = (8/5, 2/3, 2/3, 1)
    of_p = 1 / 8 * math.log(2 / 5) + 1 / 2 * math.log(4 / 3) + 1 / 4 * math.log(4 / 3)
    of_q = 1 / 2 * math.log(8 / 5) + 1 / 4 * math.log(2 / 3) + 1 / 8 * math.log(2 / 3)
    half = JSDLoss(type="jsd", beta=0.5)
    assert loss_function(half)(*by_hand(), half).total.item() == pytest.approx(3 * (of_p + of_q) / 2, rel=1e-14)


def test_minillm_by_hand():
    # r = log p/q at tokens 0, 1, 2: (-2, 1, 1) ln2. Later rewards: R = (1 + 1, 1, 0) ln2; over their number: (1, 1, 0).
    # Mixing weights q_old / m = (1, 1/2, 1); staleness q / q_old = (4 -> capped 2, 1, 1); w = (2, 1/2, 1).
    # Long term: -(2 * ln2 * ln(1/2) + 1/2 * ln2 * ln(1/4) + 0) = (2 + 1) ln2^2; single-step: 3 * 5/8 ln2.
    output = loss_function(MiniLLMLoss())(*by_hand(), MiniLLMLoss())
    assert output.total.item() == pytest.approx(3 * LN2**2 + 15 / 8 * LN2, rel=1e-14)
    expected = {
        "staleness_ratio": 2 + 1 + 1,
        "staleness_clipped": 1,
        "log_ratio": 0.0,
        "policy_gradient": 3 * LN2**2,
        "single_step": 15 / 8 * LN2,
    }
    assert {name: float(output.sums[name]) for name in expected} == pytest.approx(expected, abs=1e-14)
    # Without length normalisation the first token's return is 2 ln2, and with gamma 1/2 it is 3/2 ln2.
    assert loss_function(PLAIN)(*by_hand(), PLAIN).sums["policy_gradient"].item() == pytest.approx(5 * LN2**2)
    discounted = MiniLLMLoss(length_norm=False, gamma=0.5)
    assert loss_function(discounted)(*by_hand(), discounted).sums["policy_gradient"].item() == pytest.approx(4 * LN2**2)


def test_lmops_counts_as_clipped_what_has_no_gradient():
    """Single tokens with clip 0.5; their advantage is log p / q, and the ratio is exactly 0.5 or 1.5 at the bounds."""
    log_q = torch.zeros(4, dtype=torch.float64).log_softmax(-1)[0].item()
    #          advantage, ratio, is clipped
    cases = [
        (0.0, 3.0, False),
        (0.0, 0.1, False),
        (1.0, 1.5, False),
        (-1.0, 0.5, False),
        (1.0, 3.0, True),
        (-1.0, 0.1, True),
        (1.0, 0.1, False),
        (-1.0, 3.0, False),
    ]
    count = len(cases)
    advantages, ratios, clipped = (torch.tensor(each, dtype=torch.float64).unsqueeze(-1) for each in zip(*cases, strict=True))
    batch = LossBatch(
        token_ids=torch.zeros(count, 1, dtype=torch.long),
        mask=torch.ones(count, 1, dtype=torch.bool),
        vocab_size=4,
        student_logprobs=torch.full((count, 1), log_q, dtype=torch.float64),
        mixture_logprobs=log_q - ratios.log(),
        teacher_logprobs=log_q + advantages,
        support_ids=torch.arange(4).repeat(count, 1, 1),
        support_logprobs=torch.full((count, 1, 4), log_q, dtype=torch.float64),
        tail_logprobs=torch.full((count, 1), -torch.inf, dtype=torch.float64),
    )
    loss = LMOpsLoss(type="lmops", clip=0.5, whitening=False, single_step=False)
    logits = torch.zeros(count, 1, 4, dtype=torch.float64, requires_grad=True)
    output = loss_function(loss)(logits, batch, loss)
    assert output.sums["ppo_clipped"] == clipped.sum() == 2
    (gradient,) = torch.autograd.grad(output.total, logits)
    assert ((gradient == 0).all(-1) == (clipped.bool() | (advantages == 0))).all()


def test_sft_by_hand():
    # -ln(1/2) - ln(1/4) - ln(1/8) = 6 ln2
    assert loss_function(None)(*by_hand(), None).total.item() == pytest.approx(6 * LN2, rel=1e-14)


def test_sft_weighs_tokens_by_hand():
    # ln2 + 2 (2 ln2) + 1/2 (3 ln2) = 6.5 ln2
    logits, batch = by_hand()
    weights = torch.zeros(batch.mask.shape, dtype=torch.float64).masked_scatter(
        batch.mask, torch.tensor([1.0, 2.0, 0.5]).double()
    )
    found = loss_function(SEQUENCE)(logits, replace(batch, weights=weights), SEQUENCE)
    assert found.total.item() == pytest.approx(6.5 * LN2, rel=1e-14)


def test_sequence_needs_the_text_alone_and_pulls_towards_its_tokens():
    logits, full, _ = make(np.random.default_rng(21))
    # A black-box teacher's batch: no density of any kind.
    batch = LossBatch(token_ids=full.token_ids, mask=full.mask, vocab_size=full.vocab_size)
    settings = SequenceLoss(type="sequence")
    logits.requires_grad_()
    output = loss_function(settings)(logits, batch, settings)
    output.total.backward()
    value, gradient = 0.0, np.zeros(logits.shape)
    rows = log_softmax(logits.detach().numpy()[..., : batch.vocab_size])
    for b, s in np.argwhere(batch.mask.numpy()):
        token = int(batch.token_ids[b, s])
        value -= rows[b, s, token]
        gradient[b, s, : batch.vocab_size] = np.exp(rows[b, s])
        gradient[b, s, token] -= 1.0
    assert output.total.item() == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: loss_function(settings)(z, batch, settings).total, (logits,))


def test_sequence_on_all_responses_is_their_forward_kl_and_the_teachers_entropy():
    """Over every two-token response, weighted by the teacher: the mean is KL(p || q) of whole responses plus H(p)."""
    rng, vocab = np.random.default_rng(22), 3
    p, q = (log_softmax(rng.normal(size=(1 + vocab, vocab))) for _ in range(2))  # row 0 first, row 1 + y after y
    mean = divergence = entropy = 0.0
    for first, second in itertools.product(range(vocab), repeat=2):
        log_p, log_q = (distribution[0, first] + distribution[1 + first, second] for distribution in (p, q))
        batch = LossBatch(torch.tensor([[0, first, second]]), torch.tensor([[False, True, True]]), vocab)
        logits = torch.tensor(np.stack([q[0], q[0], q[1 + first]]))[None]
        mean += math.exp(log_p) * loss_function(SEQUENCE)(logits, batch, SEQUENCE).total.item()
        divergence += math.exp(log_p) * (log_p - log_q)
        entropy -= math.exp(log_p) * log_p
    assert mean == pytest.approx(divergence + entropy, rel=1e-13)


# ------------------------------------------------------------------------------------------------------ identities


def one_position(rng, vocab, width):
    """Logits and batch of one target over the teacher's top-`width`, and both full rows."""
    logits, batch, teacher = make(rng, vocab=vocab, prompts=(1,), responses=(1,), width=width, extra=0, columns=vocab)
    return logits, batch, np.exp(teacher[0, 1]), np.exp(log_softmax(logits[0, 1].numpy()))


def kl(first, second):
    return float((first * np.log(first / second)).sum())


@pytest.mark.parametrize("width", [1, 4, 11])
def test_support_chain_identity(width):
    """KL over all ids = KL of the buckets + mass outside x KL inside the tail, in both directions."""
    logits, batch, p, q = one_position(np.random.default_rng(5), vocab=12, width=width)
    inside = batch.support_ids[0, 1].numpy()
    tail = np.setdiff1d(np.arange(12), inside)
    for loss, first, second in ((REVERSE, q, p), (FORWARD, p, q)):
        mass, mass2 = first[tail].sum(), second[tail].sum()
        beyond = mass * kl(first[tail] / mass, second[tail] / mass2)
        value = loss_function(loss)(logits, batch, loss).total.item()
        assert value + beyond == pytest.approx(kl(first, second), abs=1e-12)
        # Bernoulli of the masses + inner divergence on the renormalised support
        ber = kl(np.array([mass, 1 - mass]), np.array([mass2, 1 - mass2]))
        inner = (1 - mass) * kl(first[inside] / (1 - mass), second[inside] / (1 - mass2))
        assert value == pytest.approx(ber + inner, abs=1e-12)


@pytest.mark.parametrize("loss", DIVERGENCES, ids=name_of)
def test_grows_with_the_support_up_to_the_full_divergence(loss):
    values = []
    for width in range(1, 13):
        logits, batch, p, q = one_position(np.random.default_rng(6), vocab=12, width=width)
        values.append(loss_function(loss)(logits, batch, loss).total.item())
    m = JSD.beta * p + (1 - JSD.beta) * q
    full = {"reverse_kl": kl(q, p), "forward_kl": kl(p, q), "jsd": JSD.beta * kl(p, m) + (1 - JSD.beta) * kl(q, m)}
    assert all(low <= high + 1e-14 for low, high in itertools.pairwise(values))
    assert values[0] < values[-1] - 1e-3
    assert values[-1] == pytest.approx(full[loss.type], abs=1e-12)
    # A support of all ids but one has a tail of one id: exact as well.
    assert values[-2] == pytest.approx(values[-1], abs=1e-12)


@pytest.mark.parametrize("loss", [*DIVERGENCES, PLAIN], ids=name_of)
def test_unused_slots_count_nothing(loss):
    logits, batch, _ = make(np.random.default_rng(7), extra=0)
    wide = replace(
        batch,
        support_ids=torch.cat([batch.support_ids, torch.full((*batch.mask.shape, 2), -1)], -1),
        support_logprobs=torch.cat(
            [batch.support_logprobs, torch.full((*batch.mask.shape, 2), -torch.inf, dtype=torch.float64)], -1
        ),
    )
    expected = loss_function(loss)(logits, batch, loss)
    output = loss_function(loss)(logits.requires_grad_(), wide, loss)
    assert output.total.item() == pytest.approx(expected.total.item(), rel=1e-13)
    output.total.backward()
    assert torch.isfinite(logits.grad).all()


def test_logit_gradients_in_closed_form():
    """d KL(p || q) / dz = q - p and d KL(q || p) / dz = q (log(q / p) - KL)."""
    logits, batch, p, q = one_position(np.random.default_rng(8), vocab=12, width=12)
    logits.requires_grad_()
    (forward,) = torch.autograd.grad(loss_function(FORWARD)(logits, batch, FORWARD).total, logits)
    (reverse,) = torch.autograd.grad(loss_function(REVERSE)(logits, batch, REVERSE).total, logits)
    np.testing.assert_allclose(forward[0, 1], q - p, atol=1e-12)
    np.testing.assert_allclose(reverse[0, 1], q * (np.log(q / p) - kl(q, p)), atol=1e-12)


def test_jsd_limits_symmetry_and_bound():
    logits, batch, p, q = one_position(np.random.default_rng(9), vocab=12, width=12)

    def value(beta, z, b):
        loss = JSDLoss(type="jsd", beta=beta)
        return loss_function(loss)(z, b, loss).total.item()

    assert value(1e-6, logits, batch) / 1e-6 == pytest.approx(kl(p, q), rel=1e-4)
    assert value(1 - 1e-6, logits, batch) / 1e-6 == pytest.approx(kl(q, p), rel=1e-4)
    ids = np.broadcast_to(np.arange(12), (1, 3, 12))
    as_rows = lambda row: np.broadcast_to(np.log(row), (1, 3, 12))  # noqa: E731
    swapped = batch_of(as_rows(q), as_rows(q), np.zeros((1, 3), int), batch.mask.numpy(), ids, 0.2)
    mirrored = value(0.5, torch.tensor(as_rows(p)), swapped)
    assert mirrored == pytest.approx(value(0.5, logits, batch), rel=1e-12)
    far = torch.full((1, 3, 12), -60.0, dtype=torch.float64)
    far[..., int(p.argmin())] = 60.0
    assert 0.5 * LN2 < value(0.5, far, batch) <= LN2


@pytest.mark.parametrize("loss", [*DIVERGENCES, PLAIN], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_student_equal_to_teacher_is_a_fixed_point(loss, dtype):
    rng = np.random.default_rng(10)
    teacher = log_softmax(rng.normal(size=(2, 5, 7)))
    ids = np.broadcast_to(np.arange(7), (2, 5, 7))
    mask = np.zeros((2, 5), dtype=bool)
    mask[:, 1:4] = True
    batch = batch_of(teacher, teacher, rng.integers(0, 7, (2, 5)), mask, ids, alpha=0.2)
    logits = torch.tensor(teacher, dtype=dtype).add(1.5).requires_grad_()
    output = loss_function(loss)(logits, batch, loss)
    output.total.backward()
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert abs(output.total.item()) < tolerance
    assert logits.grad.abs().max().item() < tolerance


# ------------------------------------------------------------------------------------------------ robustness, dtypes


@pytest.mark.parametrize("loss", ALL, ids=name_of)
def test_unmasked_positions_hold_garbage(loss):
    logits, batch, _ = make(np.random.default_rng(11))
    clean = loss_function(loss)(logits, batch, loss).total.item()
    dirty = {"token_ids": batch.token_ids.masked_fill(~batch.mask, 10**6)}
    for name in ("mixture_logprobs", "student_logprobs", "teacher_logprobs", "tail_logprobs"):
        dirty[name] = getattr(batch, name).masked_fill(~batch.mask, torch.nan)
    dirty["support_ids"] = batch.support_ids.masked_fill(~batch.mask.unsqueeze(-1), 10**6)
    dirty["support_logprobs"] = batch.support_logprobs.masked_fill(~batch.mask.unsqueeze(-1), torch.nan)
    noisy = logits.masked_fill(~batch.mask.unsqueeze(-1), torch.nan).requires_grad_()
    output = loss_function(loss)(noisy, replace(batch, **dirty), loss)
    output.total.backward()
    assert output.total.item() == clean
    assert torch.isfinite(noisy.grad).all()
    assert (noisy.grad[~batch.mask] == 0).all()
    assert noisy.grad[batch.mask].abs().max() > 0
    assert all(torch.isfinite(value) for value in output.sums.values())


@pytest.mark.parametrize("loss", ALL, ids=name_of)
def test_no_target_at_all_still_gives_a_gradient_of_zeros(loss):
    """A micro-batch of padding rows must take part in the collective backward pass."""
    logits, batch, _ = make(np.random.default_rng(12))
    logits.requires_grad_()
    output = loss_function(loss)(logits, replace(batch, mask=torch.zeros_like(batch.mask)), loss)
    output.total.backward()
    assert output.total.item() == 0.0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("loss", ALL, ids=name_of)
def test_padded_student_vocabulary_is_cut_before_the_softmax(loss):
    logits, batch, _ = make(np.random.default_rng(13))
    assert logits.shape[-1] > batch.vocab_size
    loud = logits.clone()
    loud[..., batch.vocab_size :] = 50.0
    loud.requires_grad_()
    output = loss_function(loss)(loud, batch, loss)
    output.total.backward()
    assert output.total.item() == loss_function(loss)(logits, batch, loss).total.item()
    assert (loud.grad[..., batch.vocab_size :] == 0).all()


@pytest.mark.parametrize("loss", ALL, ids=name_of)
def test_half_precision_logits_are_reduced_in_float32(loss):
    logits, batch, _ = make(np.random.default_rng(14))
    half = logits.to(torch.bfloat16).requires_grad_()
    output = loss_function(loss)(half, batch, loss)
    output.total.backward()
    assert output.total.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    exact = loss_function(loss)(half.detach().double(), batch, loss).total.item()
    assert output.total.item() == pytest.approx(exact, rel=1e-5)


def test_small_student_tail_keeps_its_digits():
    """With 1e-9 of mass outside, log(1 - Q) has no digit left in float32; the tail and its gradient keep theirs."""
    q = np.full(4, 1e-9 / 3)
    q[0] = 1.0 - 1e-9
    _, batch = by_hand(ids=(0,))
    exact = torch.tensor(np.log(q)).repeat(1, 4, 1).requires_grad_()
    rounded = exact.detach().float().requires_grad_()
    for z in (exact, rounded):
        loss_function(FORWARD)(z, batch, FORWARD).total.backward()
    # d/dz of -log(tail) x (7/8) - log(q_0) / 8: about -7/8 shared among the three ids of the tail
    assert exact.grad[0, 1, 1].item() == pytest.approx(-7 / 8 / 3, rel=1e-6)
    torch.testing.assert_close(rounded.grad, exact.grad.float(), rtol=1e-5, atol=1e-6)


def test_zero_teacher_mass_on_a_support_id():
    logits, batch = by_hand()
    never = batch.support_logprobs.clone()
    never[..., 0] = -torch.inf
    batch = replace(batch, support_logprobs=never)
    assert loss_function(REVERSE)(logits, batch, REVERSE).total.item() == math.inf
    # The three others: 1/2 ln2 + 1/4 ln2 + 0 a position.
    assert loss_function(FORWARD)(logits, batch, FORWARD).total.item() == pytest.approx(3 * 3 / 4 * LN2)
    assert math.isfinite(loss_function(JSD)(logits, batch, JSD).total.item())


def test_errors_name_what_is_missing():
    logits, batch, _ = make(np.random.default_rng(15))
    with pytest.raises(TrainingError, match="support_ids"):
        loss_function(REVERSE)(logits, replace(batch, support_ids=None), REVERSE)
    with pytest.raises(VocabError, match=r"the student's logits have 9 columns .* 10 ids"):
        loss_function(None)(logits, replace(batch, vocab_size=10), None)


# ------------------------------------------------------------------------------------------------------ invariances


@settings(max_examples=25)
@given(st.data())
def test_padding_order_and_split_change_nothing(data):
    """Any order of rows, any split, any padding on either side: the same sums and, row by row, the same gradient."""
    loss = data.draw(st.sampled_from(ALL), label="loss")
    rows = data.draw(st.integers(1, 5), label="rows")
    prompts = data.draw(st.lists(st.integers(1, 3), min_size=rows, max_size=rows), label="prompts")
    responses = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows), label="responses")
    logits, batch, _ = make(np.random.default_rng(16), prompts=prompts, responses=responses)
    whole = logits.clone().requires_grad_()
    expected = loss_function(loss)(whole, batch, loss)
    expected.total.backward()

    order = data.draw(st.permutations(range(rows)), label="order")
    cuts = sorted(data.draw(st.sets(st.integers(1, max(rows - 1, 1))), label="cuts"))
    total, sums, seen = 0.0, {}, torch.zeros_like(logits)
    for part in np.split(np.array(order), [cut for cut in cuts if cut < rows]):
        left, right = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)), label="padding")
        index = torch.tensor(part)
        padded = {}
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                fill = value.new_zeros((len(part), 1, *value.shape[2:]))
                padded[name] = torch.cat([fill.repeat_interleave(left, 1), value[index], fill.repeat_interleave(right, 1)], 1)
        z = torch.nn.functional.pad(logits[index], (0, 0, left, right)).requires_grad_()
        output = loss_function(loss)(z, replace(batch, **padded), loss)
        output.total.backward()
        seen[index] = z.grad[:, left : left + logits.shape[1]]
        total += output.total.item()
        for name, value in output.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    assert total == pytest.approx(expected.total.item(), rel=1e-11, abs=1e-12)
    assert sums == pytest.approx({name: float(value) for name, value in expected.sums.items()}, rel=1e-11, abs=1e-12)
    torch.testing.assert_close(seen, whole.grad, rtol=1e-11, atol=1e-13)
