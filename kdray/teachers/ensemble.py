"""Combination of several teachers' answers on a rollout into one target. Pure numpy; requests to teachers are made elsewhere.

Each teacher recorded log p on its own support. The supports are united (`union_ids`), teachers whose log p is unknown at some
id of the union are queried for the union (`knows`, `at_union`), and the distributions, now over the same buckets, are combined
(`combine`): every id of the union, and one tail bucket for the rest.

The mean depends on the divergence, for weights w_i that sum to 1:

    sum_i w_i KL(p_i || q) = KL(m || q) + sum_i w_i KL(p_i || m),  m = sum_i w_i p_i             forward KL: `arithmetic`
    sum_i w_i KL(q || p_i) = KL(q || g) - log Z,                   g = prod_i p_i^w_i / Z        reverse KL: `geometric`

At a given prefix the additional terms do not depend on the student, so one target replaces n losses. Over whole responses they
do, because the prefixes are the student's own:

    sum_i w_i KL(q || p_i) = KL(q || prod_t g_t) - E_{y~q} sum_t log Z(prefix_t)

So a loss over whole responses adds log Z to the reward of each token, log g + log Z - log q = sum_i w_i log p_i - log q; the
target has it as a column of its own (`log_z`). The identities at a prefix hold exactly on the buckets; that of the reward on
every support.
Sums and bucketing commute: m on the buckets is the bucketed m. Products and bucketing do not: g on the buckets is the product
of the coarse distributions, and equals the bucketed g only if the union covers all ids (or the teachers' tails have the same
shape).

Dimensions: n teachers, T response tokens, K_i width of a teacher's support, U of the union. Logarithms
are natural; computed in float64, and float32 only in the columns that `combine` returns.
Source: arithmetic and geometric opinion pools; products of experts, Hinton 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from kdray.errors import ConfigError, DataError

Kind = Literal["arithmetic", "geometric"]


@dataclass(frozen=True, slots=True)
class TeacherColumns:
    """Columns of one teacher for one rollout, by the names of `kdray.rollouts.columns`.

    Values in unused slots of `support_logprobs` are never read.

    Raises: ValueError if the shapes disagree, or a position contains an id twice.
    """

    teacher_logprobs: np.ndarray  # [T] log p of the sampled token
    support_ids: np.ndarray  # [T, K] int32; -1 is an unused slot
    support_logprobs: np.ndarray  # [T, K] log p at support_ids; -inf if unused
    tail_logprobs: np.ndarray  # [T] log of the mass outside the support; -inf if it covers all

    def __post_init__(self) -> None:
        rows = self.support_ids.shape[:1]
        if (
            self.support_ids.ndim != 2
            or self.support_logprobs.shape != self.support_ids.shape
            or self.teacher_logprobs.shape != rows
            or self.tail_logprobs.shape != rows
        ):
            raise ValueError(
                f"columns of one rollout do not fit together: teacher_logprobs {self.teacher_logprobs.shape}, support_ids "
                f"{self.support_ids.shape}, support_logprobs {self.support_logprobs.shape}, tail_logprobs "
                f"{self.tail_logprobs.shape}; expected [T], [T, K], [T, K], [T]"
            )
        _refuse_duplicates("support_ids", self.support_ids)

    def named(self) -> dict[str, np.ndarray | None]:
        """Columns of a rollout, by name."""
        return {each.name: getattr(self, each.name) for each in fields(TeacherColumns)}


@dataclass(frozen=True, slots=True)
class Target(TeacherColumns):
    """The combined distribution, float32, in the columns of a single teacher, and its log Z."""

    log_z: np.ndarray  # [T] log Z of the geometric mean, <= 0: minus the teachers' disagreement; 0 for the arithmetic mean

    def named(self) -> dict[str, np.ndarray | None]:
        return super(Target, self).named() | {"log_z": self.log_z}


# ---------------------------------------------------------------------------------------------------- one support


def union_ids(ids: Sequence[np.ndarray]) -> np.ndarray:
    """All ids of supports [T, K_i], each once per position: [T, U] int32, padded with -1 at the end.

    The order is that of the first support, followed by the second's ids that are not in the first, and so on.
    """
    together = np.concatenate(ids, axis=1)
    order = np.argsort(together, axis=1, kind="stable")
    ranked = np.take_along_axis(together, order, axis=1)
    first = np.ones(together.shape, dtype=bool)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    keep = np.empty_like(first)
    np.put_along_axis(keep, order, first, axis=1)
    return _pack(together, keep & (together >= 0))


def knows(columns: TeacherColumns, union: np.ndarray) -> bool:
    """True if this teacher's log p is known at every id of the union [T, U]; if its tail is -inf, log p is -inf elsewhere."""
    return not _unknown(columns, union).any()


