"""Divergences against NumPy, hand arithmetic, numerical gradients, closed forms, limits, and invariances; each over full
rows and over a support with its tail."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdray.config import (
    AdaptiveKLLoss,
    ForwardKLLoss,
    ForwardKLSampledLoss,
    HintonLoss,
    JSDLoss,
    MSELogitLoss,
    ReverseKLLoss,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    TVDLoss,
)
from kdray.config.losses import LOSSES
from kdray.config.registry import name_of as type_of
from kdray.errors import TrainingError, VocabError
from kdray.losses import LossBatch, divergence_of, loss_function
from kdray.losses.adaptive_kl import head_share
from kdray.losses.support import buckets, full_rows, kl_terms

torch.set_num_threads(1)

LN2 = math.log(2.0)
FORWARD, REVERSE = ForwardKLLoss(type="forward_kl"), ReverseKLLoss(type="reverse_kl")
TVD, MSE = TVDLoss(type="tvd"), MSELogitLoss(type="mse_logit")
JSD = JSDLoss(type="jsd", beta=0.3)
SKEW_FORWARD = SkewForwardKLLoss(type="skew_forward_kl", skew=0.1)
SKEW_REVERSE = SkewReverseKLLoss(type="skew_reverse_kl", skew=0.3)
ADAPTIVE = AdaptiveKLLoss(type="adaptive_kl", head_mass=0.6)
HINTON = HintonLoss(type="hinton", temperature=2.5, soft_share=0.7)
SOFT = HintonLoss(type="hinton", temperature=2.5, soft_share=1.0)
SAMPLED = ForwardKLSampledLoss(type="forward_kl_sampled")
F_DIVERGENCES = [FORWARD, REVERSE, JSD, SKEW_FORWARD, SKEW_REVERSE, TVD]
PURE = [*F_DIVERGENCES, ADAPTIVE, MSE, SOFT]
"""Divergences proper: 0 where student and teacher agree. Hinton's hard term is none."""
ALL = [*PURE, HINTON]

VOCAB, STUDENT_COLUMNS, TEACHER_COLUMNS = 7, 9, 8


def name_of(loss):
    return f"{loss.type}_soft" if loss is SOFT else loss.type


def value(loss, logits, batch):
    return loss_function(loss)(logits, batch, loss).total


