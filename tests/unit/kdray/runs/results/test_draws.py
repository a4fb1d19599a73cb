"""Numbers by response: their file, and metrics as ratios of sums over prompts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from kdray.errors import DataError
from kdray.runs.results.draws import Draw, Ratio, ratios, read_draws, write_draws

DRAW = Draw(
    prompt_id=5,
    draw=0,
    domain=None,
    tokens=4,
    truncated=False,
    repeats=False,
    exact_match=True,
    reverse_kl=2.0,
    forward_kl=1.0,
    top_overlap=None,
)


def right_of(prompt_id: int, right: int, of: int) -> list[Draw]:
    return [replace(DRAW, prompt_id=prompt_id, draw=draw, exact_match=draw < right) for draw in range(of)]


def test_a_file_gives_back_the_draws(tmp_path: Path) -> None:
    draws = [DRAW, replace(DRAW, draw=1, domain="coins", exact_match=None, reverse_kl=None, top_overlap=0.1 + 0.2)]
    write_draws(tmp_path / "new" / "before.parquet", draws)
    assert read_draws(tmp_path / "new" / "before.parquet") == draws
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["before.parquet"]
    (tmp_path / "broken.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"broken\.parquet: not numbers of an evaluation"):
        read_draws(tmp_path / "broken.parquet")


def test_divergences_are_over_tokens_and_matches_over_prompts() -> None:
    draws = [
        replace(DRAW, prompt_id=9, tokens=1, reverse_kl=3.0, exact_match=False),
        replace(DRAW, prompt_id=5, tokens=6, reverse_kl=6.0, truncated=True),
        replace(DRAW, prompt_id=5, draw=1, tokens=2, reverse_kl=1.0),
        replace(DRAW, prompt_id=5, draw=2, tokens=1, reverse_kl=0.0, exact_match=False),
    ]
    found = ratios(draws)
    assert found["reverse_kl"].value == pytest.approx((3 + 6 + 1 + 0) / (1 + 6 + 2 + 1))
    assert found["exact_match"].value == pytest.approx((0 + 2 / 3) / 2), "a prompt counts once, however often it was drawn"
    assert found["response_tokens"].value == pytest.approx(10 / 4)
    assert found["truncated"].value == pytest.approx(1 / 4)
    assert found["reverse_kl"].prompt_ids.tolist() == [5, 9]
    assert found["reverse_kl"].sums.tolist() == [7.0, 3.0]
    assert found["reverse_kl"].counts.tolist() == [9.0, 1.0]
    assert "top_overlap" not in found


def test_domains_are_told_apart_where_there_are_several() -> None:
    draws = [replace(DRAW, prompt_id=n, domain=domain, exact_match=n > 1) for n, domain in enumerate("aabb")]
    found = ratios(draws)
    assert (found["exact_match/a"].value, found["exact_match/b"].value) == (0.0, 1.0)
    assert found["exact_match/a"].num_prompts == 2
    assert not [name for name in ratios(draws[:2]) if "/" in name]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(k: int) -> None:
    draws = [each for prompt_id in range(6) for each in right_of(prompt_id, right=prompt_id, of=5)]
    expected = [np.mean([any(n < right for n in chosen) for chosen in combinations(range(5), k)]) for right in range(6)]
    found = ratios(draws, [k])[f"pass_at_{k}"]
    assert found.sums == pytest.approx(expected)
    assert found.value == pytest.approx(np.mean(expected))


def test_pass_at_k_leaves_out_prompts_with_fewer_responses() -> None:
    draws = [*right_of(1, right=1, of=2), *right_of(2, right=0, of=3)]
    assert ratios(draws, [3])["pass_at_3"].num_prompts == 1
    assert ratios(draws, [3])["pass_at_3"].value == 0.0
    assert "pass_at_4" not in ratios(draws, [4])


def test_a_ratio_over_some_of_its_prompts() -> None:
    ratio = Ratio(np.array([3, 9, 5]), np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0]))
    chosen = ratio.at(np.array([5, 3]))
    assert (chosen.sums.tolist(), chosen.counts.tolist()) == ([4.0, 1.0], [2.0, 1.0])
    assert chosen.value == pytest.approx(5 / 3)
