"""Which teachers a prompt goes to: shares, replays, defaults, refusals."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdray.errors import ConfigError, DataError
from kdray.teachers.routing import Choice, Router, by_domain, by_rules, by_weights, ensemble, single


@dataclass(frozen=True)
class Asked:
    prompt_id: int = 7
    text: str = ""
    domain: str | None = None


def samplers(router: Router, count: int, prompt: Asked = Asked()) -> list[str]:
    return [router(prompt, sample_id).sampler for sample_id in range(count)]


def expect_shares(counts: Counter[str], shares: dict[str, float], total: int) -> None:
    """Every count lies inside the exact binomial interval that a fair draw leaves once in 10,000 runs."""
    for name, share in shares.items():
        low, high = stats.binom.interval(1.0 - 1e-4, total, share)
        assert low <= counts[name] <= high, (name, counts[name], low, high)
    assert sum(counts.values()) == total


# ------------------------------------------------------------------------------------------------- one teacher


def test_by_domain_takes_the_domains_teacher_and_the_default_elsewhere() -> None:
    router = by_domain({"math": "euler", "code": "knuth"}, default="all")
    assert router(Asked(domain="math"), 0) == Choice("euler", ("euler",), (1.0,))
    assert router(Asked(domain="code"), 1).sampler == "knuth"
    assert router(Asked(domain="law"), 2).sampler == "all"
    assert router(Asked(domain=None), 3).sampler == "all"


@pytest.mark.parametrize("domain", ["law", None])
def test_by_domain_without_a_default_refuses_an_unknown_domain(domain: str | None) -> None:
    router = by_domain({"math": "euler", "code": "knuth"})
    assert router(Asked(domain="math"), 0).sampler == "euler"
    with pytest.raises(DataError) as refused:
        router(Asked(prompt_id=41, domain=domain), 0)
    for part in ("prompt 41", repr(domain), "math, code", "rollout.teachers.map", "rollout.teachers.default"):
        assert part in str(refused.value)


def test_by_rules_takes_the_first_rule_found_anywhere_in_the_text() -> None:
    router = by_rules([(re.compile(r"\bdef\b"), "knuth"), (re.compile(r"\d"), "euler")], default="all")
    assert router(Asked(text="please: def f(x): return 1"), 0).sampler == "knuth"
    assert router(Asked(text="define 1"), 0).sampler == "euler"
    assert router(Asked(text="define it"), 0).sampler == "all"


def test_by_rules_without_a_default_refuses_a_prompt_that_nothing_matches() -> None:
    router = by_rules([(re.compile(r"\d+"), "euler")])
    with pytest.raises(DataError, match=r"prompt 7 .*rollout\.teachers\.rules .*\\\\d\+.*rollout\.teachers\.default"):
        router(Asked(text="words"), 0)


def test_by_weights_shares_converge_to_the_weights() -> None:
    total, weights = 20_000, {"a": 5.0, "b": 3.0, "c": 2.0}
    drawn = samplers(by_weights(weights, seed=3), total)
    expect_shares(Counter(drawn), {"a": 0.5, "b": 0.3, "c": 0.2}, total)
    # neighbours are independent: pairs have product shares
    pairs = Counter(f"{x}{y}" for x, y in zip(drawn[::2], drawn[1::2], strict=True))
    expect_shares(pairs, {"aa": 0.25, "bc": 0.06}, total // 2)


def test_by_weights_replays_and_depends_on_seed_and_sample_alone() -> None:
    first = samplers(by_weights({"a": 1.0, "b": 1.0}, seed=5), 300)
    again = by_weights({"b": 2.0, "a": 2.0}, seed=5)
    assert [again(Asked(prompt_id=i, text=str(i)), i).sampler for i in reversed(range(300))] == first[::-1]
    assert samplers(by_weights({"a": 1.0, "b": 1.0}, seed=6), 300) != first


def test_by_weights_never_draws_a_teacher_of_weight_zero() -> None:
    assert set(samplers(by_weights({"a": 0.0, "b": 1.0, "c": 0.0}, seed=0), 2_000)) == {"b"}


@pytest.mark.parametrize("weights", [{"a": -1.0, "b": 2.0}, {"a": float("nan")}, {"a": 0.0}, {}, {"a": float("inf")}])
def test_by_weights_refuses_what_are_no_shares(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.teachers\.weights"):
        by_weights(weights, seed=0)


# -------------------------------------------------------------------------------------------------- an ensemble


def test_an_ensembles_weights_are_normalised_and_follow_the_order_of_its_scorers() -> None:
    router = ensemble(["a", "b", "c"], weights={"c": 1.0, "a": 5.0, "b": 2.0}, sampler="rotate")
    assert router(Asked(), 0) == Choice("a", ("a", "b", "c"), (0.625, 0.25, 0.125))
    assert router(Asked(), 1) == Choice("b", ("b", "a", "c"), (0.25, 0.625, 0.125))
    assert router(Asked(), 5) == Choice("c", ("c", "a", "b"), (0.125, 0.625, 0.25))


def test_an_ensemble_without_weights_takes_equal_ones() -> None:
    assert ensemble(["a", "b", "c", "d"])(Asked(domain="any"), 0).weights == (0.25,) * 4


def test_domain_weights_go_first_and_leave_out_teachers_without_a_share() -> None:
    router = ensemble(
        ["a", "b", "c"], weights={"a": 1.0, "b": 1.0}, domain_weights={"math": {"c": 3.0, "b": 1.0}}, sampler="first"
    )
    assert router(Asked(domain="math"), 0) == Choice("b", ("b", "c"), (0.25, 0.75))
    assert router(Asked(domain="law"), 0) == Choice("a", ("a", "b"), (0.5, 0.5))
    assert router(Asked(), 0) == Choice("a", ("a", "b"), (0.5, 0.5))


@pytest.mark.parametrize("domain", ["law", None])
def test_an_ensemble_without_a_default_refuses_an_unknown_domain(domain: str | None) -> None:
    router = ensemble(["a", "b"], domain_weights={"math": {"a": 1.0}, "code": {"b": 1.0}})
    assert router(Asked(domain="code"), 0).scorers == ("b",)
    with pytest.raises(DataError) as refused:
        router(Asked(domain=domain), 0)
    for part in ("prompt 7", repr(domain), "math, code", "rollout.teachers.domain_weights", "rollout.teachers.weights"):
        assert part in str(refused.value)


@pytest.mark.parametrize("count", [1, 7, 299, 300])
def test_rotation_is_evenly_spread_whatever_the_weights(count: int) -> None:
    counts = Counter(samplers(ensemble(["a", "b", "c"], {"a": 0.9, "b": 0.05, "c": 0.05}, sampler="rotate"), count))
    assert max(counts[name] for name in "abc") - min(counts[name] for name in "abc") <= 1


def test_rotation_skips_teachers_without_a_share() -> None:
    router = ensemble(["a", "b", "c"], {"a": 1.0, "c": 3.0}, sampler="rotate")
    assert samplers(router, 4) == ["a", "c", "a", "c"]


def test_samplers_by_weights_have_those_shares_and_replay() -> None:
    total = 20_000
    build = lambda: ensemble(["c", "a", "b"], {"a": 0.7, "b": 0.3}, sampler="weights", seed=11)  # noqa: E731
    drawn = samplers(build(), total)
    expect_shares(Counter(drawn), {"a": 0.7, "b": 0.3}, total)
    assert samplers(build(), 200) == drawn[:200]


WRONG_ENSEMBLES: list[dict[str, Any]] = [
    {"teachers": []},
    {"teachers": ["a", "a"]},
    {"teachers": ["a"], "sampler": "best"},
    {"teachers": ["a"], "weights": {"b": 1.0}},
    {"teachers": ["a"], "weights": {"a": 0.0}},
    {"teachers": ["a"], "domain_weights": {"math": {"b": 1.0}}},
    {"teachers": ["a"], "domain_weights": {"math": {}}},
]


@pytest.mark.parametrize("arguments", WRONG_ENSEMBLES, ids=str)
def test_wrong_ensembles_are_refused_before_the_first_prompt(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ensemble(**arguments)


def test_a_wrong_share_names_its_domain() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.teachers\.domain_weights\.math names b, but the teachers are a"):
        ensemble(["a"], domain_weights={"math": {"b": 1.0}})


@given(
    shares=st.lists(st.just(0.0) | st.floats(1e-3, 5.0), min_size=1, max_size=5).filter(any),
    sampler=st.sampled_from(["first", "rotate", "weights"]),
    sample_id=st.integers(0, 10**9),
)
def test_every_choice_is_a_law_over_the_teachers_that_have_a_share(shares: list[float], sampler: Any, sample_id: int) -> None:
    names = [f"t{index}" for index in range(len(shares))]
    router = ensemble(names, dict(zip(names, shares, strict=True)), sampler=sampler, seed=1)
    choice = router(Asked(), sample_id)
    assert choice == router(Asked(prompt_id=8), sample_id)
    given_shares = dict(zip(names, shares, strict=True))
    assert dict(zip(choice.scorers, choice.weights, strict=True)) == pytest.approx(
        {name: share / sum(shares) for name, share in given_shares.items() if share > 0.0}
    )


# ------------------------------------------------------------------------------------------------------- Choice


@pytest.mark.parametrize(
    ("sampler", "scorers", "weights"),
    [
        ("a", ("b", "a"), (0.5, 0.5)),
        ("a", (), ()),
        ("a", ("a", "a"), (0.5, 0.5)),
        ("a", ("a", "b"), (1.0,)),
        ("a", ("a", "b"), (0.5, 0.4)),
        ("a", ("a", "b"), (1.5, -0.5)),
    ],
)
def test_a_choice_that_contradicts_itself_is_refused(
    sampler: str, scorers: tuple[str, ...], weights: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=r"scorers=|weights="):
        Choice(sampler, scorers, weights)


def test_single_is_one_teacher_for_all() -> None:
    assert single("a") == Choice("a", ("a",), (1.0,))
