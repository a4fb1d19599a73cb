"""Ensemble targets against whole rows: six to eight ids, every distribution known, every sum written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdray.errors import ConfigError, DataError
from kdray.teachers.ensemble import (
    Kind,
    TeacherColumns,
    arithmetic,
    at_union,
    combine,
    confidence_weights,
    fixed_weights,
    geometric,
    knows,
    renormalise,
    union_ids,
    weights_by_domain,
)

KINDS: tuple[Kind, ...] = ("arithmetic", "geometric")


class World:
    """n teachers' whole rows p [n, T, V] and a sampled sequence; supports are random parts of the vocabulary."""

    def __init__(self, seed: int, teachers: int = 3, tokens: int = 4, vocab: int = 7, full: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.rng, self.vocab = rng, vocab
        # No id without mass: what is left of a tail then has digits enough to compare its logarithm.
        self.p = 0.98 * rng.dirichlet(np.full(vocab, 0.7), size=(teachers, tokens)) + 0.02 / vocab
        self.tokens = rng.integers(vocab, size=tokens)
        self.q = rng.dirichlet(np.ones(vocab), size=tokens)
        self.weights = rng.dirichlet(np.ones(teachers))
        self.token_weights = rng.dirichlet(np.ones(teachers), size=tokens).T
        width = vocab if full else vocab - 2
        self.columns = [
            self.record(row, [rng.permutation(vocab)[: width if full else rng.integers(width + 1)] for _ in range(tokens)])
            for row in self.p
        ]

    def record(self, rows: np.ndarray, supports: Sequence[np.ndarray], spare: int = 0) -> TeacherColumns:
        """The columns of a teacher with these whole rows [T, V] on these supports, with unused slots in random places."""
        width = max((len(ids) for ids in supports), default=0) + spare
        ids = np.full((len(rows), width), -1, dtype=np.int32)
        logprobs, tail = np.full(ids.shape, -np.inf), np.full(len(rows), -np.inf)
        for t, support in enumerate(supports):
            slots = np.sort(self.rng.permutation(width)[: len(support)])
            ids[t, slots], logprobs[t, slots] = support, np.log(rows[t, support])
            if outside := sorted(set(range(self.vocab)) - set(support.tolist())):
                tail[t] = math.log(math.fsum(rows[t, outside]))
        return TeacherColumns(np.log(rows[np.arange(len(rows)), self.tokens]), ids, logprobs, tail)

    def united(self) -> list[TeacherColumns]:
        """Every teacher on the union, asked for what it lacked as a second prefill would answer."""
        union = union_ids([one.support_ids for one in self.columns])
        both = []
        for columns, rows in zip(self.columns, self.p, strict=True):
            asked = columns if knows(columns, union) else self.record(rows, [ids[ids >= 0] for ids in union])
            both.append(at_union(asked, union))
        return both

    def bucketed(self, rows: np.ndarray, union: np.ndarray) -> np.ndarray:
        """Whole rows [T, V] as probabilities of each union slot and the rest, [T, U + 1]; padding holds 0."""
        out = np.zeros((len(rows), union.shape[1] + 1))
        for t, ids in enumerate(union):
            used = ids >= 0
            out[t, :-1][used] = rows[t, ids[used]]
            out[t, -1] = math.fsum(rows[t, sorted(set(range(self.vocab)) - set(ids[used].tolist()))])
        return out


def stacked(columns: Sequence[TeacherColumns]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([one.support_logprobs for one in columns]), np.stack([one.tail_logprobs for one in columns])


def kl(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """KL of probability rows over the last dimension; buckets without mass in `first` count nothing."""
    used = first > 0.0
    return (first * np.log(np.where(used, first, 1.0) / np.where(used, second, 1.0))).sum(axis=-1)


def scatter(ids: np.ndarray, values: np.ndarray, vocab: int) -> np.ndarray:
    """Support values [T, U] as rows [T, V]; NaN where an id is not in the union."""
    out = np.full((len(ids), vocab), np.nan)
    rows, slots = np.nonzero(ids >= 0)
    out[rows, ids[rows, slots]] = values[rows, slots]
    return out


def close(value: np.ndarray, expected: Any, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(value, expected, rtol=0.0, atol=atol)


# ---------------------------------------------------------------------------------------------------- one support


def columns_of(ids: list[list[int]], logprobs: list[list[float]], tail: list[float]) -> TeacherColumns:
    return TeacherColumns(
        np.zeros(len(ids)), np.array(ids, np.int32), np.array(logprobs, np.float32), np.array(tail, np.float32)
    )


def plain(ids: list[list[int]]) -> TeacherColumns:
    return columns_of(ids, [[-3.0] * len(row) for row in ids], [-1.0] * len(ids))


def test_union_by_hand_is_in_the_first_teachers_order_then_the_seconds() -> None:
    union = union_ids([np.array(ids) for ids in ([[5, -1, 2], [7, 1, 0]], [[9, 2, 4, -1], [1, 0, -1, -1]], [[3], [-1]])])
    assert union.dtype == np.int32
    assert union.tolist() == [[5, 2, 9, 4, 3], [7, 1, 0, -1, -1]]


def test_a_teacher_knows_its_support_and_all_ids_where_it_has_no_tail() -> None:
    first, second, third = plain([[5, -1, 2], [7, 1, 0]]), plain([[9, 2], [1, 0]]), plain([[5, 2, 9], [0, 7, 1]])
    union = union_ids([first.support_ids, second.support_ids])
    assert union.tolist() == [[5, 2, 9], [7, 1, 0]]
    assert not knows(first, union)
    assert not knows(second, union)
    assert knows(third, union)
    one = columns_of([[0, 1], [0, 1]], [[-0.7, -0.7], [-0.7, -0.9]], [-np.inf, -2.0])
    assert not knows(one, np.array([[0, 1, 2], [0, 1, 2]], np.int32))
    padded = np.array([[0, 1, 2], [0, 1, -1]], np.int32)
    assert knows(one, padded)
    assert at_union(one, padded).support_logprobs[:, 2].tolist() == [-np.inf, -np.inf]


@given(seed=st.integers(0, 10**6), teachers=st.integers(1, 4), vocab=st.integers(6, 8))
def test_union_and_at_union_agree_with_whole_rows(seed: int, teachers: int, vocab: int) -> None:
    world = World(seed, teachers, vocab=vocab)
    union = union_ids([one.support_ids for one in world.columns])
    for t in range(len(union)):
        seen = list(dict.fromkeys(i for one in world.columns for i in one.support_ids[t].tolist() if i >= 0))
        assert union[t].tolist() == seen + [-1] * (union.shape[1] - len(seen))
    for one, rows in zip(world.united(), world.p, strict=True):
        assert one.support_ids is union or np.array_equal(one.support_ids, union)
        expected = world.bucketed(rows, union)
        with np.errstate(divide="ignore"):
            close(one.support_logprobs, np.log(expected[:, :-1]))
            close(one.tail_logprobs, np.log(expected[:, -1]), atol=1e-11)


def test_unused_slots_of_a_support_hold_anything() -> None:
    columns = TeacherColumns(np.zeros(1), np.array([[3, -1, 1]], np.int32), np.array([[-1.0, 7.0, -2.0]]), np.array([-0.7]))
    assert at_union(columns, np.array([[1, 3, -1]], np.int32)).support_logprobs.tolist() == [[-2.0, -1.0, -np.inf]]


def test_at_union_refuses_what_would_count_mass_twice_or_lose_it() -> None:
    columns = columns_of([[0, 1]], [[-1.0, -2.0]], [-1.5])
    union = np.array([[0, 1, 2, 3]], np.int32)
    with pytest.raises(ValueError, match=r"unknown at ids \[2, 3\]"):
        at_union(columns, union)
    with pytest.raises(ValueError, match="leaves out"):
        at_union(columns, union[:, :1])
    with pytest.raises(ValueError, match="the union: position 0 names an id twice"):
        at_union(columns, np.array([[0, 1, 1]], np.int32))


def test_duplicates_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="position 1 names an id twice"):
        plain([[0, 1, 2], [3, -1, 3]])
    assert plain([[-1, -1, 0]]).support_ids.shape == (1, 3)
    fitting: dict[str, Any] = {
        "teacher_logprobs": np.zeros(2),
        "support_ids": np.zeros((2, 1), np.int32),
        "support_logprobs": np.zeros((2, 1)),
        "tail_logprobs": np.zeros(2),
    }
    TeacherColumns(**fitting)
    for name, shape in (("teacher_logprobs", 3), ("support_ids", (2, 2)), ("support_logprobs", 2), ("tail_logprobs", (2, 1))):
        with pytest.raises(ValueError, match="do not fit together"):
            TeacherColumns(**fitting | {name: np.zeros(shape, fitting[name].dtype)})


# ---------------------------------------------------------------------------------------------------- one distribution


@given(seed=st.integers(0, 10**6), teachers=st.integers(1, 4), vocab=st.integers(6, 8), each=st.booleans())
def test_on_whole_rows_both_means_equal_the_direct_computation(seed: int, teachers: int, vocab: int, each: bool) -> None:
    world = World(seed, teachers, vocab=vocab, full=True)
    columns = world.united()
    ids = columns[0].support_ids
    weights = world.token_weights if each else world.weights
    w = weights[:, :, None] if each else weights[:, None, None]
    support, tail = arithmetic(*stacked(columns), weights)
    close(scatter(ids, support, vocab), np.log((w * world.p).sum(axis=0)))
    assert np.isneginf(tail).all()
    support, tail, log_z = geometric(*stacked(columns), weights)
    product = np.prod(world.p**w, axis=0)
    close(scatter(ids, support, vocab), np.log(product / product.sum(axis=-1, keepdims=True)), atol=2e-12)
    close(log_z, np.log(product.sum(axis=-1)))
    assert np.isneginf(tail).all()


@given(seed=st.integers(0, 10**6), teachers=st.integers(1, 4), vocab=st.integers(6, 8), each=st.booleans())
def test_the_identities_of_both_targets_hold_on_the_buckets(seed: int, teachers: int, vocab: int, each: bool) -> None:
    """For any student, with constants computed apart: the target gives the weighted sum of the teachers' divergences."""
    world = World(seed, teachers, vocab=vocab)
    columns = world.united()
    union = columns[0].support_ids
    weights = world.token_weights if each else world.weights
    w = weights if each else weights[:, None]
    q = world.bucketed(world.q, union)
    p = np.stack([world.bucketed(rows, union) for rows in world.p])
    support, tail = arithmetic(*stacked(columns), weights)
    covered = (union >= 0).sum(axis=1) == vocab  # no tail there, as for the losses: what it holds is rounding
    mix = np.exp(np.concatenate([support, np.where(covered, -np.inf, tail)[:, None]], axis=1))
    close(mix.sum(axis=1), np.ones(len(q)), atol=1e-11)
    close((w * kl(p, q[None])).sum(axis=0), kl(mix, q) + (w * kl(p, mix[None])).sum(axis=0), atol=1e-10)
    support, tail, log_z = geometric(*stacked(columns), weights)
    experts = np.exp(np.concatenate([support, np.where(covered, -np.inf, tail)[:, None]], axis=1))
    close(experts.sum(axis=1), np.ones(len(q)))
    assert (log_z <= 1e-11).all()
    close((w * kl(q[None], p)).sum(axis=0), kl(q, experts) - log_z, atol=1e-9)


@given(seed=st.integers(0, 10**6), vocab=st.integers(6, 8))
def test_the_mixture_on_support_and_tail_is_the_bucketed_mixture(seed: int, vocab: int) -> None:
    world = World(seed, vocab=vocab)
    columns = world.united()
    expected = world.bucketed((world.token_weights[:, :, None] * world.p).sum(axis=0), columns[0].support_ids)
    support, tail = arithmetic(*stacked(columns), world.token_weights)
    close(np.exp(np.concatenate([support, tail[:, None]], axis=1)), expected)


def test_the_product_on_support_and_tail_is_not_the_bucketed_product_unless_tails_have_one_shape() -> None:
    """Two teachers, ids 0 | 1 2, weights 1/2. Tails of one shape agree with the exact one; of opposite shapes they do not."""
    weights = np.array([0.5, 0.5])
    for second, exact in (((0.5, 0.4, 0.1), True), ((0.5, 0.1, 0.4), False)):
        p = np.array([(0.5, 0.4, 0.1), second])
        product = np.sqrt(p[0] * p[1])
        distribution = product / product.sum()
        support, tail, log_z = geometric(np.log(p[:, None, :1]), np.log(p[:, None, 1:].sum(axis=-1)), weights)
        assert (abs(math.exp(tail[0]) - distribution[1:].sum()) < 1e-12) == exact
        assert (abs(math.exp(support[0, 0]) - distribution[0]) < 1e-12) == exact
        assert log_z[0] >= math.log(product.sum()) - 1e-12


def test_both_means_by_hand() -> None:
    """p = (.5, .5 | 0), (.1, .3 | .6) with weights 1/4, 3/4: the empty tail vetoes the product's."""
    logs = np.log([[[0.5, 0.5]], [[0.1, 0.3]]])
    tails = np.array([[-np.inf], [math.log(0.6)]])
    weights = np.array([0.25, 0.75])
    support, tail = arithmetic(logs, tails, weights)
    close(np.exp(support), [[0.2, 0.35]])
    close(np.exp(tail), [0.45])
    support, tail, log_z = geometric(logs, tails, weights)
    product = [0.5**0.25 * 0.1**0.75, 0.5**0.25 * 0.3**0.75]
    close(np.exp(support), [[product[0] / sum(product), product[1] / sum(product)]])
    close(np.exp(log_z), [sum(product)])
    assert tail[0] == -np.inf


def test_a_teacher_of_weight_zero_changes_nothing_and_has_no_veto() -> None:
    logs = np.log([[[0.5, 0.3]], [[0.9, 0.1]]])
    logs[1, 0, 1] = -np.inf
    tails = np.array([[math.log(0.2)], [-np.inf]])
    for value, expected in zip(arithmetic(logs, tails, np.array([1.0, 0.0])), (logs[0], tails[0]), strict=True):
        close(value, expected)
    for value, expected in zip(geometric(logs, tails, np.array([1.0, 0.0])), (logs[0], tails[0], np.zeros(1)), strict=True):
        close(value, expected)


def test_teachers_with_no_bucket_in_common_have_a_mixture_but_no_product() -> None:
    logs = np.array([[[0.0, -np.inf]], [[-np.inf, 0.0]]])
    tails = np.full((2, 1), -np.inf)
    close(np.exp(arithmetic(logs, tails, np.array([0.3, 0.7]))[0]), [[0.3, 0.7]])
    with pytest.raises(ValueError, match="position 0: no id has mass under every teacher"):
        geometric(logs, tails, np.array([0.3, 0.7]))


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0], [np.nan, 1.0], [[0.5, 0.5], [0.5, 0.5]]])
def test_weights_that_are_none_are_refused(weights: list) -> None:
    for mean in (arithmetic, geometric):
        with pytest.raises(ValueError, match="weights"):
            mean(np.full((2, 1, 2), -1.0), np.full((2, 1), -2.0), np.array(weights))


