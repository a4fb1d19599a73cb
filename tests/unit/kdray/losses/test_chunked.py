"""Divergences out of hidden states: the same numbers as with all logits at hand, and never all logits at hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from cluster.diagnosis.meter import Storages
from kdray.config import (
    AdaptiveKLLoss,
    ForwardKLLoss,
    HintonLoss,
    JSDLoss,
    MSELogitLoss,
    ReverseKLLoss,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    TVDLoss,
)
from kdray.config.losses import LOSSES
from kdray.config.registry import name_of
from kdray.errors import TrainingError, VocabError
from kdray.losses import chunked_divergence, divergence_of
from kdray.losses.support import full_rows

torch.set_num_threads(1)

FORWARD = ForwardKLLoss(type="forward_kl")
HINTON = HintonLoss(type="hinton", temperature=2.0, soft_share=0.6)
ALL = [
    FORWARD,
    ReverseKLLoss(type="reverse_kl"),
    JSDLoss(type="jsd", beta=0.3),
    SkewForwardKLLoss(type="skew_forward_kl"),
    SkewReverseKLLoss(type="skew_reverse_kl"),
    TVDLoss(type="tvd"),
    AdaptiveKLLoss(type="adaptive_kl"),
    MSELogitLoss(type="mse_logit"),
    HINTON,
]
VOCAB = 11
LEAVES = ("student_hidden", "student_head", "student_bias")


def make(num_rows=7, dtype=torch.float64, vocab=VOCAB, padding=(2, 3), widths=(4, 6), seed=0):
    """Arguments of `chunked_divergence` by name; the student's are leaves that ask for a gradient."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)  # noqa: E731
    sizes = [vocab + extra for extra in padding]
    tensors = {
        "student_hidden": draw(num_rows, widths[0]),
        "student_head": draw(sizes[0], widths[0]),
        "student_bias": draw(sizes[0]),
        "teacher_hidden": draw(num_rows, widths[1]),
        "teacher_head": draw(sizes[1], widths[1]),
        "teacher_bias": draw(sizes[1]),
    }
    for name in LEAVES:
        tensors[name].requires_grad_()
    return tensors | {"token_ids": torch.randint(vocab, (num_rows,), generator=random), "vocab_size": vocab}


def naive(arguments, loss):
    """The same sum with every logit in memory at once, by plain autograd."""
    vocab = arguments["vocab_size"]
    rows = [
        linear(arguments[f"{owner}_hidden"], arguments[f"{owner}_head"], arguments[f"{owner}_bias"])[:, :vocab]
        for owner in ("teacher", "student")
    ]
    wide = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    teacher, student = (part.to(wide).log_softmax(-1) for part in rows)
    return divergence_of(loss)(full_rows(teacher, student, arguments["token_ids"])).sum()


def chunked(arguments, loss, chunk_rows=3):
    return chunked_divergence(divergence=divergence_of(loss), chunk_rows=chunk_rows, **arguments)


