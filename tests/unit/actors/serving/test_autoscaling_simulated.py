"""The policy and the router over whole traces: a hundred replicas, three accelerator types, hours in seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.serving.autoscaling import CANNOT_BE_PLACED, ScalingRules
from actors.serving.serve_autoscaling import scaling_rules
from kdray.config import AutoscalingSettings
from tests.support.trace_simulator import Hardware, Outcome, Simulation, Step

CLUSTER = {
    "H100": Hardware(tokens_per_s=4000.0, cold_start_s=60.0, capacity=30),
    "A100": Hardware(tokens_per_s=2000.0, cold_start_s=90.0, capacity=40),
    "L4": Hardware(tokens_per_s=500.0, cold_start_s=40.0, capacity=60),
}
RULES = scaling_rules(AutoscalingSettings(min_replicas=4, max_replicas=100, downscale_delay_s=120.0))

# Twenty minutes of light steps, then of heavy ones, twice. The heavy ones keep some thirty replicas at work.
LIGHT, HEAVY = Step(rollouts=256, tokens=200, train_s=20.0), Step(rollouts=4096, tokens=500, train_s=20.0)
BURSTS = [*[LIGHT] * 60, *[HEAVY] * 60, *[LIGHT] * 60, *[HEAVY] * 60, *[LIGHT] * 30]

# (rollouts, mean response tokens, training seconds) in the manner of a reasoning run: answers grow as the student learns to
# think, are cut by a length penalty, and a larger batch comes in at the end.
RECORDED = [
    *[(1024, 180, 14.0), (1024, 196, 14.4), (1024, 231, 15.1), (1024, 305, 16.9), (1024, 418, 19.8), (1024, 566, 23.5)],
    *[(1024, 731, 27.7), (1024, 905, 32.0), (1024, 1088, 36.6), (1024, 1263, 40.9), (1024, 1410, 44.7), (1024, 1522, 47.4)],
    *[(1024, 1490, 46.6), (1024, 1201, 39.4), (1024, 866, 31.1), (1024, 640, 25.4), (1024, 511, 22.2), (1024, 470, 21.2)],
    *[(1024, 462, 21.0), (2048, 455, 41.1), (2048, 449, 40.6), (2048, 452, 40.8), (2048, 447, 40.5), (2048, 450, 40.7)],
]


def fixed(replicas: int) -> ScalingRules:
    return replace(RULES, min_replicas=replicas, max_replicas=replicas)


def simulate(steps: list[Step], rules: ScalingRules, route: str = "soonest") -> Outcome:
    return Simulation(steps, CLUSTER, rules, route).run()


@pytest.fixture(scope="module")
def bursts() -> dict[str, Outcome]:
    """The bursty trace under the policy, and with as few and as many replicas all the time."""
    return {
        "scaled": simulate(BURSTS, RULES),
        "least": simulate(BURSTS, fixed(RULES.min_replicas)),
        "most": simulate(BURSTS, fixed(RULES.max_replicas)),
    }


def test_a_pool_grows_to_a_hundred_replicas_of_three_types_and_back() -> None:
    """More work than the whole cluster can do at the trainer's pace, then next to none."""
    rules = replace(RULES, downscale_delay_s=30.0)
    scaled = simulate([*[Step(8192, 1000, 5.0)] * 30, *[LIGHT] * 120], rules)
    sizes = [target for _, target in scaled.targets]
    assert scaled.most_serving == max(sizes) == 100
    assert sizes[-1] < 50
    assert scaled.reversals == 1


def test_the_pool_follows_a_burst(bursts: dict[str, Outcome]) -> None:
    sizes = [target for _, target in bursts["scaled"].targets]
    assert min(sizes) == 4
    assert 20 < max(sizes) < 50
    assert bursts["most"].most_serving == 100


def test_the_student_waits_less_than_with_the_smallest_pool(bursts: dict[str, Outcome]) -> None:
    assert bursts["scaled"].waited_s < 0.1 * bursts["least"].waited_s
    assert bursts["scaled"].seconds < 0.5 * bursts["least"].seconds