def test_far_logprobs_do_not_underflow() -> None:
    """exp(-2000) is 0 in float64; the logs stay."""
    logs = np.array([[[-2000.0, 0.0]], [[-2100.0, 0.0]]])
    tails = np.full((2, 1), -3000.0)
    weights = np.array([0.5, 0.5])
    assert arithmetic(logs, tails, weights)[0][0, 0] == pytest.approx(-2000.0 + math.log(0.5), abs=1e-9)
    assert geometric(logs, tails, weights)[0][0, 0] == pytest.approx(-2050.0, abs=1e-9)


# ---------------------------------------------------------------------------------------------------- combine


@given(seed=st.integers(0, 10**6), each=st.booleans(), kind=st.sampled_from(KINDS))
def test_combine_gives_the_token_its_log_p_under_the_combined_distribution(seed: int, each: bool, kind: Kind) -> None:
    world = World(seed)
    columns = world.united()
    weights = world.token_weights if each else world.weights
    w = np.broadcast_to(weights if each else weights[:, None], world.p.shape[:2])
    target = combine(columns, weights, kind)
    for name in ("teacher_logprobs", "support_logprobs", "tail_logprobs", "log_z"):
        assert getattr(target, name).dtype == np.float32
    assert target.support_ids.dtype == np.int32
    steps = np.arange(len(world.tokens))
    product = np.prod(world.p ** w[:, :, None], axis=0)
    exact_z = product.sum(axis=1)
    if kind == "arithmetic":
        expected = np.log((w[:, :, None] * world.p).sum(axis=0)[steps, world.tokens])
        assert (target.log_z == 0.0).all()
    else:
        expected = np.log(product[steps, world.tokens]) - target.log_z
        # never above the exact distribution's value, and the distribution over support and tail has mass 1
        assert (target.teacher_logprobs <= expected - np.log(exact_z) + target.log_z + 1e-5).all()
    np.testing.assert_allclose(target.teacher_logprobs, expected, rtol=1e-6, atol=1e-5)
    mass = np.exp(target.support_logprobs.astype(np.float64)).sum(axis=1) + np.exp(target.tail_logprobs.astype(np.float64))
    close(mass, np.ones(len(mass)), atol=1e-5)
    # at a token of the support, the column and the bucket are one number
    at_tokens = scatter(target.support_ids, target.support_logprobs, world.vocab)[steps, world.tokens]
    inside = ~np.isnan(at_tokens)
    np.testing.assert_allclose(target.teacher_logprobs[inside], at_tokens[inside], rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), data=st.data())