def softmax(rows):
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def make(seed, width=3, prompts=(1, 2), responses=(3, 2), full=False, sharp=1.5):
    """Student logits [B, S, 9], a batch over 7 ids with the teacher's logits (`full`) or its top-`width` and the tail, and
    the teacher's probabilities. One slot of the support is sometimes unused."""
    rng = np.random.default_rng(seed)
    seq = max((p + t for p, t in zip(prompts, responses, strict=True)), default=0) + 1
    shape = (len(prompts), seq)
    mask = np.zeros(shape, dtype=bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        mask[row, prompt : prompt + response] = True
    teacher_logits = rng.normal(size=(*shape, TEACHER_COLUMNS)) * sharp
    teacher = softmax(teacher_logits[..., :VOCAB])
    token_ids = rng.integers(0, VOCAB, size=shape)
    ids = np.argsort(-teacher, axis=-1)[..., :width].copy()
    if width < VOCAB:
        ids[..., -1] = np.where(rng.random(shape) < 0.3, -1, ids[..., -1])
    chosen = np.where(ids >= 0, np.take_along_axis(teacher, np.maximum(ids, 0), -1), 0.0)
    outside = np.array([1.0 - row[tokens[tokens >= 0]].sum() for row, tokens in zip(flat(teacher), flat(ids), strict=True)])
    outside = np.where((ids >= 0).sum(-1) == VOCAB, 0.0, outside.reshape(shape))
    with np.errstate(divide="ignore"):
        support_logprobs, tail_logprobs = np.log(chosen), np.log(outside)
    at = np.take_along_axis(teacher, token_ids[..., None], -1)[..., 0]
    batch = LossBatch(
        token_ids=torch.tensor(token_ids),
        mask=torch.tensor(mask),
        vocab_size=VOCAB,
        teacher_logprobs=torch.tensor(np.log(at)),
        mixture_logprobs=torch.tensor(np.log(0.2 * at + 0.8 * rng.uniform(0.05, 0.5, size=shape))),
        **(
            {"teacher_logits": torch.tensor(teacher_logits)}
            if full
            else {
                "support_ids": torch.tensor(ids),
                "support_logprobs": torch.tensor(support_logprobs),
                "tail_logprobs": torch.tensor(tail_logprobs),
            }
        ),
    )
    return torch.tensor(rng.normal(size=(*shape, STUDENT_COLUMNS))), batch, teacher


def flat(array):
    return array.reshape(-1, array.shape[-1])


def two_rows(seed=0, vocab=6, sharp=1.5):
    """Logits [1, vocab] of student (leaf) and teacher, and their probabilities."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, 1, vocab)) * sharp
    return torch.tensor(student, requires_grad=True), torch.tensor(teacher), softmax(student)[0], softmax(teacher)[0]


def of_rows(loss, student_logits, teacher_logits):
    return divergence_of(loss)(full_rows(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1))).sum()


def kl(first, second):
    return float((first * np.log(first / second)).sum())


# ----------------------------------------------------------------------------------------- a second implementation


def numpy_value(loss, p, q, q_token, has_tail, share=None):
    """One position, from lists of probabilities; `share` stands in for adaptive KL's weight."""
    forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
    reverse = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    match loss.type:
        case "forward_kl":
            return forward
        case "reverse_kl":
            return reverse
        case "jsd":
            m = [loss.beta * a + (1 - loss.beta) * b for a, b in zip(p, q, strict=True)]
            first = sum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
            return loss.beta * first + (1 - loss.beta) * sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
        case "skew_forward_kl":
            return sum(a * math.log(a / (loss.skew * a + (1 - loss.skew) * b)) for a, b in zip(p, q, strict=True))
        case "skew_reverse_kl":
            return sum(b * math.log(b / (loss.skew * b + (1 - loss.skew) * a)) for a, b in zip(p, q, strict=True))
        case "tvd":
            return sum(max(a - b, 0.0) for a, b in zip(p, q, strict=True))
        case "mse_logit":
            z_p, z_q = np.log(p), np.log(q)
            return 0.5 * float(np.mean(((z_q - z_q.mean()) - (z_p - z_p.mean())) ** 2))
        case "adaptive_kl":
            share = numpy_share(loss, p, q, has_tail) if share is None else share
            return share * forward + (1 - share) * reverse
        case "hinton":
            t = loss.temperature
            p_t, q_t = (np.power(x, 1 / t) / np.power(x, 1 / t).sum() for x in (p, q))
            return loss.soft_share * t * t * kl(p_t, q_t) - (1 - loss.soft_share) * math.log(q_token)
    raise AssertionError(loss.type)


def numpy_share(loss, p, q, has_tail):
    ids = sorted(range(len(p) - has_tail), key=lambda i: -p[i])
    head, mass = [], 0.0
    for place, i in enumerate(ids):
        mass += p[i]
        if place == 0 or mass <= loss.head_mass:
            head.append(i)
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    return sum(gaps[i] for i in head) / sum(gaps)


def numpy_positions(logits, batch, teacher):
    """(p, q, q_token, has_tail) of every masked position, in order."""
    student = softmax(np.asarray(logits.detach())[..., :VOCAB])
    for b, t in zip(*np.nonzero(batch.mask.numpy()), strict=True):
        p, q, token = teacher[b, t], student[b, t], int(batch.token_ids[b, t])
        tokens = range(VOCAB)
        if batch.support_ids is not None:
            tokens = [int(i) for i in batch.support_ids[b, t] if i >= 0]
        rest = [v for v in range(VOCAB) if v not in tokens]
        tail = [[float(x[rest].sum())] if rest else [] for x in (p, q)]
        yield [*p[list(tokens)], *tail[0]], [*q[list(tokens)], *tail[1]], q[token], bool(rest)


SOURCES = pytest.mark.parametrize("source", [{"full": True}, {"width": 3}, {"width": VOCAB}], ids=["full", "tail", "covered"])


@SOURCES
@pytest.mark.parametrize("loss", [*ALL, JSDLoss(type="jsd", beta=0.9)], ids=name_of)
def test_equals_numpy(loss, source):
    for seed in range(3):
        logits, batch, teacher = make(seed, **source)
        expected = sum(numpy_value(loss, *position) for position in numpy_positions(logits, batch, teacher))
        output = loss_function(loss)(logits, batch, loss)
        assert output.total.item() == pytest.approx(expected, rel=1e-11)
        reverse = sum(numpy_value(REVERSE, *position) for position in numpy_positions(logits, batch, teacher))
        assert output.sums["reverse_kl_support"].item() == pytest.approx(reverse, rel=1e-11)
        tails = [position[0][-1] for position in numpy_positions(logits, batch, teacher) if position[3]]
        assert output.sums["teacher_tail_mass"].item() == pytest.approx(sum(tails), abs=1e-14)


@SOURCES
@pytest.mark.parametrize("loss", [loss for loss in ALL if loss is not ADAPTIVE], ids=name_of)
def test_gradcheck(loss, source):
    logits, batch, _ = make(5, prompts=(1, 1), responses=(2, 1), **source)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: value(loss, z, batch), (logits,))


