"""Losses inside the output head: the numbers of all logits, in the memory of a chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from cluster.diagnosis.meter import Storages
from kdray.config import (
    ForwardKLSampledLoss,
    LMOpsLoss,
    LossSettings,
    MiniLLMLoss,
    PerDecisionLoss,
    PretrainingSettings,
    ReverseKLLoss,
    TrainingSettings,
    VOPDLoss,
)
from kdray.errors import TrainingError, VocabError
from kdray.losses import LossBatch, LossOutput, Objective, Whitening, chunked_loss
from kdray.losses.support import Buckets, buckets, logits_gradient
from tests.support.loss_batches import built_in_losses, loss_batch

torch.set_num_threads(1)

VOCAB, PADDING, WIDTH = 11, 3, 5
VARIANTS: list[LossSettings] = [
    MiniLLMLoss(single_step=False, staleness="mask", length_norm=False),
    MiniLLMLoss(whitening=True),
    LMOpsLoss(type="lmops", whitening=False, clip=None),
    PerDecisionLoss(type="per_decision", horizon=1),
    VOPDLoss(type="vopd", gamma=0.7),
    MiniLLMLoss(reward_weight=0.6),
    PerDecisionLoss(type="per_decision", horizon=2, reward_weight=0.6),
    LMOpsLoss(type="lmops", reward_weight=0.6, distillation_weight=0.3),
]


def objective(settings: LossSettings | None) -> Objective:
    return Objective.of(settings, Whitening(0.3, 1.7) if settings is not None and settings.whitens else None)


def text(share: float) -> Objective:
    return Objective.of_text(PretrainingSettings.model_validate({"source": {"type": "task"}, "teacher_share": share}))


OBJECTIVES = {
    **{each.type: objective(each) for each in built_in_losses()},
    **{f"{each.type} {number}": objective(each) for number, each in enumerate(VARIANTS)},
    "reverse_kl rewarded": objective(ReverseKLLoss(type="reverse_kl", reward_weight=0.6)),
    "supervised": objective(None),
    "text": text(0.0),
    "text with a teacher": text(0.5),
}
of_every_loss = pytest.mark.parametrize("loss", OBJECTIVES.values(), ids=OBJECTIVES)


def leaves(num_tokens: int, dtype: torch.dtype = torch.float64, vocab: int = VOCAB + PADDING, width: int = WIDTH) -> list[Any]:
    """Hidden states, head and bias, which ask for a gradient."""
    random = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    return [draw(num_tokens, width), draw(vocab, width), draw(vocab)]


def capped(products: torch.Tensor) -> torch.Tensor:
    return 3.0 * torch.tanh(products / 3.0)


def plain(given: list[Any], batch: LossBatch, loss: Objective, after: Callable[..., torch.Tensor]) -> LossOutput:
    """All logits at once, by autograd."""
    logits = after(linear(*given))
    placed = logits.new_full((*batch.mask.shape, logits.shape[-1]), torch.nan).masked_scatter(batch.mask.unsqueeze(-1), logits)
    return loss.of_logits(placed, batch)


def compare(found: LossOutput, want: LossOutput, given: list[Any], tolerance: float) -> None:
    torch.testing.assert_close(found.total, want.total, rtol=tolerance, atol=tolerance)
    assert found.sums.keys() == want.sums.keys()
    for name, value in want.sums.items():
        torch.testing.assert_close(found.sums[name], value, rtol=tolerance, atol=tolerance, msg=name)
    # A scale that comes in from above reaches every gradient.
    pairs = zip(*(torch.autograd.grad(-2.5 * each.total, given) for each in (found, want)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@of_every_loss
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("after", [lambda products: products, capped], ids=["plain", "capped"])
def test_value_sums_and_gradients_are_those_of_all_logits(
    loss: Objective, chunk_rows: int, after: Callable[..., torch.Tensor]
) -> None:
    batch = loss_batch(4, 9, VOCAB)
    given = leaves(int(batch.mask.sum()))
    found = chunked_loss(*given, batch, loss, chunk_rows, after)
    compare(found, plain(given, batch, loss, after), given, 1e-11)
    assert found.total.dtype == torch.float64
    _, of_head, of_bias = torch.autograd.grad(chunked_loss(*given, batch, loss, chunk_rows, after).total, given)
    assert (of_head[VOCAB:] == 0).all(), "padding of the embedding"
    assert (of_bias[VOCAB:] == 0).all(), "padding of the embedding"
    assert of_head[:VOCAB].abs().max() > 0


def test_parts_of_buckets_join_to_the_whole() -> None:
    batch = loss_batch(4, 9, VOCAB)
    rows = torch.randn(int(batch.mask.sum()), VOCAB, dtype=torch.float64).log_softmax(-1)
    whole = buckets(rows, batch)
    parts = [whole.part(slice(0, 5)), whole.part(slice(5, 6)), whole.part(slice(6, None))]
    assert [len(part.teacher) for part in parts[:2]] == [5, 1]
    joined = Buckets.joined(parts)
    for name in ("teacher", "student", "present", "token_logprobs"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert joined.has_tail
    full = replace(whole, has_tail=False, token_logprobs=None)
    again = Buckets.joined([full.part(slice(0, 5)), full.part(slice(5, None))])
    assert not again.has_tail
    assert again.token_logprobs is None


@of_every_loss
def test_in_float32(loss: Objective) -> None:
    batch = loss_batch(4, 9, VOCAB, dtype=torch.float32)
    given = leaves(int(batch.mask.sum()), torch.float32)
    compare(chunked_loss(*given, batch, loss, 4), plain(given, batch, loss, lambda products: products), given, 1e-5)


@of_every_loss
def test_in_bfloat16_gradients_are_as_good_as_those_of_all_logits(loss: Objective) -> None:
    """Logits are rounded to 8 bits in both; the head's gradient over many chunks is not rounded at each."""
    batch = loss_batch(12, 60, VOCAB, dtype=torch.float32)
    given = leaves(int(batch.mask.sum()), torch.bfloat16)
    exact = [each.detach().double().requires_grad_() for each in given]
    want = torch.autograd.grad(plain(exact, batch, loss, lambda products: products).total, exact)
    errors = []
    for output in (chunked_loss(*given, batch, loss, 4), plain(given, batch, loss, lambda products: products)):
        found = torch.autograd.grad(output.total, given)
        errors.append([float((got.double() - each).norm() / each.norm()) for got, each in zip(found, want, strict=True)])
    for chunked, whole in zip(*errors, strict=True):
        assert chunked < max(1.2 * whole, 0.01)
        assert chunked < 0.1


