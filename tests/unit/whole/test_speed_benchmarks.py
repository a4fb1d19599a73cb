"""Benchmarks that count in virtual time: what they say follows from their models, and a small one is run whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import admission, bench, beside_the_loop, coin_ahead, figures, virtual_time

POLICIES = {policy.name: policy for policy in coin_ahead.POLICIES}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_draws_every_token_once(name: str) -> None:
    lengths = np.random.default_rng(2).integers(1, 40, 60)
    counts = coin_ahead.draw(POLICIES[name], lengths, 8, alpha=0.2)
    assert counts.tokens == lengths.sum()
    assert 0 < counts.teacher_steps <= counts.steps
    assert counts.steps >= lengths.sum() / 8


def test_on_demand_the_teacher_rests_as_often_as_all_coins_are_the_students() -> None:
    lengths = np.full(2000, 50)
    for in_flight, wanted in ((1, 0.2), (4, 1 - 0.8**4), (16, 1 - 0.8**16)):
        found = coin_ahead.draw(POLICIES["on demand"], lengths[: 100 * in_flight], in_flight, alpha=0.2)
        assert found.share == pytest.approx(wanted, abs=0.02)
        # Nobody waits: as many steps as today.
        assert found.steps == 100 * 50


def test_without_a_coin_of_the_teacher_it_only_reads_in_the_end() -> None:
    lengths = np.full(32, 50)
    assert coin_ahead.draw(POLICIES["on demand"], lengths, 8, alpha=0.0).teacher_steps == 0
    assert coin_ahead.draw(POLICIES["grouped at 50%"], lengths, 8, alpha=1.0).share == 1.0


def test_grouping_trades_passes_of_the_teacher_for_steps() -> None:
    lengths = np.full(6 * 64, 256)
    found = [
        coin_ahead.draw(POLICIES[name], lengths, 64, alpha=0.2) for name in ("every step", "grouped at 50%", "grouped at 75%")
    ]
    assert [each.share for each in found] == sorted((each.share for each in found), reverse=True)
    assert [each.steps for each in found] == sorted(each.steps for each in found)
    assert found[1].share < 0.35
    # A large teacher: the gain is in its passes.
    assert coin_ahead.faster(found[0], found[1], 30) > coin_ahead.faster(found[0], found[1], 4) > 1.5


def test_evaluations_and_checkpoints_cost_less_beside_the_steps() -> None:
    case = beside_the_loop.Case("equal stages", slots=4 * beside_the_loop.BATCH)
    before, after = beside_the_loop.shares(case)["share_of_time_added"].values()
    assert after < before / 2
    found = beside_the_loop.shares(replace(case, heldout=0, checkpoints=False))["share_of_time_added"]
    assert set(found.values()) == {0.0}


def test_a_sample_is_asked_for_as_soon_as_it_may_be(tmp_path: Path) -> None:
    found = virtual_time.run(admission.measure(admission.ENGINES[0], admission.BATCH, 1, tmp_path))
    assert found["longest_lag_s"] == 0.0
    assert found["tokens_per_s"] > 0.0


def test_every_benchmark_of_make_bench_is_a_module() -> None:
    for name in bench.SCRIPTS:
        assert (Path(bench.__file__).parent / f"{name}.py").is_file()


def test_the_parts_of_a_step_in_the_picture_are_the_whole_step() -> None:
    found = json.loads((figures.RESULTS / "step_costs.json").read_text())
    clock, cpu = (sum(parts.values()) for parts in figures.parts_of_a_step(found).values())
    assert clock == pytest.approx(found["wall_s"])
    assert cpu == pytest.approx(sum(found["cpu_s"].values()))
    assert all(seconds >= 0.0 for parts in figures.parts_of_a_step(found).values() for seconds in parts.values())


def test_pictures_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = figures.RESULTS
    for name in ("step_costs", "step_growth"):
        (tmp_path / f"{name}.json").write_text((kept / f"{name}.json").read_text())
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.main()
    for name in ("step_costs", "step_growth"):
        drawn, there = ((folder / f"{name}.svg").read_text() for folder in (tmp_path, kept))
        assert re.findall(r">([^<>]+)</text>", drawn) == re.findall(r">([^<>]+)</text>", there)