@SOURCES
def test_adaptive_kl_gradient_holds_its_weight_fixed(source):
    logits, batch, teacher = make(6, **source)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(value(ADAPTIVE, logits, batch), logits)
    shares = [numpy_share(ADAPTIVE, p, q, tail) for p, q, _, tail in numpy_positions(logits, batch, teacher)]
    for index in itertools.product(range(2), range(logits.shape[1]), (0, 3, 6, 8)):
        step = torch.zeros_like(logits)
        step[index] = 1e-5
        up, down = (
            sum(
                numpy_value(ADAPTIVE, *position, share=share)
                for position, share in zip(numpy_positions(logits + sign * step, batch, teacher), shares, strict=True)
            )
            for sign in (1, -1)
        )
        assert gradient[index].item() == pytest.approx((up - down) / 2e-5, abs=1e-7)


# -------------------------------------------------------------------------------------------------------- by hand

Q = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])  # student
P = np.array([1 / 8, 1 / 2, 1 / 4, 1 / 8])  # teacher: log2(q / p) = (2, -1, -1, 0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (FORWARD, 1 / 2 * LN2),
        (REVERSE, 5 / 8 * LN2),
        # M = (p + q) / 2 = (5/16, 3/8, 3/16, 1/8)
        (SkewForwardKLLoss(type="skew_forward_kl", skew=0.5), 1 / 8 * math.log(2 / 5) + 3 / 4 * math.log(4 / 3)),
        (SkewReverseKLLoss(type="skew_reverse_kl", skew=0.5), 1 / 2 * math.log(8 / 5) + 3 / 8 * math.log(2 / 3)),
        # M = 1/4 p + 3/4 q = (13/32, 5/16, 5/32, 1/8): the share is the teacher's
        (
            SkewForwardKLLoss(type="skew_forward_kl", skew=0.25),
            1 / 8 * math.log(4 / 13) + 1 / 2 * math.log(8 / 5) + 1 / 4 * math.log(8 / 5),
        ),
        # M = 1/4 q + 3/4 p = (7/32, 7/16, 7/32, 1/8): the share is the student's
        (
            SkewReverseKLLoss(type="skew_reverse_kl", skew=0.25),
            1 / 2 * math.log(16 / 7) + 1 / 4 * math.log(4 / 7) + 1 / 8 * math.log(4 / 7),
        ),
        (TVD, 3 / 8),
        # Head {1}: gap 1/4 of 3/4 in all, so 1/3 forward and 2/3 reverse.
        (AdaptiveKLLoss(type="adaptive_kl", head_mass=0.5), (1 / 3 * 1 / 2 + 2 / 3 * 5 / 8) * LN2),
        # Head {1, 2}: gap 3/8 of 3/4.
        (AdaptiveKLLoss(type="adaptive_kl", head_mass=0.75), (1 / 2 * 1 / 2 + 1 / 2 * 5 / 8) * LN2),
        # Differences (2, -1, -1, 0) ln2 are centred already: 1/2 (4 + 1 + 1 + 0) / 4.
        (MSE, 3 / 4 * LN2**2),
        # T = 1/2 squares: p^2 = (1, 16, 4, 1) / 22, q^2 = (16, 4, 1, 1) / 22; KL = (-4 + 32 + 8) ln2 / 22, times T^2.
        (HintonLoss(type="hinton", temperature=0.5, soft_share=1.0), 1 / 4 * 36 / 22 * LN2),
    ],
    ids=lambda item: item.type if hasattr(item, "type") else "",
)
def test_by_hand(loss, expected):
    student = torch.tensor(np.log(Q))[None] + 3.0  # a shift that the softmax takes out
    assert of_rows(loss, student, torch.tensor(np.log(P))[None] - 2.0).item() == pytest.approx(expected, rel=1e-13)