def at_union(columns: TeacherColumns, union: np.ndarray) -> TeacherColumns:
    """A teacher's columns with the ids of the union [T, U] as support, -inf at padding.

    A teacher that does not know all of them is queried again for the whole union: its tail is then summed over the ids outside,
    whereas subtracting the new answers from the old tail would leave rounding errors in a small tail.
    Raises: ValueError if log p is unknown at an id of the union, or the union lacks an id of the support.
    """
    _refuse_duplicates("the union", union)
    unknown = _unknown(columns, union)
    if unknown.any():
        row = int(np.argmax(unknown.any(axis=1)))
        raise ValueError(
            f"position {row}: log p is unknown at ids {union[row][unknown[row]].tolist()} of the union; ask for them"
        )
    slots = _slots(columns.support_ids, union)
    if not np.array_equal((columns.support_ids >= 0).sum(axis=1), (slots >= 0).sum(axis=1)):
        raise ValueError("the union leaves out ids of this teacher's support; make it with union_ids of all teachers")
    # An extra column is the target of slots that are -1.
    padded = np.concatenate([columns.support_logprobs, np.full((len(union), 1), -np.inf)], axis=1)
    logprobs = np.take_along_axis(padded, np.where(slots >= 0, slots, padded.shape[1] - 1), axis=1)
    return TeacherColumns(columns.teacher_logprobs, union, logprobs, columns.tail_logprobs)


def _unknown(columns: TeacherColumns, union: np.ndarray) -> np.ndarray:
    """Ids of the union outside the support of a teacher that has mass there, [T, U] bool."""
    return (union >= 0) & (_slots(columns.support_ids, union) < 0) & ~np.isneginf(columns.tail_logprobs)[:, None]


# ---------------------------------------------------------------------------------------------- one distribution


