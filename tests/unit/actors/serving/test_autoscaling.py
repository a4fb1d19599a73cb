"""The decision rule by rule, what it never does, the events it causes, and its way through Ray Serve's controller."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentHandleSource, DeploymentID

from actors.serving import deployment
from actors.serving.autoscaling import CANNOT_BE_PLACED, Load, ScaleWatch, ScalingRules, State, decide
from actors.serving.deployment import actor_options
from actors.serving.replica_choice import CallRoute, ReplicaLoad, soonest
from actors.serving.serve_autoscaling import PoolPolicy, scaling_rules, serve_config, summarise
from actors.serving.serve_router import SLOW_FOR_S, ThroughputRouter
from kdray.config import AutoscalingSettings, EngineSettings, parse_config
from kdray.errors import ConfigError

RULES = ScalingRules(
    min_replicas=1,
    max_replicas=8,
    upscale_wait_s=5.0,
    upscale_queue_age_s=60.0,
    upscale_delay_s=30.0,
    upscale_factor=1.5,
    upscale_ongoing=2.0,
    downscale_idle_s=100.0,
    downscale_busy=0.7,
    downscale_delay_s=50.0,
    placement_timeout_s=200.0,
)
FRESH = State()
BUSY = Load(running=2, target=2, ongoing=64.0, busy=2.0)
STARVING = replace(BUSY, waiting_s=10.0)
QUIET = replace(BUSY, busy=0.5)
IDLE = replace(BUSY, ongoing=0.0, busy=0.0, idle_s=100.0)


def follow(load: Load, seconds: float, rules: ScalingRules = RULES, state: State = FRESH, start: float = 0.0) -> Iterator[Any]:
    """(time, target, reason) of a decision a second on a load that does not change, until the target does."""
    now = start
    while now <= start + seconds:
        target, state, reason = decide(load, rules, state, now)
        yield now, target, reason
        if target != load.target:
            return
        now += 1.0


def change(load: Load, seconds: float, rules: ScalingRules = RULES) -> tuple[float, int, str] | None:
    """The first decision that changes the target, None if there is none in time."""
    now, target, reason = list(follow(load, seconds, rules))[-1]
    return None if target == load.target else (now, target, reason)


# ------------------------------------------------------------------------------------------------------------ growing


def test_a_starving_trainer_makes_the_pool_grow_after_the_delay_and_not_before() -> None:
    found = change(STARVING, 1000)
    assert found == (30.0, 3, "the trainer waited 10.0 s of the last window")


def test_an_old_queue_makes_the_pool_grow_without_a_trainer() -> None:
    assert change(replace(BUSY, queue_age_s=59.0), 1000) is None
    assert change(replace(BUSY, queue_age_s=61.0), 1000) == (30.0, 3, "a request has queued for 61 s")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 4), (4, 6), (5, 7), (6, 8), (7, 8), (8, 8)])
def test_growth_is_by_the_factor_at_least_one_and_up_to_the_most(before: int, after: int) -> None:
    (*_, (_, target, _)) = follow(replace(STARVING, running=before, target=before), 100)
    assert target == after


def test_a_break_in_the_wait_starts_the_delay_anew() -> None:
    _, state, _ = decide(STARVING, RULES, State(), 0.0)
    _, state, _ = decide(BUSY, RULES, state, 29.0)
    assert decide(STARVING, RULES, state, 30.0)[0] == 2
    _, state, _ = decide(STARVING, RULES, state, 30.0)
    assert decide(STARVING, RULES, state, 59.9)[0] == 2
    assert decide(STARVING, RULES, state, 60.0)[0] == 3


def test_the_delay_counts_from_when_the_last_new_replica_serves() -> None:
    _, state, _ = decide(STARVING, RULES, State(), 0.0)
    pending = replace(STARVING, target=3)
    for now in range(30, 90):
        target, state, _ = decide(pending, RULES, state, float(now))
        assert target == 3
    found = list(follow(replace(STARVING, running=3, target=3), 100, state=state, start=90.0))[-1]
    assert found[:2] == (120.0, 4)


def test_the_last_rollouts_of_a_batch_make_no_pool_grow() -> None:
    assert change(replace(STARVING, ongoing=3.0), 1000) is None
    assert change(replace(STARVING, ongoing=4.0), 1000) is not None


def test_nothing_is_asked_for_on_top_of_what_is_not_placed() -> None:
    pending = replace(STARVING, running=2, target=4)
    decisions = list(follow(pending, 5000))
    assert len(decisions) == 5001, "the target changed"
    assert {reason for now, _, reason in decisions if now < 200} == {"starting"}
    assert {reason for now, _, reason in decisions if now >= 200} == {CANNOT_BE_PLACED}


def test_what_does_not_come_and_is_not_needed_any_more_is_withdrawn() -> None:
    assert change(replace(BUSY, target=4), 1000) == (50.0, 2, "replicas that did not come are not needed any more")
    assert change(replace(BUSY, running=0, target=4), 1000) is None, "the first replicas are still loading"


# ---------------------------------------------------------------------------------------------------------- shrinking


def test_spare_replicas_go_one_by_one_after_the_delay() -> None:
    load = replace(QUIET, running=4, target=4)
    assert change(load, 1000) == (50.0, 3, "work for 0.5 of 4 replicas")
    assert change(replace(load, busy=2.2), 1000) is None, "three would be at work for more than 0.7 of the time"
    assert change(replace(load, busy=2.0), 1000) is not None


def test_a_pool_that_is_waited_for_a_little_neither_grows_nor_shrinks() -> None:
    assert change(replace(QUIET, waiting_s=2.4), 1000) is not None
    for waiting_s in (2.6, 4.9):
        assert change(replace(QUIET, waiting_s=waiting_s), 1000) is None
    assert change(replace(QUIET, queue_age_s=31.0), 1000) is None


def test_a_pool_without_work_falls_to_its_minimum_at_once() -> None:
    load = replace(IDLE, running=6, target=6)
    assert change(load, 0) == (0.0, 1, "no work for 100 s")
    assert change(replace(load, idle_s=99.0), 0) is None
    assert change(load, 0, replace(RULES, min_replicas=3)) == (0.0, 3, "no work for 100 s")
    assert change(replace(load, target=8), 0) == (0.0, 1, "no work for 100 s"), "also where some were never placed"
    assert change(replace(IDLE, running=1, target=1), 1000) is None


def test_to_zero_only_where_allowed_and_only_from_one() -> None:
    rules = replace(RULES, min_replicas=0)
    assert change(replace(IDLE, running=3, target=3), 0, rules) == (0.0, 1, "no work for 100 s")
    assert change(replace(IDLE, running=1, target=1), 0, rules) == (0.0, 0, "no work for 100 s")
    assert change(replace(QUIET, running=1, target=1, busy=0.0), 1000, rules) is None, "little work is not none"


def test_work_wakes_a_pool_of_zero_at_once() -> None:
    rules = replace(RULES, min_replicas=0)
    asleep = Load(running=0, target=0)
    assert change(asleep, 1000, rules) is None
    assert change(replace(asleep, ongoing=1.0), 0, rules) == (0.0, 1, "work for a pool without replicas")


# ---------------------------------------------------------------------------------------------------------- always


@st.composite
def some_rules(draw: st.DrawFn) -> ScalingRules:
    least = draw(st.integers(0, 5))
    return ScalingRules(
        min_replicas=least,
        max_replicas=draw(st.integers(max(1, least), 20)),
        upscale_wait_s=draw(st.floats(0.1, 29.0)),
        upscale_queue_age_s=draw(st.floats(1.0, 600.0)),
        upscale_delay_s=draw(st.floats(0.0, 20.0)),
        upscale_factor=draw(st.floats(1.0, 4.0)),
        upscale_ongoing=draw(st.floats(0.0, 4.0)),
        downscale_idle_s=draw(st.floats(1.0, 600.0)),
        downscale_busy=draw(st.floats(0.0, 1.0)),
        downscale_delay_s=draw(st.floats(0.0, 20.0)),
        placement_timeout_s=draw(st.floats(1.0, 600.0)),
    )


@st.composite
def some_load(draw: st.DrawFn) -> Load:
    ongoing = draw(st.sampled_from([0.0, 1.0, 5.0, 1000.0]))
    return Load(
        running=draw(st.integers(0, 25)),
        target=draw(st.integers(0, 25)),
        waiting_s=draw(st.floats(0.0, 30.0)),
        queue_age_s=draw(st.floats(0.0, 900.0)),
        ongoing=ongoing,
        idle_s=0.0 if ongoing else draw(st.floats(0.0, 900.0)),
        busy=draw(st.floats(0.0, 25.0)),
    )


@settings(max_examples=300)
@given(some_rules(), st.lists(some_load(), min_size=1, max_size=30))
def test_the_target_is_never_out_of_bounds(rules: ScalingRules, loads: list[Load]) -> None:
    state = State()
    for now, load in enumerate(loads):
        target, state, reason = decide(load, rules, state, float(now))
        assert rules.min_replicas <= target <= rules.max_replicas
        assert reason


@settings(max_examples=300)
@given(some_rules(), some_load(), st.integers(0, 25), st.integers(1, 9))
def test_a_constant_load_never_makes_it_flap(rules: ScalingRules, load: Load, capacity: int, slowness: int) -> None:
    """Whatever the pool reports, as long as it keeps reporting it, the target goes one way, and comes to rest."""
    state, targets = State(), []
    load = replace(load, target=min(max(load.target, rules.min_replicas), rules.max_replicas))
    for now in range(700):
        target, state, _ = decide(load, rules, state, float(now))
        targets.append(target)
        running = min(load.running, target)
        # A replica comes every so many seconds, while there is room for one.
        running += int(running < min(target, capacity) and now % slowness == 0)
        load = replace(load, target=target, running=running)
    steps = {later - earlier for earlier, later in itertools.pairwise(targets)}
    assert not (min(steps) < 0 < max(steps)), targets
    assert len(set(targets[-50:])) == 1


def test_the_state_survives_a_dict_that_holds_other_things() -> None:
    state = State(starving_since=3.0, pending_since=4.0)
    assert State.from_dict({"next_s": 1.0, "decision_counter": 2, **state.to_dict()}) == state
    assert State.from_dict({}) == State()


# ------------------------------------------------------------------------------------------------------------- events


def test_events_tell_every_change_and_every_stall_once() -> None:
    watch = ScaleWatch(placement_timeout_s=10.0)
    seen = {}
    story = [(0, 1, 1), (2, 1, 2), (4, 1, 2), (13, 1, 2), (15, 1, 2), (17, 2, 2), (19, 1, 2), (30, 1, 2), (40, 1, 1)]
    for now, serving, target in story:
        if events := watch.see(serving, target, f"because {now}", float(now)):
            seen[now] = events
    assert seen == {
        2: [("scale", {"before": 1, "now": 2, "reason": "because 2"})],
        13: [("scale_stuck", {"wanted": 2, "now": 1})],
        # The second replica came at 17 and was lost at 19: a stall of its own.
        30: [("scale_stuck", {"wanted": 2, "now": 1})],
        40: [("scale", {"before": 2, "now": 1, "reason": "because 40"})],
    }


# ------------------------------------------------------------------------------------------------------------- routing


def test_the_replica_that_answers_soonest_comes_first() -> None:
    fast, slow = ReplicaLoad(3, 1000.0), ReplicaLoad(0, 200.0)
    assert soonest([slow, fast]) == [1, 0], "4 / 1000 is sooner than 1 / 200"
    assert soonest([slow, replace(fast, calls=5)]) == [0, 1], "6 / 1000 is later than 1 / 200"
    assert soonest([fast, replace(fast, calls=2)]) == [1, 0]
    assert soonest([]) == []


def test_a_replica_without_a_rate_is_tried() -> None:
    known = [ReplicaLoad(1, 300.0), ReplicaLoad(1, 100.0)]
    assert soonest([*known, ReplicaLoad(0, None)])[0] == 2
    assert soonest([*known, ReplicaLoad(2, None)]) == [0, 2, 1], "it counts with the mean rate, 200"
    assert soonest([ReplicaLoad(1, None), ReplicaLoad(0, None)]) == [1, 0]


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(1.0, 1e5)), min_size=1, max_size=12), st.floats(0.01, 100.0))
def test_the_order_is_that_of_the_expected_time_and_units_do_not_matter(seen: list[tuple[int, float]], unit: float) -> None:
    loads = [ReplicaLoad(calls, rate) for calls, rate in seen]
    order = soonest(loads)
    assert sorted(order) == list(range(len(loads)))
    times = [(loads[index].calls + 1) / (loads[index].tokens_per_s or 1.0) for index in order]
    assert times == sorted(times)
    scaled = soonest([ReplicaLoad(calls, rate * unit) for calls, rate in seen])
    again = [(loads[index].calls + 1) / (loads[index].tokens_per_s or 1.0) for index in scaled]
    assert again == pytest.approx(times)


# ------------------------------------------------------------------------------------------------- Ray Serve's side


@dataclass
class Controller:
    """Ray Serve's controller as the policy sees it: it keeps the state, and says what replicas reported."""

    policy: PoolPolicy
    target: int
    running: int
    reports: dict[str, float]
    queued: float = 0.0
    now: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)

    def tick(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            replicas = [f"replica-{index}" for index in range(self.running)]
            old, new = SimpleNamespace(timestamp=0.0, value=-1.0), lambda v: SimpleNamespace(timestamp=1.0, value=v)
            context = SimpleNamespace(
                current_time=self.now,
                policy_state=dict(self.state),
                target_num_replicas=self.target,
                running_replicas=replicas,
                raw_metrics={name: {r: [old, new(value)] for r in replicas} for name, value in self.reports.items()},
                total_queued_requests=self.queued,
            )
            self.target, self.state = self.policy(context)
            # Serve writes into the dictionary that it was given.
            self.state["decision_counter"] = 0


def test_the_policy_grows_and_shrinks_a_pool_over_ticks_of_the_controller() -> None:
    starving = {"waiting_s": 20.0, "queue_age_s": 0.0, "ongoing": 64.0, "idle_s": 0.0, "busy": 1.0}
    controller = Controller(PoolPolicy("t", RULES.__dict__, None), target=1, running=1, reports=starving)
    controller.tick(29)
    assert controller.target == 1
    controller.tick(3)
    assert controller.target == 2
    controller.tick(300)
    assert controller.target == 2, "the second replica does not serve yet"
    controller.running = 2
    controller.reports = {"waiting_s": 0.0, "queue_age_s": 0.0, "ongoing": 0.0, "idle_s": 101.0, "busy": 0.0}
    controller.tick(2)
    assert controller.target == 1


def test_the_newest_reports_become_one_load() -> None:
    def points(*values: float) -> list[Any]:
        return [SimpleNamespace(timestamp=float(at), value=value) for at, value in enumerate(values)]

    metrics = {
        "waiting_s": {"a": points(9.0, 3.0), "b": points(2.0), "gone": points(30.0)},
        "queue_age_s": {"a": points(0.0), "b": points(7.0)},
        "ongoing": {"a": points(4.0), "b": points(5.0)},
        "idle_s": {"a": points(20.0), "b": points(11.0)},
        "busy": {"a": points(0.25), "b": points(0.5)},
    }
    expected = Load(running=2, target=3, waiting_s=3.0, queue_age_s=7.0, ongoing=9.0, idle_s=11.0, busy=0.75)
    assert summarise(metrics, ["a", "b"], target=3, queued=0.0) == expected
    assert summarise(metrics, ["a", "b"], target=3, queued=2.0) == replace(expected, ongoing=11.0, idle_s=0.0)
    # One that has not reported yet might be at work: nothing is taken from the pool.
    unknown = summarise(metrics, ["a", "b", "new"], target=3, queued=0.0)
    assert (unknown.running, unknown.busy, unknown.idle_s) == (3, 3.0, 0.0)
    assert summarise({}, [], target=1, queued=0.0) == Load(running=0, target=1)


def test_the_policy_travels_to_a_controller_without_kdray() -> None:
    config = serve_config("t", AutoscalingSettings(max_replicas=4), None)
    program = (
        "import sys; sys.modules['kdray'] = sys.modules['actors'] = None\n"
        "from ray import cloudpickle\n"
        f"policy = cloudpickle.loads({config.policy.get_serialized_policy_def()!r})(**{config.policy.policy_kwargs!r})\n"
        "from types import SimpleNamespace as N\n"
        "print(policy(N(current_time=0.0, policy_state={}, target_num_replicas=9, running_replicas=[], raw_metrics=None,\n"
        "               total_queued_requests=None))[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4", done.stderr


def test_serve_is_told_bounds_and_no_delays_of_its_own() -> None:
    config = serve_config("t", AutoscalingSettings(min_replicas=0, max_replicas=5, report_every_s=3.0), None)
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 1, 5)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0.0, 0.0, 0.0)
    assert config.look_back_period_s * 0.2 == config.metrics_interval_s == 3.0