def test_the_pool_costs_less_than_the_largest(bursts: dict[str, Outcome]) -> None:
    assert bursts["scaled"].replica_s < 0.4 * bursts["most"].replica_s


def test_it_grows_for_a_burst_and_shrinks_after_it_without_swinging(bursts: dict[str, Outcome]) -> None:
    """Up and down for each of two bursts is three turns; anything near the 270 steps would be swinging with them."""
    assert 3 <= bursts["scaled"].reversals <= 5


def test_a_recorded_trace() -> None:
    """Eight times over, without a pause."""
    steps = [Step(*values) for values in RECORDED] * 8
    scaled, least, most = simulate(steps, RULES), simulate(steps, fixed(4)), simulate(steps, fixed(100))
    assert scaled.waited_s < 0.1 * least.waited_s
    assert scaled.replica_s < 0.2 * most.replica_s


def test_a_constant_load_comes_to_rest() -> None:
    scaled = simulate([replace(HEAVY, rollouts=2048)] * 400, RULES)
    last_change, size = scaled.targets[-1]
    assert last_change < 0.1 * scaled.seconds, scaled.targets
    assert 4 < size < 40
    assert scaled.reversals == 0


def test_sending_calls_where_they_are_answered_soonest_beats_taking_turns() -> None:
    """Sixty replicas of three types; the ones without a rate yet are tried first."""
    cluster = {kind: replace(hardware, capacity=20) for kind, hardware in CLUSTER.items()}
    steps = [HEAVY] * 60
    routed = Simulation(steps, cluster, fixed(60), "soonest").run()
    turns = Simulation(steps, cluster, fixed(60), "round_robin").run()
    assert routed.waited_s < 0.2 * turns.waited_s
    assert routed.seconds < 0.5 * turns.seconds


def test_on_equal_hardware_the_router_loses_nothing() -> None:
    cluster = {"A100": replace(CLUSTER["A100"], capacity=40)}
    routed = Simulation([HEAVY] * 40, cluster, fixed(40), "soonest").run()
    turns = Simulation([HEAVY] * 40, cluster, fixed(40), "round_robin").run()
    assert routed.seconds < 1.02 * turns.seconds


def test_a_cluster_that_is_full_leaves_the_pool_as_it_is() -> None:
    cluster = {"H100": replace(CLUSTER["H100"], capacity=6)}
    scaled = Simulation([HEAVY] * 60, cluster, RULES).run()
    sizes = [target for _, target in scaled.targets]
    assert scaled.most_serving == 6
    assert sizes == [4, 6, 9], "after the first replicas that do not come, none is asked for on top"
    assert CANNOT_BE_PLACED in scaled.reasons
    assert scaled.events.count("scale_stuck") == 1
    assert scaled.events.count("scale") == len(sizes) - 1


def test_a_type_that_is_full_is_passed_over_for_the_next() -> None:
    cluster = {"H100": replace(CLUSTER["H100"], capacity=6), "L4": CLUSTER["L4"]}
    scaled = Simulation([HEAVY] * 60, cluster, replace(RULES, max_replicas=60)).run()
    assert scaled.most_serving > 40
    assert "scale_stuck" not in scaled.events


def test_the_simulator_itself_on_a_pool_that_fits_on_paper() -> None:
    """One replica of 1000 tokens/s, steps of 160 rollouts x 100 tokens: 16 s of drawing and 10 s of training, overlapping."""
    cluster = {"one": Hardware(tokens_per_s=1000.0, cold_start_s=0.0, capacity=1)}
    found = Simulation([Step(160, 100, 10.0)] * 5, cluster, fixed(1)).run()
    # Drawing never pauses, so a batch is there every 16 s; the last one is trained after it.
    assert found.seconds == pytest.approx(5 * 16 + 10)
    assert found.waited_s == pytest.approx(16 + 4 * 6)
    assert found.replica_s == pytest.approx(90)
    assert found.events == []