def test_hinton_blends_soft_and_hard():
    logits, batch, _ = make(7, full=True)
    soft = value(SOFT, logits, batch)
    hard = value(HintonLoss(type="hinton", temperature=2.5, soft_share=0.0), logits, batch)
    torch.testing.assert_close(hard, loss_function(None)(logits, batch, None).total, rtol=1e-13, atol=0)
    torch.testing.assert_close(value(HINTON, logits, batch), 0.7 * soft + 0.3 * hard, rtol=1e-13, atol=0)
    plain = HintonLoss(type="hinton", temperature=1.0, soft_share=1.0)
    torch.testing.assert_close(value(plain, logits, batch), value(FORWARD, logits, batch), rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------ closed forms and limits


def test_logit_gradients_in_closed_form():
    z, teacher, q, p = two_rows()
    gradient = {loss.type: torch.autograd.grad(of_rows(loss, z, teacher), z)[0][0].numpy() for loss in PURE}
    # Through the softmax, dL/dz = q (u - sum q u) with u = dL/dq.
    through = lambda u: q * (u - (q * u).sum())  # noqa: E731
    np.testing.assert_allclose(gradient["forward_kl"], q - p, atol=1e-13)
    np.testing.assert_allclose(gradient["reverse_kl"], q * (np.log(q / p) - kl(q, p)), atol=1e-13)
    np.testing.assert_allclose(gradient["tvd"], through(0.5 * np.sign(q - p)), atol=1e-13)
    m = JSD.beta * p + (1 - JSD.beta) * q
    np.testing.assert_allclose(gradient["jsd"], through((1 - JSD.beta) * np.log(q / m)), atol=1e-13)
    m = SKEW_FORWARD.skew * p + (1 - SKEW_FORWARD.skew) * q
    np.testing.assert_allclose(gradient["skew_forward_kl"], through(-(1 - SKEW_FORWARD.skew) * p / m), atol=1e-13)
    m = SKEW_REVERSE.skew * q + (1 - SKEW_REVERSE.skew) * p
    np.testing.assert_allclose(gradient["skew_reverse_kl"], through(np.log(q / m) - SKEW_REVERSE.skew * q / m), atol=1e-13)
    difference = (z - teacher).detach().numpy()[0]
    np.testing.assert_allclose(gradient["mse_logit"], (difference - difference.mean()) / len(q), atol=1e-13)
    t = SOFT.temperature
    q_t, p_t = softmax(z.detach().numpy()[0] / t), softmax(teacher.numpy()[0] / t)
    np.testing.assert_allclose(gradient["hinton"], t * (q_t - p_t), atol=1e-13)


def test_hinton_becomes_logit_regression_as_the_temperature_grows():
    z, teacher, *_ = two_rows(1)
    limit = torch.autograd.grad(of_rows(MSE, z, teacher), z)[0]
    errors = []
    for temperature in (20.0, 200.0, 2000.0):
        loss = HintonLoss(type="hinton", temperature=temperature, soft_share=1.0)
        total = of_rows(loss, z, teacher)
        errors.append(float((torch.autograd.grad(total, z)[0] - limit).norm() / limit.norm()))
    assert errors[1] < 0.02
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert total.item() == pytest.approx(of_rows(MSE, z, teacher).item(), rel=0.01)


def test_small_shares_turn_skew_and_jsd_into_kl():
    z, teacher, q, p = two_rows(2)
    skew = lambda cls, name: of_rows(cls(type=name, skew=1e-7), z, teacher).item()  # noqa: E731
    assert skew(SkewForwardKLLoss, "skew_forward_kl") == pytest.approx(kl(p, q), rel=1e-5)
    assert skew(SkewReverseKLLoss, "skew_reverse_kl") == pytest.approx(kl(q, p), rel=1e-5)
    assert of_rows(JSDLoss(type="jsd", beta=1e-7), z, teacher).item() / 1e-7 == pytest.approx(kl(p, q), rel=1e-5)
    assert of_rows(JSDLoss(type="jsd", beta=1 - 1e-7), z, teacher).item() / 1e-7 == pytest.approx(kl(q, p), rel=1e-5)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.sampled_from([0.5, 3.0, 30.0]))