@of_every_loss
def test_a_batch_without_tokens_has_the_same_sums_at_zero(loss: Objective) -> None:
    """Ranks add their sums by name."""
    batch = loss_batch(2, 6, VOCAB)
    nothing = replace(batch, mask=torch.zeros_like(batch.mask))
    given = leaves(0)
    found = chunked_loss(*given, nothing, loss, 4)
    full = leaves(int(batch.mask.sum()))
    assert found.sums.keys() == chunked_loss(*full, batch, loss, 4).sums.keys()
    assert float(found.total.detach()) == 0.0
    assert all(float(value) == 0.0 for value in found.sums.values())
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(found.total, given))


def test_without_a_gradient_the_value_is_the_same() -> None:
    batch = loss_batch(4, 9, VOCAB)
    given = leaves(int(batch.mask.sum()))
    for loss in (OBJECTIVES["minillm"], OBJECTIVES["jsd"], OBJECTIVES["uld"]):
        with torch.no_grad():
            total = chunked_loss(*given, batch, loss, 4).total
        assert not total.requires_grad
        assert total.item() == pytest.approx(chunked_loss(*given, batch, loss, 4).total.item(), rel=1e-14)


def test_chunks_none_of_whose_tokens_counts_give_no_gradient() -> None:
    """Chunks without an aligned token, between others."""
    batch = loss_batch(1, 14, VOCAB)
    assert batch.support_ids is not None
    assert batch.tail_logprobs is not None
    ids = batch.support_ids.clone()
    ids[:, 5:9] = -1
    loss, given = OBJECTIVES["uld"], leaves(int(batch.mask.sum()))
    compare(
        chunked_loss(*given, replace(batch, support_ids=ids), loss, 2),
        plain(given, replace(batch, support_ids=ids), loss, lambda products: products),
        given,
        1e-11,
    )