def test_neither_the_order_of_teachers_nor_of_ids_nor_unused_slots_matter(seed: int, kind: Kind, data: st.DataObject) -> None:
    world = World(seed)
    reference = combine(world.united(), world.token_weights, kind)
    order = data.draw(st.permutations(range(3)))
    spare = data.draw(st.integers(0, 3))
    supports = [[world.rng.permutation(ids[ids >= 0]) for ids in one.support_ids] for one in world.columns]
    columns = [world.record(rows, support, spare) for rows, support in zip(world.p, supports, strict=True)]
    world.columns, world.p = [columns[i] for i in order], world.p[list(order)]
    other = combine(world.united(), world.token_weights[list(order)], kind)
    assert [set(ids) for ids in other.support_ids.tolist()] == [set(ids) for ids in reference.support_ids.tolist()]
    for name in ("teacher_logprobs", "tail_logprobs", "log_z"):
        np.testing.assert_allclose(getattr(other, name), getattr(reference, name), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        scatter(other.support_ids, other.support_logprobs, world.vocab),
        scatter(reference.support_ids, reference.support_logprobs, world.vocab),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_each_token_are_those_of_the_token_alone(kind: Kind) -> None:
    world = World(5)
    columns = world.united()
    target = combine(columns, world.token_weights, kind)
    for t in range(4):
        fixed = combine(columns, world.token_weights[:, t], kind)
        assert np.array_equal(target.support_logprobs[t], fixed.support_logprobs[t])
        assert target.teacher_logprobs[t] == fixed.teacher_logprobs[t]
    assert not np.allclose(target.teacher_logprobs, combine(columns, world.weights, kind).teacher_logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_one_teacher_alone_and_equal_teachers_give_that_teacher(kind: Kind) -> None:
    world = World(2, teachers=1)
    one = world.united()
    for target in (combine(one, np.ones(1), kind), combine(one * 3, np.array([0.2, 0.3, 0.5]), kind)):
        for name in ("teacher_logprobs", "support_logprobs", "tail_logprobs"):
            np.testing.assert_allclose(getattr(target, name), getattr(one[0], name), rtol=1e-6, atol=1e-6)
        close(target.log_z, np.zeros(4), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_rollout_and_an_empty_support_pass(kind: Kind) -> None:
    empty = TeacherColumns(np.zeros(0), np.zeros((0, 3), np.int32), np.zeros((0, 3)), np.zeros(0))
    assert union_ids([empty.support_ids] * 2).shape == (0, 0)
    assert knows(empty, union_ids([empty.support_ids]))
    assert combine([empty, empty], np.array([0.5, 0.5]), kind).support_logprobs.shape == (0, 3)
    bare = TeacherColumns(np.array([-1.0]), np.zeros((1, 0), np.int32), np.zeros((1, 0)), np.zeros(1))
    target = combine([bare, bare], np.array([0.5, 0.5]), kind)
    assert target.tail_logprobs.tolist() == [0.0]
    assert target.teacher_logprobs.tolist() == [-1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_combine_never_reads_an_unused_slot(kind: Kind) -> None:
    ids = np.array([[4, -1, 2]], np.int32)
    clean, noisy = (
        [TeacherColumns(np.array([-1.0]), ids, np.log([[0.5, fill, 0.3]]), np.log([0.2]))] for fill in (1e-300, 9.0)
    )
    target = combine(noisy, np.ones(1), kind)
    close(np.exp(target.support_logprobs), [[0.5, 0.0, 0.3]], atol=1e-7)
    close(target.tail_logprobs, combine(clean, np.ones(1), kind).tail_logprobs, atol=1e-7)


def test_combine_refuses_different_supports_and_other_kinds() -> None:
    first, second = plain([[0, 1]]), plain([[1, 0]])
    with pytest.raises(ValueError, match="at_union"):
        combine([first, second], np.array([0.5, 0.5]), "arithmetic")
    with pytest.raises(ValueError, match="harmonic"):
        combine([first, first], np.array([0.5, 0.5]), "harmonic")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- weights


def test_fixed_weights_are_shares_in_the_teachers_order() -> None:
    close(fixed_weights(["a", "b", "c"], {"c": 1.0, "a": 3.0}), [0.75, 0.0, 0.25])
    close(fixed_weights(["a", "b"]), [0.5, 0.5])
    with pytest.raises(ConfigError, match=r"rollout\.teachers\.weights names z, but the teachers are a, b"):
        fixed_weights(["a", "b"], {"z": 1.0})
    for shares in ({"a": -1.0}, {"a": math.nan}, {"a": 0.0}, {}):
        with pytest.raises(ConfigError, match=r"somewhere=\{.*at least one of them above 0"):
            fixed_weights(["a", "b"], shares, setting="somewhere")


def test_weights_by_domain_fall_back_or_refuse() -> None:
    by_domain = {"math": {"a": 1.0}, "code": {"a": 1.0, "b": 3.0}}
    weights_of = weights_by_domain(["a", "b"], by_domain, default={"b": 1.0})
    close(weights_of("math"), [1.0, 0.0])
    close(weights_of("code"), [0.25, 0.75])
    close(weights_of("law"), [0.0, 1.0])
    close(weights_of(None), [0.0, 1.0])
    with pytest.raises(DataError, match=r"domain='law' .*rollout\.teachers\.domain_weights, which knows math, code"):
        weights_by_domain(["a", "b"], by_domain)("law")


def test_confidence_by_hand() -> None:
    """Entropies: a sure teacher 0; one even over two ids and the tail log 3; at the second token exchanged."""
    sure, even = [[0.0, -np.inf], -np.inf], [[-math.log(3)] * 2, -math.log(3)]
    logs = np.array([[sure[0], even[0]], [even[0], sure[0]]])
    tails = np.array([[sure[1], even[1]], [even[1], sure[1]]], dtype=float)
    close(confidence_weights(logs, tails), [[0.75, 0.25], [0.25, 0.75]])
    close(confidence_weights(logs, tails, temperature=0.5), [[0.9, 0.1], [0.1, 0.9]])
    # the even teacher's third on eight ids: the entropy of ten ids, log 3 + log(8) / 3, so e^-H = 1 / 6
    close(confidence_weights(logs, tails, tail_ids=8), [[6 / 7, 1 / 7], [1 / 7, 6 / 7]])
    close(confidence_weights(logs, tails, tail_ids=np.array([8, 1])), [[6 / 7, 0.25], [1 / 7, 0.75]])


@given(seed=st.integers(0, 10**6), temperature=st.floats(0.05, 50.0))
def test_confidence_is_a_softmax_of_bucket_entropies(seed: int, temperature: float) -> None:
    world = World(seed)
    columns = world.united()
    p = np.stack([world.bucketed(rows, columns[0].support_ids) for rows in world.p])
    scores = np.exp((p * np.log(np.where(p > 0.0, p, 1.0))).sum(axis=-1) / temperature)
    weights = confidence_weights(*stacked(columns), temperature)
    close(weights, scores / scores.sum(axis=0), atol=1e-9)
    combine(columns, weights, "geometric")  # accepted as weights of each token


def test_whole_rows_are_surest_by_their_exact_entropy_with_the_tail_spread() -> None:
    """A flat teacher of six ids seen on one of them: as two buckets it looks surer than it is; with five ids outside, exact."""
    flat, peaked = np.full(6, 1 / 6), np.array([0.7, 0.1, 0.1, 0.1, 0.0, 0.0])
    logs = np.log([[[flat[0]]], [[peaked[0]]]])
    tails = np.log([[flat[1:].sum()], [peaked[1:].sum()]])
    assert confidence_weights(logs, tails)[0, 0] > 0.5  # 0.45 nats against 0.61
    assert confidence_weights(logs, tails, tail_ids=5)[0, 0] < 0.5
    scores = np.exp([-math.log(6), 0.7 * math.log(0.7) + 0.3 * math.log(0.3 / 5)])
    close(confidence_weights(logs, tails, tail_ids=5)[:, 0], scores / scores.sum())


def test_confidence_refuses_a_temperature_or_a_count_that_is_none() -> None:
    logs, tails = np.zeros((2, 1, 0)), np.zeros((2, 1))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            confidence_weights(logs, tails, temperature)
    with pytest.raises(ValueError, match="tail_ids"):
        confidence_weights(logs, tails, tail_ids=-1)


def test_a_missing_teachers_weight_is_spread_in_proportion() -> None:
    close(renormalise(np.array([0.5, 0.3, 0.2]), np.array([True, False, True])), [5 / 7, 0.0, 2 / 7])
    weights = np.array([[0.5, 0.1], [0.3, 0.1], [0.2, 0.8]])
    close(renormalise(weights, np.array([True, True, False])), [[0.625, 0.5], [0.375, 0.5], [0.0, 0.0]])
    close(renormalise(weights, np.ones(3, dtype=bool)), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_without_the_missing_teacher_is_that_of_those_present(kind: Kind) -> None:
    world = World(9)
    columns = world.united()
    present = np.array([True, False, True])
    weights = renormalise(world.weights, present)
    subset = [one for one, here in zip(columns, present, strict=True) if here]
    close(combine(columns, weights, kind).support_logprobs, combine(subset, weights[present], kind).support_logprobs, atol=1e-6)


def test_renormalise_refuses_when_nothing_is_left() -> None:
    with pytest.raises(ValueError, match="none of the 2 teachers answered"):
        renormalise(np.array([0.5, 0.5]), np.array([False, False]))
    with pytest.raises(ValueError, match="1 teachers present of 2 have weight 0"):
        renormalise(np.array([1.0, 0.0]), np.array([False, True]))
    with pytest.raises(ValueError, match="weight 0"):
        renormalise(np.array([[0.5, 1.0], [0.5, 0.0]]), np.array([False, True]))