def test_bounds_and_symmetries(seed, share, sharp):
    z, teacher, *_ = two_rows(seed, sharp=sharp)
    at = lambda loss, first=z, second=teacher: of_rows(loss, first, second).item()  # noqa: E731
    for loss in PURE:
        assert at(loss) >= -1e-14
    for cls, name in ((SkewForwardKLLoss, "skew_forward_kl"), (SkewReverseKLLoss, "skew_reverse_kl")):
        assert at(cls(type=name, skew=share)) <= -math.log(share) + 1e-12
    half = JSDLoss(type="jsd", beta=0.5)
    assert at(half) <= LN2 + 1e-12
    assert at(half) == pytest.approx(at(half, teacher, z), rel=1e-9, abs=1e-14)
    assert at(TVD) <= 1.0 + 1e-12
    assert at(TVD) == pytest.approx(at(TVD, teacher, z), rel=1e-9, abs=1e-14)
    assert at(TVD) <= math.sqrt(max(0.0, min(at(FORWARD), at(REVERSE))) / 2) + 1e-9  # Pinsker
    assert at(MSE) == pytest.approx(at(MSE, teacher, z), rel=1e-9, abs=1e-14)
    # Swapping the models swaps the directions.
    assert at(FORWARD) == pytest.approx(at(REVERSE, teacher, z), rel=1e-9, abs=1e-14)
    low, high = sorted((at(FORWARD), at(REVERSE)))
    assert low - 1e-12 <= at(ADAPTIVE) <= high + 1e-12


@pytest.mark.parametrize("full", [True, False], ids=["full", "tail"])
@pytest.mark.parametrize("loss", PURE, ids=name_of)
def test_student_equal_to_teacher_is_a_fixed_point(loss, full):
    _, batch, teacher = make(8, full=full)
    # The very same numbers: the sign in the distance's gradient would see a difference in the last bit.
    logits = batch.teacher_logits if full else torch.tensor(np.log(teacher))
    logits = logits.clone().requires_grad_()
    total = value(loss, logits, batch)
    (gradient,) = torch.autograd.grad(total, logits)
    assert abs(total.item()) < 1e-13
    if full or loss is not TVD:
        assert gradient.abs().max().item() < 1e-13
    moved = logits.detach() + 0.1 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    assert value(loss, moved, batch).item() > 1e-5


# ------------------------------------------------------------------------------------------------ support and tail


@pytest.mark.parametrize("loss", ALL, ids=name_of)
def test_support_grows_to_the_full_rows(loss):
    logits, batch, _ = make(9, full=True, prompts=(1,), responses=(3,))
    whole = value(loss, logits, batch).item()
    by_width = []
    for width in range(1, VOCAB + 1):
        _, part, _ = make(9, width=width, prompts=(1,), responses=(3,))
        order = batch.teacher_logits[..., :VOCAB].argsort(-1, descending=True)[..., :width]
        rows = batch.teacher_logits[..., :VOCAB].log_softmax(-1)
        outside = rows.scatter(-1, order, -torch.inf).logsumexp(-1)
        part = replace(
            part,
            token_ids=batch.token_ids,
            support_ids=order,
            support_logprobs=rows.gather(-1, order),
            tail_logprobs=outside,
        )
        by_width.append(value(loss, logits, part).item())
    assert by_width[-1] == pytest.approx(whole, rel=1e-12)
    assert by_width[-2] == pytest.approx(whole, rel=1e-12)  # a tail of one id is exact as well
    if loss in F_DIVERGENCES:  # a coarser partition never raises an f-divergence
        assert all(low <= high + 1e-14 for low, high in itertools.pairwise(by_width))
        assert by_width[0] < whole - 1e-3