@pytest.mark.parametrize("width", [1, 4, VOCAB])
def test_the_gradient_in_the_logits_is_that_of_autograd(width: int) -> None:
    """Also where the support covers all ids, so that there is no tail, and where the tail's mass underflows."""
    batch = loss_batch(2, 8, VOCAB, width)
    packed = batch.packed()
    logits = torch.randn(1, packed.mask.numel(), VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # Almost all of the mass at one id of the support, e^-800 of it outside.
    ids = packed.masked("support_ids")[0]
    logits[0, 0] -= 800.0
    logits[0, 0, ids[ids >= 0]] += 800.0
    logits.requires_grad_()
    rows = packed.masked_rows(logits)
    both = buckets(rows, packed)
    assert both.token_logprobs is not None
    random = torch.Generator().manual_seed(3)
    of_student = torch.randn(both.student.shape, generator=random, dtype=torch.float64)
    of_tokens = torch.randn(len(rows), generator=random, dtype=torch.float64)
    (want,) = torch.autograd.grad([both.student, both.token_logprobs], logits, [of_student, of_tokens])
    found = logits_gradient(rows.detach().clone(), both, packed, of_student, of_tokens)
    torch.testing.assert_close(found, want[0], rtol=1e-12, atol=1e-13)
    assert torch.isfinite(found).all()


def test_errors_name_what_is_wrong() -> None:
    batch = loss_batch(2, 6, VOCAB)
    given = leaves(int(batch.mask.sum()))
    loss = OBJECTIVES["minillm"]
    with pytest.raises(TrainingError, match="chunk_rows=0"):
        chunked_loss(*given, batch, loss, 0)
    with pytest.raises(VocabError, match=r"student's logits have 14 columns .* 15 ids"):
        chunked_loss(*given, replace(batch, vocab_size=15), loss)
    with pytest.raises(TrainingError, match=r"3 hidden states for \d+ masked tokens"):
        chunked_loss(given[0][:3], *given[1:], batch, loss)
    with pytest.raises(TrainingError, match="reads whole logits"):
        chunked_loss(*given, batch, Objective("logits", loss.of_logits))
    with pytest.raises(TrainingError, match="reads whole logits"):
        chunked_loss(*given, replace(batch, teacher_logits=torch.zeros(2, 6, VOCAB)), loss)
    with pytest.raises(TrainingError, match="no column support_ids"):
        chunked_loss(*given, replace(batch, support_ids=None), loss)


def test_losses_say_what_they_read() -> None:
    """A loss of kdray that reads whole logits would undo the promise of `training.loss_chunk_tokens`."""
    assert all(each.in_chunks for each in built_in_losses())
    assert {name for name, each in OBJECTIVES.items() if each.reads == "buckets"} == {
        *("minillm", "lmops", "per_decision", "vopd"),
        *(f"{each.type} {number}" for number, each in enumerate(VARIANTS)),
    }
    assert not LossSettings.model_construct(type="of a stranger").in_chunks


# --------------------------------------------------------------------------------------------------------- memory

UNITS = 12
"""Rows of a chunk in float32 that may exist at once, as a promise."""


def peak(loss: Objective, rows: int, vocab: int, chunk_rows: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Bytes of new tensors at once in forward and backward, and without what does not depend on chunks."""
    batch = loss_batch(rows, 17, vocab, dtype=torch.float32)
    given = leaves(int(batch.mask.sum()), dtype, vocab, width=4)
    with Storages().known(given) as meter:
        chunked_loss(*given, batch, loss, chunk_rows).total.backward()
    # Gradients in the accumulator's precision, in their own, and scaled.
    fixed = sum(3 * each.numel() * 4 for each in given)
    columns = sum(column.nbytes for column in vars(batch).values() if isinstance(column, torch.Tensor))
    return meter.peak, meter.peak - fixed - 3 * columns


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [(name, torch.float32) for name in OBJECTIVES] + [(name, torch.bfloat16) for name in ("minillm", "jsd", "uld", "text")],
)
def test_memory_is_that_of_a_chunk(loss: str, dtype: torch.dtype) -> None:
    few, few_chunk = peak(OBJECTIVES[loss], 4, 10_000, 4, dtype)
    many, many_chunk = peak(OBJECTIVES[loss], 16, 10_000, 4, dtype)
    chunk = 4 * 10_000 * 4
    assert max(few_chunk, many_chunk) <= UNITS * chunk
    # All logits of 150 more tokens would be 37 chunks.
    assert many - few < 0.6 * chunk, "only their columns and states are more"
    _, wide_chunk = peak(OBJECTIVES[loss], 4, 10_000, 16, dtype)
    assert wide_chunk > 2.5 * few_chunk, "the meter does see the chunk"


def test_all_logits_take_memory_for_all_tokens() -> None:
    """What the meter finds without chunks."""
    batch = loss_batch(4, 33, 3000, dtype=torch.float32)
    given = leaves(int(batch.mask.sum()), torch.float32, 3000, width=4)
    with Storages().known(given) as meter:
        plain(given, batch, OBJECTIVES["minillm"], lambda products: products).total.backward()
    assert meter.peak > 5 * len(given[0]) * 3000 * 4


def test_the_default_chunk_follows_the_vocabulary() -> None:
    assert TrainingSettings().chunk_tokens(32_000) == 1048
    assert TrainingSettings().chunk_tokens(152_000) == 220
    assert TrainingSettings(loss_chunk_tokens=64).chunk_tokens(152_000) == 64
    assert TrainingSettings().chunk_tokens(2**26) == 1


@pytest.mark.parametrize(
    "loss",
    [
        Objective.of(MiniLLMLoss()),
        objective(built_in_losses()[1]),
        Objective.of(ForwardKLSampledLoss(type="forward_kl_sampled")),
    ],
    ids=["buckets", "divergence", "tokens"],
)
def test_the_gap_to_the_sampler_is_that_of_the_tokens_of_the_trained_version(loss: Objective) -> None:
    batch = loss_batch(4, 9, VOCAB)
    given = leaves(int(batch.mask.sum()))
    with torch.no_grad():
        rows = linear(*given)[:, :VOCAB].log_softmax(-1)
    assert batch.group is not None
    assert batch.student_logprobs is not None
    fresh = batch.group[batch.mask] == 0
    gaps = rows.gather(-1, batch.token_ids[batch.mask].unsqueeze(-1)).squeeze(-1) - batch.student_logprobs[batch.mask]
    for found in (chunked_loss(*given, batch, loss, 4), plain(given, batch, loss, lambda products: products)):
        torch.testing.assert_close(found.sums["rollout_gap"], gaps[fresh].abs().sum())
        assert int(found.sums["rollout_gap_tokens"]) == int(fresh.sum()) > 0
    same = batch.student_logprobs.masked_scatter(batch.mask, batch.student_logprobs[batch.mask] + gaps)
    assert float(chunked_loss(*given, replace(batch, student_logprobs=same), loss, 4).sums["rollout_gap"]) < 1e-12
    bare = chunked_loss(*given, replace(batch, group=None), loss, 4).sums
    assert "rollout_gap" not in bare
