"""Checks that a teacher's answers carry a signal and that the run's loss reads it, made before the first step.

A loss that is always zero, or a teacher whose rows are uninformative, looks like training for hours. The checked rollouts went
through the real path: sampled and scored by the replicas, sent as Arrow, batched, and given to the run's loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kdray.config.losses import LossSettings
from kdray.errors import SignalError
from kdray.losses import LossBatch, loss_function
from kdray.losses.batch import log_rows
from kdray.losses.support import buckets
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.columns import scored_columns, values_of
from kdray.types import Rollout

_MASS_TOLERANCE = 2e-3
"""Support and tail of float32 rows sum to 1 up to rounding; so do half-precision rows, which are normalised in float32."""
_UNIFORM_TOLERANCE = 1e-3
"""A row whose most likely id is within this distance of 1 / vocabulary, in nats, counts as uniform."""
_CONSTANT_TOLERANCE = 1e-4
"""Rows after different prefixes that differ by less than this, in nats, count as independent of the prefix."""
_ZERO = 1e-3
"""Largest loss and gradient per token of a student that equals the teacher; rounding alone gives about 1e-6."""


def check_rows(rollouts: Sequence[Rollout], vocab_size: int) -> dict[str, float]:
    """Check what a teacher recorded for the rollouts. Raises: SignalError naming the teacher and the fault.

    Returns: `tokens`, and `top_prob`, the mean probability of the teacher's most likely id.
    """
    teacher = rollouts[0].teacher
    logprobs, support, tail, ids = (
        _stacked(rollouts, name) for name in ("teacher_logprobs", "support_logprobs", "tail_logprobs", "support_ids")
    )
    if not len(logprobs):
        raise SignalError(f"teacher {teacher}: none of {len(rollouts)} test rollouts has a token; look at its stop ids")
    bad = ~np.isfinite(logprobs) | np.isnan(support).any(-1) | np.isnan(tail) | (logprobs > _MASS_TOLERANCE)
    if bad.any():
        raise SignalError(
            f"teacher {teacher}: {int(bad.sum())} of {len(bad)} test tokens have no valid log p (for example "
            f"{float(logprobs[bad][0]):g}); its weights or its dtype are broken: try teachers.{teacher}.dtype=float32"
        )
    mass = np.exp(support.astype(np.float64)).sum(-1) + np.exp(tail.astype(np.float64))
    worst = float(mass[np.abs(mass - 1.0).argmax()])
    if abs(worst - 1.0) > _MASS_TOLERANCE:
        raise SignalError(f"teacher {teacher}: support and tail of a row sum to {worst:g}, not 1")
    top = support.max(-1)
    if (top < -np.log(vocab_size) + _UNIFORM_TOLERANCE).mean() > 0.5:
        raise SignalError(
            f"teacher {teacher}: its rows are uniform (the most likely of {vocab_size} ids has probability "
            f"{float(np.exp(top.mean())):.3g}): it was never trained, or its output head was not loaded; "
            f"look at teachers.{teacher}.model"
        )
    # Slots used at every position hold the teacher's own top ids; the student's follow.
    width = int((ids >= 0).all(0).cumprod().sum())
    same_logprobs = (np.abs(support[:, :width] - support[0, :width]) < _CONSTANT_TOLERANCE).all()
    if len(ids) > 1 and same_logprobs and (ids[:, :width] == ids[0, :width]).all():
        raise SignalError(
            f"teacher {teacher}: its row is the same after all {len(ids)} test prefixes: it does not read its input; "
            f"look at teachers.{teacher}.model"
        )
    return {"tokens": float(len(logprobs)), "top_prob": float(np.exp(top).mean())}


def prefill_tolerance(dtype: str) -> float:
    """Largest mean distance of decoding from prefill that is rounding, nats a token, in an engine of this dtype.

    Half-precision kernels round each layer in their own way; float32 ones differ only in the order of summation.
    """
    return 1e-3 if dtype == "float32" else 0.25


def check_prefill(sampled: Sequence[Rollout], scored: Sequence[Rollout], tolerance: float) -> float:
    """Largest mean distance between decoded and prefilled log p of a rollout, nats. Raises: SignalError above `tolerance`."""
    by_id = {rollout.sample_id: rollout for rollout in scored}
    gaps = []
    for rollout in sampled:
        decoded, prefilled = rollout.teacher_logprobs, by_id[rollout.sample_id].teacher_logprobs
        assert decoded is not None
        if len(decoded):
            gaps.append(float(np.abs(decoded - prefilled).mean()))
    worst = max(gaps)
    if worst > tolerance:
        raise SignalError(
            f"teacher {sampled[0].teacher}: log p of the same tokens differs by {worst:.3g} nats between decoding and prefill "
            f"(allowed {tolerance:g}): its engine cannot be trusted; try teachers.{sampled[0].teacher}.dtype=float32"
        )
    return worst


def check_loss(rollouts: Sequence[Rollout], settings: LossSettings, alpha: float, vocab_size: int) -> dict[str, float]:
    """Evaluate the run's loss on two students built from the teacher's rows: the teacher itself, and a mixture with uniform.

    The first must have zero loss and zero gradient, the second a positive divergence and gradient. Only terms that vanish at
    the teacher count, so hard labels and whitening are left out. A loss without such terms returns an empty result, whatever
    columns the rollouts have.
    Returns: `loss_equal`, `divergence_perturbed`, `gradient_perturbed`, per token. Raises: SignalError if one is not as
    expected.
    """
    # Recorded responses have no reward; without it, the loss is the whole one, however little of it the run takes.
    soft = settings.model_copy(update={"reward_weight": 0.0, "distillation_weight": 1.0}).soft_part()
    if soft is None:
        return {}
    batch = rollouts_to_batch(rollouts, step=1)
    tokens = batch.num_target_tokens
    equal = _rows_of(LossBatch.from_train_batch(batch, vocab_size))
    # Half of the mass spread over all ids: far from any teacher that is not uniform, however confident it is.
    perturbed = torch.logaddexp(equal, torch.full((), -math.log(vocab_size))) - math.log(2.0)
    found = []
    for logits in (equal, perturbed):
        given = replace(batch, columns=batch.columns | _sampled_by(logits, batch.columns, batch.token_ids, alpha))
        tensors = LossBatch.from_train_batch(given, vocab_size)
        student = logits.clone().requires_grad_()
        output = loss_function(soft)(student, tensors, soft)
        output.total.backward()
        assert student.grad is not None
        divergence = float(buckets(tensors.masked_rows(logits), tensors).reverse_kl()) / tokens
        gradient = float(student.grad[tensors.mask].abs().sum()) / tokens
        found.append((float(output.total.detach()) / tokens, gradient, divergence))
    (loss, gradient, divergence), (_, noisy_gradient, noisy_divergence) = found
    kind = settings.type
    expected_gradient = gradient if soft.zero_gradient_at_teacher else 0.0
    if not max(abs(loss), expected_gradient, abs(divergence)) < _ZERO:
        raise SignalError(
            f"loss.type={kind}: a student equal to teacher {rollouts[0].teacher} has loss {loss:.3g} and gradient "
            f"{gradient:.3g} a token, where both must be 0: what the teacher returns and what the loss reads do not fit"
        )
    if not (noisy_divergence > _ZERO and noisy_gradient > _ZERO):
        raise SignalError(
            f"loss.type={kind}: a student far from teacher {rollouts[0].teacher} has divergence {noisy_divergence:.3g} and "
            f"gradient {noisy_gradient:.3g} a token, where both must be positive: this run would learn nothing"
        )
    return {"loss_equal": loss, "divergence_perturbed": noisy_divergence, "gradient_perturbed": noisy_gradient}


def _rows_of(batch: LossBatch) -> torch.Tensor:
    """Logits [B, S, vocab] of a student with the teacher's recorded probabilities; the rest of the tail is spread evenly."""
    assert batch.support_ids is not None
    assert batch.support_logprobs is not None
    assert batch.tail_logprobs is not None
    assert batch.teacher_logprobs is not None
    used = batch.support_ids >= 0
    known = torch.zeros(*batch.mask.shape, batch.vocab_size + 1, dtype=torch.bool)
    known = known.scatter_(-1, batch.support_ids.where(used, batch.vocab_size), True)[..., :-1]
    at_token = batch.token_ids.unsqueeze(-1)
    token_outside = ~known.gather(-1, at_token)
    tail, at_sampled = (column.double().exp().unsqueeze(-1) for column in (batch.tail_logprobs, batch.teacher_logprobs))
    rest = tail - token_outside * at_sampled
    known = known.scatter(-1, at_token, True)
    others = (batch.vocab_size - known.sum(-1, keepdim=True)).clamp(min=1)
    rows = (rest.clamp(min=1e-30) / others).log().expand(*batch.mask.shape, batch.vocab_size).clone()
    rows.scatter_(-1, at_token, batch.teacher_logprobs.double().unsqueeze(-1))
    padded = torch.cat([rows, rows[..., :1]], dim=-1)
    padded.scatter_(-1, batch.support_ids.where(used, batch.vocab_size), batch.support_logprobs.double())
    # Positions without a token hold fill values, which no loss reads; making them finite keeps them harmless.
    return padded[..., :-1].nan_to_num(nan=0.0, posinf=0.0, neginf=-80.0).float()


def _sampled_by(
    logits: torch.Tensor, columns: dict[str, np.ndarray], token_ids: np.ndarray, alpha: float
) -> dict[str, np.ndarray]:
    """Return the columns as if the student with these logits had sampled the tokens."""
    at = torch.from_numpy(token_ids).long().unsqueeze(-1)
    student = log_rows(logits).gather(-1, at).squeeze(-1).numpy()
    share = np.log([max(alpha, 1e-300), max(1.0 - alpha, 1e-300)])
    mixture = np.logaddexp(share[0] + columns["teacher_logprobs"], share[1] + student).astype(np.float32)
    return {"student_logprobs": student, "mixture_logprobs": mixture}


def _stacked(rollouts: Sequence[Rollout], name: str) -> np.ndarray:
    """Stack a recorded column over all rollouts, token after token; supports of unequal width are padded."""
    (column,) = (column for column in scored_columns() if column.name == name)
    values = [value for value in values_of(rollouts, name) if value is not None]
    if column.width == "token":
        return np.concatenate(values)
    width, fill = max(value.shape[1] for value in values), column.fill
    return np.concatenate([np.pad(value, ((0, 0), (0, width - value.shape[1])), constant_values=fill) for value in values])