@pytest.mark.parametrize("loss", PURE, ids=name_of)
def test_mass_moved_out_of_the_support_is_punished(loss):
    """Reverse KL cut to the support is lowest, and negative, at q = p / e there; no loss may reward that move."""
    _, batch, teacher = make(10, width=2, prompts=(1,), responses=(1,))
    inside = batch.support_ids[0, 1]
    inside = inside[inside >= 0].numpy()
    q = teacher[0, 1].copy()
    q[inside] /= math.e
    rest = np.setdiff1d(np.arange(VOCAB), inside)
    q[rest] *= (1 - q[inside].sum()) / q[rest].sum()
    raw = float((q[inside] * np.log(q[inside] / teacher[0, 1][inside])).sum())
    assert raw < 0
    logits = torch.tensor(np.log(q)).repeat(1, batch.mask.shape[1], 1).requires_grad_()
    total = value(loss, logits, batch)
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.item() > 0.01
    assert gradient[0, 1, inside].sum().item() < 0  # descent brings the mass back


def test_the_tail_is_never_of_the_head():
    """A tail bucket of 80% of the mass stands for many unlikely ids."""
    tail_heavy = LossBatch(
        token_ids=torch.tensor([[0]]),
        mask=torch.tensor([[True]]),
        vocab_size=6,
        support_ids=torch.tensor([[[2, 4]]]),
        support_logprobs=torch.tensor([[[0.15, 0.05]]], dtype=torch.float64).log(),
        tail_logprobs=torch.tensor([[0.8]], dtype=torch.float64).log(),
    )
    rows = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.2, 0.4]], dtype=torch.float64).log()
    # Gaps: 0.05 and 0.15 in the head {2, 4}, 0.1 in the tail.
    assert head_share(buckets(rows, tail_heavy), 0.5).item() == pytest.approx(0.2 / 0.3)
    # At 0.15 the head is id 2 alone.
    assert head_share(buckets(rows, tail_heavy), 0.16).item() == pytest.approx(0.05 / 0.3)


def test_zero_teacher_mass_on_a_support_id():
    logits, batch, _ = make(11, width=3)
    never = batch.support_logprobs.clone()
    never[..., 0] = -torch.inf
    batch = replace(batch, support_logprobs=never)
    for loss in ALL:
        expected = loss.type not in ("reverse_kl", "adaptive_kl", "mse_logit")
        assert math.isfinite(value(loss, logits, batch).item()) == expected, loss.type


# ---------------------------------------------------------------------------------------------- several teachers


def test_weighted_teachers_equal_one_combined_teacher():
    """Reverse KL sees the normalised geometric mean, forward KL the arithmetic one."""
    z, *_ = two_rows(3)
    rng = np.random.default_rng(4)
    teachers = [torch.tensor(rng.normal(size=(1, 6))).log_softmax(-1) for _ in range(3)]
    weights = [0.5, 0.3, 0.2]
    geometric = sum(w * t for w, t in zip(weights, teachers, strict=True))
    log_z = geometric.logsumexp(-1).item()
    reverse = sum(w * of_rows(REVERSE, z, t) for w, t in zip(weights, teachers, strict=True))
    assert reverse.item() == pytest.approx(of_rows(REVERSE, z, geometric).item() - log_z, rel=1e-12)
    arithmetic = sum(w * t.exp() for w, t in zip(weights, teachers, strict=True)).log()
    forward = sum(w * of_rows(FORWARD, z, t) for w, t in zip(weights, teachers, strict=True))
    for several, one in (
        (reverse, of_rows(REVERSE, z, geometric)),
        (forward, of_rows(FORWARD, z, arithmetic)),
    ):
        torch.testing.assert_close(torch.autograd.grad(several, z)[0], torch.autograd.grad(one, z)[0], rtol=0, atol=1e-13)


