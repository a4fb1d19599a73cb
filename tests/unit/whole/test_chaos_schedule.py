"""The schedule of the chaos run, its deadlines, and its verdict."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kdray.config import load_config
from tests.soak import chaos
from tests.soak.chaos import Outcome, deadlines, outside, recipe_of, schedule
from tests.soak.faults import KINDS, OF_ACTORS, Faults


def test_every_kind_is_there_and_a_seed_gives_one_order() -> None:
    wanted = schedule(0, 100, list(KINDS))
    assert len(wanted) == 100
    counts = Counter(wanted)
    assert counts.keys() == KINDS.keys()
    assert min(counts.values()) >= 2
    assert counts["second_driver"] > counts["kill_rank"] > counts["stop_rank"]
    assert schedule(0, 100, list(KINDS)) == wanted != schedule(1, 100, list(KINDS))
    assert Counter(schedule(3, 2, ["kill_rank", "fill_store"])) == {"kill_rank": 1, "fill_store": 1}


def test_every_kind_can_be_injected() -> None:
    assert all(callable(getattr(Faults, f"_{kind}")) for kind in chaos.ALL)


def test_a_storage_adds_faults_of_its_network_and_takes_those_of_local_checkpoints() -> None:
    assert set(chaos.kinds_for(storage=False)) == KINDS.keys()
    assert chaos.ALL.keys() - set(chaos.kinds_for(storage=True)) == {"corrupt_checkpoint"} | OF_ACTORS.keys()
    assert {"cut_storage", "black_hole_storage"} <= set(schedule(0, 30, chaos.kinds_for(storage=True)))


def test_budgets_are_the_defaults_and_deadlines_are_scaled_by_one_factor(tmp_path: Path) -> None:
    config = load_config(recipe_of(tmp_path, "disturbed", "127.0.0.1:1", 10), [])
    assert (config.training.max_restarts, config.rollout.retries, config.training.keep_checkpoints) == (2, 5, 2)
    assert config.cluster.stuck_after_s == pytest.approx(300 / chaos.SCALE)
    assert config.training.stuck_after_s == pytest.approx(1800 / chaos.SCALE)
    for section, (settings, names) in chaos.DEADLINES.items():
        # A deadline that is added later has to be scaled, too.
        limits = {name for name, field in settings.model_fields.items() if name.endswith("_s") and field.default is not None}
        assert limits == set(names)
        for name, value in deadlines(section).items():
            assert getattr(getattr(config, section), name) == value == settings.model_fields[name].default / chaos.SCALE


def summary(reverse_kl: float, forward_kl: float, low: float = 0.10) -> dict[str, Any]:
    after = {"reverse_kl": [low, 0.14], "forward_kl": [0.4, 0.6]}
    return {"after": {"reverse_kl": reverse_kl, "forward_kl": forward_kl}, "intervals": {"after": after}}


def test_the_disturbed_run_has_to_be_as_good_as_the_undisturbed_one_in_the_middle() -> None:
    bad = {
        "after": {"reverse_kl": 0.9, "forward_kl": 3.0},
        "intervals": {"after": {"reverse_kl": [0.1, 9], "forward_kl": [0.4, 9]}},
    }
    calm = [bad, summary(0.12, 0.5), summary(0.11, 0.5, low=0.08)]
    assert not outside(calm, summary(0.13, 0.45))
    assert not outside(calm, summary(0.27, 0.45)), "runs of one seed differ by as much"
    (worse,) = outside(calm, summary(0.29, 0.5))
    assert worse == "after: reverse_kl is 0.29, and 0.9, 0.12, 0.11 undisturbed (0.05 to 0.28 allowed)"
    assert len(outside(calm, summary(3.0, 0.1))) == 2


def test_the_state_survives_from_part_to_part(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "disturbed.outcome.json"
    recipe = recipe_of(tmp_path, "disturbed", "127.0.0.1:1", 10)
    first = chaos.Chaos(recipe, None, 0, ["kill_rank"])
    first.outcome.faults.append("kill_rank")
    first.outcome.seconds.append(12.5)
    first._write()
    again = chaos.Chaos(recipe, None, 0, ["kill_rank"]).outcome
    assert again == first.outcome == Outcome.read(path)
    assert again.seconds == [12.5]


def test_the_end_of_a_run_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, "disturbed", "127.0.0.1:1", 10)
    run = tmp_path / "runs" / "disturbed"
    ended = chaos.Chaos(recipe, None, 0, [])
    run.mkdir()
    (run / "events.jsonl").write_text('{"kind": "start"}\n{"kind": "start"}\n{"kind": "finished"}\n')
    (run / "summary.json").write_text('{"lost_samples": 0}')
    monkeypatch.setattr(ended, "_start", lambda: None)
    monkeypatch.setattr(ended, "_finish", lambda until: True)
    monkeypatch.setattr(ended, "_verify", lambda: "each in its step")
    assert ended.run()
    assert Outcome.read(run.with_name("disturbed.outcome.json")) == ended.outcome
    assert ended.outcome.events == {"start": 2, "finished": 1}