def arithmetic(logprobs: np.ndarray, tails: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log sum_i w_i p_i of every bucket: the support [T, U] and the tail [T], float64. Exact under coarse graining.

    Args: logprobs: [n, T, U]; tails: [n, T]; weights: [n], or [n, T] for weights per token, summing to 1 over teachers.
    Raises: ValueError for invalid weights.
    """
    mixed = _log_mean(_buckets(logprobs, tails), _checked(weights, tails.shape)[..., None])
    return mixed[:, :-1], mixed[:, -1]


def geometric(logprobs: np.ndarray, tails: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """prod_i p_i^w_i over the buckets, normalised: logs of the support [T, U], the tail [T], and log Z [T]; float64.

    A bucket has no mass if any teacher of positive weight gives it none. Args as `arithmetic`.
    Raises: ValueError for invalid weights, or if the teachers have no bucket in common.
    """
    product = _weighted_sum(_buckets(logprobs, tails), _checked(weights, tails.shape)[..., None])
    log_z = _logsumexp(product, axis=-1)
    apart = np.isneginf(log_z)
    if apart.any():
        raise ValueError(
            f"position {int(np.argmax(apart))}: no id has mass under every teacher, so their geometric mean is undefined; "
            "use the arithmetic one, or teachers that agree more"
        )
    product -= log_z[:, None]
    return product[:, :-1], product[:, -1], log_z


def combine(columns: Sequence[TeacherColumns], weights: np.ndarray, kind: Kind) -> Target:
    """Combine several teachers into a target, in a single teacher's columns, float32.

    For the geometric mean, log p of a sampled token outside the union is divided by the Z of the buckets, which is at least the
    exact Z (Hölder): it is a lower bound of the exact value. Otherwise it equals the token's bucket. In either case it adds up
    with log Z to the mean of the teachers' log p.
    Args: columns: all on one union, by `at_union`; weights: [n] or [n, T].
    Raises: ValueError if the supports differ, for invalid weights, or if the teachers have no bucket in common.
    """
    ids = columns[0].support_ids
    if not all(np.array_equal(one.support_ids, ids) for one in columns):
        raise ValueError("the teachers' columns are on different supports; bring each to their union with at_union")
    logprobs = np.where(ids >= 0, np.stack([one.support_logprobs for one in columns]).astype(np.float64), -np.inf)
    tails = np.stack([one.tail_logprobs for one in columns]).astype(np.float64)
    tokens = np.stack([one.teacher_logprobs for one in columns]).astype(np.float64)  # [n, T]
    if kind == "arithmetic":
        support, tail = arithmetic(logprobs, tails, weights)
        token, log_z = _log_mean(tokens, _checked(weights, tails.shape)), np.zeros(len(ids))
    elif kind == "geometric":
        support, tail, log_z = geometric(logprobs, tails, weights)
        token = _weighted_sum(tokens, _checked(weights, tails.shape)) - log_z
    else:
        raise ValueError(f"kind={kind!r} of an ensemble's target; choose arithmetic or geometric")
    return Target(
        teacher_logprobs=token.astype(np.float32),
        support_ids=ids,
        support_logprobs=support.astype(np.float32),
        tail_logprobs=tail.astype(np.float32),
        log_z=log_z.astype(np.float32),
    )


# ---------------------------------------------------------------------------------------------------- weights


def fixed_weights(
    teachers: Sequence[str], shares: Mapping[str, float] | None = None, setting: str = "rollout.teachers.weights"
) -> np.ndarray:
    """Weights [n] in the order of `teachers`, in proportion to their shares: 0 if not named, all equal for None.

    Raises: ConfigError naming `setting` if a share is not a teacher's, is negative or not finite, or if all are 0.
    """
    if shares is None:
        return np.full(len(teachers), 1.0 / len(teachers))
    unknown = [name for name in shares if name not in teachers]
    if unknown:
        raise ConfigError(f"{setting} names {', '.join(unknown)}, but the teachers are {', '.join(teachers)}")
    values = np.array([shares.get(name, 0.0) for name in teachers], dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0.0).any() or not values.any():
        raise ConfigError(f"{setting}={dict(shares)}: shares must be finite and 0 or more, at least one of them above 0")
    return values / values.sum()


def weights_by_domain(
    teachers: Sequence[str], by_domain: Mapping[str, Mapping[str, float]], default: Mapping[str, float] | None = None
) -> Callable[[str | None], np.ndarray]:
    """Build a function from a prompt's domain to the weights [n] of `teachers`; all shares are checked beforehand.

    Args: by_domain: shares of each domain, as for `fixed_weights`; default: shares for all other prompts.
    Raises: ConfigError as `fixed_weights`. The function raises DataError for another domain if there is no default.
    """
    setting = "rollout.teachers.domain_weights"
    known = {domain: fixed_weights(teachers, shares, f"{setting}.{domain}") for domain, shares in by_domain.items()}
    otherwise = None if default is None else fixed_weights(teachers, default)

    def weights_of(domain: str | None) -> np.ndarray:
        weights = otherwise if domain is None else known.get(domain, otherwise)
        if weights is None:
            raise DataError(
                f"domain={domain!r} of a prompt is not in {setting}, which knows {', '.join(known) or 'none'}; "
                "add it there, or set rollout.teachers.weights for all other prompts"
            )
        return weights

    return weights_of


def confidence_weights(
    logprobs: np.ndarray, tails: np.ndarray, temperature: float = 1.0, tail_ids: int | np.ndarray = 1
) -> np.ndarray:
    """Weights [n, T] that favour the teacher most confident of a token: softmax over teachers of -entropy / temperature.

    A heuristic without a published source: the exponential makes weights invariant to a constant added to all entropies.
    Confidence is not correctness: it trusts a teacher that is confidently wrong. High temperatures approach equal weights.
    The entropy, nats, is that of the buckets, with the tail spread evenly over `tail_ids` ids. With 1 the tail counts as a
    single id, and a flat teacher with most of its mass there looks confident; the number of ids outside the union is the right
    value.
    Args: logprobs: [n, T, U]; tails: [n, T]; tail_ids: a number, or [T].
    Raises: ValueError if the temperature is not positive, or tail_ids is negative anywhere.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature:g} of the confidence weights; it must be above 0")
    if np.any(np.asarray(tail_ids) < 0):
        raise ValueError("tail_ids is negative at some position; it counts the ids outside the union")
    rows = _buckets(logprobs, tails)
    mass = np.exp(rows)
    entropy = -(mass * np.where(mass > 0.0, rows, 0.0)).sum(axis=-1)
    # If no id is outside the union, the tail holds only rounding errors.
    entropy += mass[..., -1] * np.log(np.maximum(tail_ids, 1))
    scores = -entropy / temperature
    return np.exp(scores - _logsumexp(scores, axis=0))