# ----------------------------------------------------------------------------------------------- the sampled token


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_sampled_forward_kl_has_the_mean_of_forward_kl(alpha):
    """Over all tokens that the mixture can draw, with weights that another student's mixture recorded."""
    z, _, q, p = two_rows(5)
    drew = softmax(np.random.default_rng(6).normal(size=6))
    m = alpha * p + (1 - alpha) * drew
    mean = torch.zeros((), dtype=torch.float64)
    for token in range(6):
        batch = LossBatch(
            token_ids=torch.tensor([[token]]),
            mask=torch.tensor([[True]]),
            vocab_size=6,
            teacher_logprobs=torch.tensor([[math.log(p[token])]], dtype=torch.float64),
            mixture_logprobs=torch.tensor([[math.log(m[token])]], dtype=torch.float64),
        )
        drawn = value(SAMPLED, z[None], batch)
        if alpha == 1.0:
            assert drawn.item() == pytest.approx(math.log(p[token] / q[token]), rel=1e-12)
        mean = mean + m[token] * drawn
    assert mean.item() == pytest.approx(kl(p, q), rel=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(mean, z)[0][0].numpy(), q - p, atol=1e-13)


def test_sampled_forward_kl_reports_the_unweighted_log_ratio():
    logits, batch, _ = make(12, prompts=(1, 2), responses=(3, 2))
    rows = logits[batch.mask][:, :VOCAB].log_softmax(-1)
    of_tokens = rows.gather(-1, batch.token_ids[batch.mask][:, None])[:, 0]
    sums = loss_function(SAMPLED)(logits, batch, SAMPLED).sums
    assert set(sums) == {"log_ratio"}
    torch.testing.assert_close(sums["log_ratio"], (batch.teacher_logprobs[batch.mask] - of_tokens).sum().detach())


def test_sampled_forward_kl_gradcheck():
    logits, batch, _ = make(12, prompts=(1,), responses=(2,))
    assert torch.autograd.gradcheck(lambda z: value(SAMPLED, z, batch), (logits.requires_grad_(),))


# ---------------------------------------------------------------------------------------------- dtypes, errors, names


@pytest.mark.parametrize("full", [True, False], ids=["full", "tail"])
@pytest.mark.parametrize("loss", [*ALL, SAMPLED], ids=name_of)
def test_padding_columns_garbage_and_half_precision(loss, full):
    logits, batch, _ = make(13, full=full)
    half = logits.to(torch.bfloat16)
    exact = value(loss, half.double(), batch).item()
    half[..., VOCAB:] = 50.0
    half[~batch.mask] = torch.nan
    if full:
        loud = batch.teacher_logits.masked_fill(~batch.mask[..., None], torch.nan)
        loud[..., VOCAB:] = 50.0
        batch = replace(batch, teacher_logits=loud.requires_grad_())
    half.requires_grad_()
    output = loss_function(loss)(half, batch, loss)
    output.total.backward()
    assert output.total.dtype == torch.float32
    assert output.total.item() == pytest.approx(exact, rel=1e-5, abs=1e-6)
    assert half.grad.dtype == torch.bfloat16
    assert torch.isfinite(half.grad).all()
    assert (half.grad[~batch.mask] == 0).all()
    assert (half.grad[..., VOCAB:] == 0).all()
    assert half.grad.abs().max() > 0
    if full:
        assert batch.teacher_logits.grad is None


def test_errors_name_what_is_missing():
    logits, batch, _ = make(14, full=True)
    short = replace(batch, teacher_logits=batch.teacher_logits[..., : VOCAB - 1])
    with pytest.raises(VocabError, match=r"teacher's logits have 6 columns .* 7 ids"):
        value(FORWARD, logits, short)
    rows = logits[0, :, :VOCAB].log_softmax(-1)
    with pytest.raises(TrainingError, match=r"soft_share=0.7 .* token_ids"):
        divergence_of(HINTON)(full_rows(rows, rows))