# ------------------------------------------------------------------------------------------------------------ settings


def _engine(**teacher: Any) -> EngineSettings:
    tree = {"run": {"name": "x"}, "student": {"model": "s"}, "teachers": {"t": {"model": "t", **teacher}}}
    return parse_config(tree).teachers["t"]


def test_settings_give_the_rules() -> None:
    found = _engine(autoscaling={"min_replicas": 2, "max_replicas": 9, "upscale_wait_s": 7}).autoscaling
    assert found is not None
    assert found.starting_replicas == 2
    rules = scaling_rules(found)
    assert (rules.min_replicas, rules.max_replicas, rules.upscale_wait_s) == (2, 9, 7.0)
    assert {rule.name for rule in fields(ScalingRules)} <= set(AutoscalingSettings.model_fields)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"autoscaling": {}}, r"autoscaling\.max_replicas: required"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, r"min_replicas=3 is more than .*max_replicas=2; lower"),
        ({"autoscaling": {"max_replicas": 2, "initial_replicas": 3}}, r"initial_replicas=3 is not within .*max_replicas=2"),
        ({"autoscaling": {"max_replicas": 2, "upscale_wait_s": 30}}, r"upscale_wait_s=30: .*last 30 seconds.*choose less"),
        (
            {"autoscaling": {"min_replicas": 0, "max_replicas": 2, "downscale_idle_s": 20}},
            r"downscale_idle_s=20 with min_replicas=0.*raise it to 25",
        ),
        ({"autoscaling": {"max_replicas": 2, "target_ongoing_requests": 2}}, r"target_ongoing_requests: unknown key"),
        ({"accelerator_type": "A", "accelerator_types": ["A", "B"]}, r"accelerator_type=A with .*keep one of them"),
        ({"accelerator_types": []}, r"accelerator_types=\[\]: name at least one"),
        ({"accelerator_types": ["A", "A"]}, r"name at least one type, and each once"),
    ],
)
def test_settings_that_cannot_work_are_refused(teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _engine(**teacher)


def test_mixed_hardware_is_asked_for_by_label() -> None:
    assert actor_options(_engine(accelerator_types=["L4", "H100"]))["label_selector"] == {
        "ray.io/accelerator-type": "in(L4,H100)"
    }
    assert "label_selector" not in actor_options(_engine(accelerator_type="L4"))
    assert not _engine(accelerator_types=["L4"]).mixed_hardware


def test_replicas_have_the_environment_of_their_own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's controller, which creates them, is of no job, and passes nothing on."""
    found = {"pip": ["a-package"], "working_dir": "gcs://code.zip", "env_vars": {"A": "1", "OMP_NUM_THREADS": "7"}}
    context = SimpleNamespace(runtime_env=found)
    monkeypatch.setattr(deployment, "ray", SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context))
    options = actor_options(_engine(num_cpus=2))
    assert options["runtime_env"] == found | {"env_vars": {"A": "1", "OMP_NUM_THREADS": "2"}}
    monkeypatch.setattr(deployment, "ray", SimpleNamespace(is_initialized=lambda: False))
    assert actor_options(_engine(num_cpus=2))["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "2"}}


# ---------------------------------------------------------------------------------------------------- Serve's router


def _router() -> ThroughputRouter:
    return ThroughputRouter(deployment_id=DeploymentID(name="t", app_name="a"), handle_source=DeploymentHandleSource.UNKNOWN)


def _request(name: str, route: CallRoute | None = None) -> Any:
    metadata = SimpleNamespace(internal_request_id=name)
    context = SimpleNamespace(should_backoff=False)
    future = asyncio.get_running_loop().create_future()
    return SimpleNamespace(metadata=metadata, future=future, routing_context=context, kwargs={"route": route})


async def _best(router: ThroughputRouter, replicas: list[Any], request: Any, among: set[str] | None = None) -> str:
    (best,), others = await router.choose_replicas(replicas, request)
    assert request.routing_context.should_backoff, "Serve would ask again without a pause where all are full"
    offered = {replica.replica_id for replica in [best, *others]}
    assert offered == ({replica.replica_id for replica in replicas} if among is None else among)
    return best.replica_id


async def test_a_burst_is_split_by_rate_before_any_of_it_is_sent() -> None:
    router = _router()
    replicas: list[Any] = [
        SimpleNamespace(replica_id="fast", routing_stats={"tokens_per_s": 300.0}),
        SimpleNamespace(replica_id="slow", routing_stats={"tokens_per_s": 100.0}),
    ]
    requests = [_request(str(index)) for index in range(8)]
    chosen = [await _best(router, replicas, request) for request in requests]
    assert Counter(chosen) == {"fast": 6, "slow": 2}
    # Serve asks again for a call that was turned away: it counts once, where it is asked for last.
    for _ in range(20):
        await _best(router, replicas, requests[0])
    assert len(router._assigned) == 8


async def test_calls_that_end_or_are_given_up_count_no_more() -> None:
    router = _router()
    replicas: list[Any] = [SimpleNamespace(replica_id=name, routing_stats={}) for name in ("a", "b")]
    sent, given_up = _request("sent"), _request("given up")
    assert [await _best(router, replicas, request) for request in (sent, given_up)] == ["a", "b"]
    router.on_request_routed(sent, "a", None)
    given_up.future.cancel()
    assert await _best(router, replicas, _request("third")) == "b", "the one given up holds b no more"
    router.on_request_completed("a", "sent")
    assert await _best(router, replicas, _request("fourth")) == "a"
    # Its end may be told before its beginning.
    router.on_request_routed(sent, "a", None)
    assert "sent" not in router._assigned


class _Sent:
    """A router of replicas a and b, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("actors.serving.serve_router.time.monotonic", lambda: self.now)
        self.router = _router()
        self.replicas: list[Any] = [SimpleNamespace(replica_id=name, routing_stats={}) for name in ("a", "b")]

    async def ask(self, name: str, among: str = "ab", instead_of: str | None = None) -> tuple[str, Any]:
        """Where Serve would send a call. Args: among: the replicas that it may go to at all."""
        request = _request(name, CallRoute(f"ticket of {name}", None if instead_of is None else f"ticket of {instead_of}"))
        return await _best(self.router, self.replicas, request, set(among)), request

    async def send(self, name: str, among: str = "ab", instead_of: str | None = None) -> str:
        replica, request = await self.ask(name, among, instead_of)
        self.router.on_request_routed(request, replica, None)  # type: ignore[arg-type]
        return replica

    def end(self, replica: str, *names: str) -> None:
        for name in names:
            self.router.on_request_completed(replica, name)  # type: ignore[arg-type]


async def test_a_copy_of_a_slow_call_goes_elsewhere_and_so_do_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = _Sent(monkeypatch)
    assert [await sent.send("first"), await sent.send("second")] == ["a", "b"]
    assert await sent.send("copy", "b", instead_of="first") == "b"
    # Not even where b is full: a is no second choice.
    assert [await sent.send(name, "b") for name in ("third", "fourth")] == ["b", "b"]
    sent.end("b", "second", "copy", "third", "fourth")
    sent.end("a", "first")
    sent.now += SLOW_FOR_S + 1
    assert await sent.send("later") == "a", "it is tried again"
    assert await sent.send("late copy", instead_of="first") == "b"
    assert await sent.send("last") == "a", "a call that had ended is not held against its replica"


async def test_a_copy_does_not_go_to_the_same_replica_where_all_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = _Sent(monkeypatch)
    assert [await sent.send("first"), await sent.send("second")] == ["a", "b"]
    assert await sent.send("copy", "b", instead_of="first") == "b"
    assert await sent.send("other copy", "a", instead_of="second") == "a", "a had fewer calls, but is slow too"
    assert await sent.send("third copy", "b", instead_of="other copy") == "b", "by calls alone it would be a again"
    assert await sent.send("next", "ab") == "a", "where all are slow, all are there"
    sent.replicas.pop()
    assert await sent.send("no other", "a", instead_of="next") == "a"


async def test_a_call_that_waits_for_a_replica_is_held_against_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = _Sent(monkeypatch)
    await sent.ask("waits")
    assert await sent.send("copy", instead_of="waits") == "b"
    assert await sent.send("next") == "a"