def gradients(total, arguments, names=LEAVES):
    return torch.autograd.grad(total, [arguments[name] for name in names])


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.type)
def test_equals_the_naive_one_gradients_included(loss, chunk_rows):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        arguments = make(dtype=dtype)
        total, expected = chunked(arguments, loss, chunk_rows), naive(arguments, loss)
        assert total.dtype == dtype
        assert total.item() == pytest.approx(expected.item(), rel=tolerance)
        # A scale that comes in from above reaches every gradient.
        for got, want in zip(gradients(-2.5 * total, arguments), gradients(-2.5 * expected, arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_all_divergences_are_tried():
    assert {loss.type for loss in ALL} == {
        name_of(kind) for kind in LOSSES.known() if kind.divergence and kind.__module__ == "kdray.config.losses"
    }


@pytest.mark.parametrize("loss", [loss for loss in ALL if loss.type != "adaptive_kl"], ids=lambda loss: loss.type)
def test_gradcheck(loss):
    arguments = make(num_rows=3, vocab=5, padding=(1, 0), widths=(2, 3))

    def total(*leaves):
        return chunked(arguments | dict(zip(LEAVES, leaves, strict=True)), loss, chunk_rows=2)

    assert torch.autograd.gradcheck(total, [arguments[name] for name in LEAVES])


def test_without_biases_and_with_parts_frozen():
    arguments = make() | {"student_bias": None, "teacher_bias": None}
    for names in (("student_hidden",), ("student_head",), ("student_hidden", "student_head")):
        part = {
            name: item.detach().requires_grad_(name in names)
            if isinstance(item, torch.Tensor) and item.is_floating_point()
            else item
            for name, item in arguments.items()
        }
        for got, want in zip(
            gradients(chunked(part, FORWARD), part, names), gradients(naive(part, FORWARD), part, names), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_nothing_reaches_the_teacher_and_padding_gets_zero():
    arguments = make()
    for name in ("teacher_hidden", "teacher_head", "teacher_bias"):
        arguments[name].requires_grad_()
    loud = arguments | {"student_head": arguments["student_head"].detach().clone()}
    loud["student_head"][VOCAB:] = 50.0
    loud["student_head"].requires_grad_()
    total = chunked(loud, FORWARD)
    total.backward()
    assert total.item() == chunked(arguments, FORWARD).item()
    assert loud["teacher_hidden"].grad is None
    assert loud["teacher_head"].grad is None
    assert loud["teacher_bias"].grad is None
    assert (loud["student_head"].grad[VOCAB:] == 0).all()
    assert loud["student_head"].grad[:VOCAB].abs().max() > 0


def test_without_gradients_the_value_is_the_same():
    arguments = make()
    with torch.no_grad():
        total = chunked(arguments, HINTON)
    assert not total.requires_grad
    assert total.item() == chunked(arguments, HINTON).item()


def test_no_rows_give_a_gradient_of_zeros():
    arguments = make(num_rows=0)
    total = chunked(arguments, FORWARD)
    assert total.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(total, arguments))


def test_bfloat16_is_summed_in_float32():
    """Head gradients of many small chunks: added up in bfloat16 they would lose whole percents."""
    arguments = make(num_rows=600, dtype=torch.bfloat16)
    total = chunked(arguments, FORWARD, chunk_rows=1)
    assert total.dtype == torch.float32
    plain = naive(arguments, FORWARD)
    assert total.item() == pytest.approx(plain.item(), rel=1e-5)
    exact = {
        name: item.detach().double().requires_grad_() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for name, item in arguments.items()
    }
    for got, want in zip(gradients(total, arguments), gradients(naive(exact, FORWARD), exact), strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - want).norm() / want.norm()).item() < 0.006


@settings(max_examples=25)
@given(st.data())
def test_order_and_split_change_nothing(data):
    loss = data.draw(st.sampled_from(ALL), label="loss")
    num_rows = data.draw(st.integers(1, 8), label="rows")
    arguments = make(num_rows=num_rows)
    expected = chunked(arguments, loss, data.draw(st.integers(1, 9), label="chunk"))
    order = torch.tensor(data.draw(st.permutations(range(num_rows)), label="order"))
    cut = data.draw(st.integers(0, num_rows), label="cut")
    total = torch.zeros((), dtype=torch.float64)
    for part in (order[:cut], order[cut:]):
        rows = {name: arguments[name][part] for name in ("student_hidden", "teacher_hidden", "token_ids")}
        total = total + chunked(arguments | rows, loss, data.draw(st.integers(1, 9), label="chunk"))
    assert total.item() == pytest.approx(expected.item(), rel=1e-11)
    for got, want in zip(gradients(total, arguments), gradients(expected, arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_errors_name_what_is_wrong():
    arguments = make()
    with pytest.raises(VocabError, match=r"teacher's logits have 14 columns .* 99 ids"):
        chunked(arguments | {"student_head": torch.zeros(99, 4), "vocab_size": 99}, FORWARD)
    with pytest.raises(VocabError, match=r"student's logits have 13 columns .* 14 ids"):
        chunked(arguments | {"vocab_size": 14}, FORWARD)
    with pytest.raises(TrainingError, match="7 positions of the student but 6 of the teacher"):
        chunked(arguments | {"teacher_hidden": arguments["teacher_hidden"][1:]}, FORWARD)
    with pytest.raises(TrainingError, match="chunk_rows=-1"):
        chunked(arguments, FORWARD, chunk_rows=-1)
    with pytest.raises(TrainingError, match="token_ids"):
        chunked(arguments | {"token_ids": None}, HINTON)


# --------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.type)
def test_memory_is_that_of_a_chunk(loss):
    num_rows, vocab, chunk_rows = 64, 1000, 4
    arguments = make(num_rows=num_rows, vocab=vocab, dtype=torch.float32, padding=(0, 0), widths=(3, 3))
    sizes = {}
    for name, total in (("naive", lambda: naive(arguments, loss)), ("chunked", lambda: chunked(arguments, loss, chunk_rows))):
        with Storages() as sizes[name]:
            total().backward()
    # The counter does count: the naive way holds rows x vocabulary, several times.
    assert sizes["naive"].largest >= num_rows * vocab * 4
    assert sizes["naive"].peak >= 4 * num_rows * vocab * 4
    # No tensor beyond a chunk (sorting makes int64 ids), and no chunk kept for later.
    assert sizes["chunked"].largest <= chunk_rows * vocab * 8
    assert sizes["chunked"].peak <= sizes["naive"].peak / 8