def test_every_registered_loss_has_its_maths():
    # Losses of other distributions may be loaded, too: by other tests.
    kinds = [kind for kind in LOSSES.known() if kind.__module__ == "kdray.config.losses"]
    assert len(kinds) == 16
    for kind in kinds:
        assert callable(loss_function(kind.model_validate({"type": type_of(kind)})))
    divergences = [kind for kind in kinds if kind.divergence]
    assert {type_of(kind) for kind in divergences} == {loss.type for loss in ALL}
    for kind in divergences:
        logits, batch, _ = make(15)
        assert value(kind.model_validate({"type": type_of(kind)}), logits, batch).item() > 0


# ------------------------------------------------------------------------------------------------------ invariances


@settings(max_examples=40)
@given(st.data())
def test_padding_order_and_split_change_nothing(data):
    """Any order of rows, any split, any padding on either side: the same sums and, row by row, the same gradient."""
    loss = data.draw(st.sampled_from([*ALL, SAMPLED]), label="loss")
    full = data.draw(st.booleans(), label="full")
    rows = data.draw(st.integers(1, 4), label="rows")
    prompts = data.draw(st.lists(st.integers(1, 3), min_size=rows, max_size=rows), label="prompts")
    responses = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows), label="responses")
    logits, batch, _ = make(16, full=full, prompts=prompts, responses=responses)
    whole = logits.clone().requires_grad_()
    expected = loss_function(loss)(whole, batch, loss)
    expected.total.backward()

    order = data.draw(st.permutations(range(rows)), label="order")
    cuts = sorted(data.draw(st.sets(st.integers(1, max(rows - 1, 1))), label="cuts"))
    total, sums, seen = 0.0, dict.fromkeys(expected.sums, 0.0), torch.zeros_like(logits)
    for part in np.split(np.array(order), [cut for cut in cuts if cut < rows]):
        left, right = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)), label="padding")
        index = torch.tensor(part)
        padded = {}
        for name, column in vars(batch).items():
            if isinstance(column, torch.Tensor):
                edge = column.new_zeros((len(part), 1, *column.shape[2:]))
                sides = [edge.repeat_interleave(count, 1) for count in (left, right)]
                padded[name] = torch.cat([sides[0], column[index], sides[1]], 1)
        z = torch.nn.functional.pad(logits[index], (0, 0, left, right)).requires_grad_()
        output = loss_function(loss)(z, replace(batch, **padded), loss)
        output.total.backward()
        seen[index] = z.grad[:, left : left + logits.shape[1]]
        total += output.total.item()
        for name, partial in output.sums.items():
            sums[name] += float(partial)
    assert total == pytest.approx(expected.total.item(), rel=1e-11, abs=1e-12)
    assert sums == pytest.approx({name: float(item) for name, item in expected.sums.items()}, rel=1e-11, abs=1e-12)
    torch.testing.assert_close(seen, whole.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", [*F_DIVERGENCES, ADAPTIVE], ids=lambda loss: loss.type)
def test_an_id_that_both_models_mask_counts_nothing(loss):
    """Such as ids that no text has, set to -inf in both heads: value and gradient are those without the id."""
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 6, generator=random, dtype=torch.float64) for _ in range(2))
    values, gradients = [], []
    for masked in (False, True):
        logits, other = student.clone(), teacher.clone()
        if masked:
            logits, other = (torch.cat([each, torch.full((3, 1), -torch.inf)], dim=-1) for each in (logits, other))
        logits.requires_grad_()
        value = divergence_of(loss)(full_rows(other.log_softmax(-1), logits.log_softmax(-1)))
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), logits)[0])
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1][:, :6], gradients[0])
    assert (gradients[1][:, 6] == 0).all()


def test_kl_terms_of_nothing_are_nothing():
    nothing = torch.tensor([-torch.inf, -torch.inf, 0.0], dtype=torch.float64)
    assert kl_terms(nothing, torch.tensor([-torch.inf, -1.0, -torch.inf], dtype=torch.float64)).tolist() == [
        0.0,
        0.0,
        torch.inf,
    ]