def renormalise(weights: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Set absent teachers' weights to 0 and redistribute them in proportion over those present; same shape, float64.

    Args: weights: [n] or [n, T]; present: bool [n].
    Raises: ValueError if no teacher is present, or those present have weight 0.
    """
    weights, present = np.asarray(weights, dtype=np.float64), np.asarray(present, dtype=bool)
    if not present.any():
        raise ValueError(f"none of the {len(present)} teachers answered; there is no target to train on")
    kept = np.where(present.reshape(-1, *(1,) * (weights.ndim - 1)), weights, 0.0)
    total = kept.sum(axis=0)
    if not np.all(total > 0.0):
        raise ValueError(
            f"the {int(present.sum())} teachers present of {len(present)} have weight 0, so the missing weight cannot be "
            "spread in proportion; give them some"
        )
    return kept / total


# ---------------------------------------------------------------------------------------------------- parts


def _refuse_duplicates(what: str, ids: np.ndarray) -> None:
    ranked = np.sort(ids, axis=1)
    twice = ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(f"{what}: position {int(np.argmax(twice))} names an id twice, so its mass would count twice")


def _pack(ids: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Ids to keep at each position, in their order, [T, most kept] int32, padded with -1 at the end."""
    order = np.argsort(~keep, axis=1, kind="stable")[:, : keep.sum(axis=1).max(initial=0)]
    return np.take_along_axis(np.where(keep, ids, -1), order, axis=1).astype(np.int32)


def _slots(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of each wanted id [T, W] among its position's `ids` [T, K]: [T, W], -1 if absent.

    One binary search over (position, id) keys; a [T, W, K] comparison would not fit in memory for wide supports.
    """
    stride = int(max(ids.max(initial=0), wanted.max(initial=0))) + 1
    rows, slots = np.nonzero(ids >= 0)
    keys = rows * stride + ids[rows, slots]
    order = np.argsort(keys)
    keys = np.append(keys[order], np.iinfo(np.int64).max)  # sentinel: every search ends inside
    sought = np.arange(len(ids))[:, None] * stride + wanted
    places = np.searchsorted(keys, sought)
    found = (wanted >= 0) & (keys[places] == sought)
    return np.where(found, np.append(slots[order], -1)[places], -1)


def _buckets(logprobs: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """Concatenate support and tail, the tail last: [n, T, U + 1] float64."""
    return np.concatenate([logprobs, tails[..., None]], axis=-1).astype(np.float64)


def _checked(weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The weights as [n, T] float64."""
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape not in (shape, shape[:1]):
        raise ValueError(f"weights {weights.shape} for {shape[0]} teachers and {shape[1]} tokens; expected [n] or [n, T]")
    if not (weights >= 0.0).all() or not np.allclose(weights.sum(axis=0), 1.0, rtol=0.0, atol=1e-6):
        raise ValueError("weights must be 0 or more and sum to 1 over teachers at every token; see renormalise")
    return np.broadcast_to(weights.reshape(*weights.shape, *(1,) * (2 - weights.ndim)), shape)


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(values)


def _logsumexp(values: np.ndarray, axis: int) -> np.ndarray:
    """log sum exp along `axis`; -inf if all are."""
    top = values.max(axis=axis, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    return np.squeeze(top, axis) + _log(np.exp(values - top).sum(axis=axis))


def _log_mean(logs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log sum_i w_i exp(logs_i) over the first dimension."""
    return _logsumexp(logs + _log(weights), axis=0)


def _weighted_sum(logs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum_i w_i logs_i over the first dimension, with 0 times -inf = 0: a teacher of weight 0 has no veto."""
    return (np.where(weights > 0.0, logs, 0.0) * weights).sum(axis=0)
