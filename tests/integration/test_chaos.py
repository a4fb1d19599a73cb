"""A short schedule of faults on real engines; `make chaos` has a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.chaos import Chaos, cluster_of, recipe_of, schedule, steps_for
from tests.support.runs import json_lines


@pytest.mark.timeout(900)
def test_a_run_survives_a_seed_of_short_faults(workplace: Path, marker: str) -> None:
    """Of different kinds, each over in seconds: an engine, a rank, the driver, a signal, and the controller of Serve."""
    kinds = ["kill_engine", "kill_rank", "kill_driver", "interrupt", "kill_controller"]
    wanted = schedule(1, len(kinds), kinds)
    with cluster_of(1) as cluster:
        recipe = recipe_of(workplace, "short", cluster.address, steps_for(len(wanted)))
        chaos = Chaos(recipe, cluster, 1, wanted)
        chaos.run()
    outcome = chaos.outcome
    assert sorted(outcome.faults) == sorted(kinds)
    assert sorted(outcome.codes) == [-9, 0, 130]
    assert outcome.events["ranks_lost"] == 1
    assert outcome.failures == []
    # `kdray verify` has found nothing wrong, or it had not come to here.
    assert "each in its step" in outcome.verified
    assert (outcome.summary["lost_samples"], outcome.summary["duplicated_samples"]) == (0, 0)


@pytest.mark.timeout(1500)
@pytest.mark.full
def test_a_run_survives_a_stuck_engine_a_lost_stream_a_full_disk_and_a_corrupt_checkpoint(workplace: Path, marker: str) -> None:
    wanted = ["stop_engine", "lose_stream", "kill_rank", "corrupt_checkpoint", "full_disk"]
    with cluster_of(1) as cluster:
        recipe = recipe_of(workplace, "disturbed", cluster.address, steps_for(len(wanted)))
        chaos = Chaos(recipe, cluster, 0, wanted)
        chaos.run()
    outcome = chaos.outcome
    assert outcome.faults == wanted
    # Killed before its checkpoint was broken, and out of room once.
    assert outcome.starts == 3
    assert outcome.codes == [-9, 1, 0]
    assert outcome.events["retry"] >= 1, "the stuck engine's samples were asked for again"
    assert outcome.events["request_lost"] >= 1, "that of the stream that stopped in the middle"
    assert outcome.events["replicas"] >= 1
    assert outcome.events["checkpoint_not_whole"] == 1
    assert (outcome.summary["lost_samples"], outcome.summary["duplicated_samples"]) == (0, 0)


@pytest.mark.timeout(1500)
@pytest.mark.full
def test_a_run_under_supervision_survives_five_ranks_its_weights_its_mailbox_and_its_driver(
    workplace: Path, marker: str
) -> None:
    others = ["kill_weight_store", "kill_mailbox", "kill_driver"]
    wanted = ["kill_rank", others[0], "kill_rank", others[1], "kill_rank", others[2], "kill_rank", "kill_rank"]
    with cluster_of(1) as cluster:
        recipe = recipe_of(workplace, "supervised", cluster.address, 30 * len(wanted))
        chaos = Chaos(recipe, cluster, 0, wanted, supervise=True)
        chaos.run()
    outcome = chaos.outcome
    assert outcome.faults == wanted
    # One invocation.
    assert (outcome.starts, outcome.codes) == (1, [0])
    assert outcome.events["start"] == 1 + len(others)
    assert outcome.events["ranks_lost"] >= 5
    failed = [
        event["reason"] for event in json_lines(workplace / "runs" / "supervised" / "events.jsonl") if event["kind"] == "failed"
    ]
    assert [any(name in reason for reason in failed) for name in ("WeightStore", "mailbox")] == [True, True]
    assert (outcome.summary["lost_samples"], outcome.summary["duplicated_samples"]) == (0, 0)
