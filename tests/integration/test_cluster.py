"""A cluster of several nodes: every part lands where the recipe's cluster section says, and nodes may go in mid-run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from actors.serving.pool import ReplicaPool
from actors.serving.spec import EngineSpec, RunHandles
from actors.student.group import StudentGroup
from actors.weights.store import WeightStore
from cluster.assembly import deployed
from cluster.planning import reservation
from cluster.planning.placement import Bundle, bundles
from cluster.planning.reservation import await_placed, reserved
from cluster.runner import Runner
from kdray.config import ClusterSettings, parse_config
from kdray.errors import CapacityError
from kdray.models.saving import TokenizerSource
from tests.integration.conftest import EOS, VOCAB, TinyModels
from tests.support.runs import check_ledger, finish, json_lines, start, write_recipe

LARGE: dict[str, Any] = {"num_cpus": 1, "labels": {"role": "teacher", "kind": "large"}, "resources": {"large": 1}}
SMALL: dict[str, Any] = {"num_cpus": 1, "labels": {"role": "teacher", "kind": "small"}, "resources": {"small": 1}}
STUDENT: dict[str, Any] = {"num_cpus": 2, "labels": {"role": "student"}}
_STEPS = 300
"""Enough that the run still trains when its nodes go."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Head, two kinds of teacher node, one for the student."""
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "labels": {"role": "head"}, "include_dashboard": False}
    )
    try:
        nodes.add_node(**LARGE)
        nodes.add_node(**SMALL)
        nodes.add_node(**STUDENT)
        nodes.wait_for_nodes()
        ray.init(address=nodes.address, log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def _roles(cluster: Cluster, ranks: int = 2) -> dict[str, Any]:
    return {
        "address": cluster.address,
        "roles": {
            "teachers": {"replicas": 2, "labels": {"kind": "in(large, small)"}, "max_replicas_per_node": 1},
            "training": {"ranks": ranks, "labels": {"role": "student"}},
        },
    }


def _labels() -> dict[str, dict[str, str]]:
    return {node["NodeID"]: node["Labels"] for node in ray.nodes()}


def _places(run_actor: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Node ids of the living actors that `run_actor` picks, from Ray's own table of actors."""
    from ray._private.state import actors

    return [each["Address"]["NodeID"] for each in actors().values() if each["State"] == "ALIVE" and run_actor(each)]


def _replicas() -> list[str]:
    return _places(lambda each: each["ActorClassName"].startswith("ServeReplica:kdray-"))


def _ranks() -> list[str]:
    return _places(lambda each: each["ActorClassName"] == "RayTrainWorker")


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.5)


def _steps(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len(json_lines(run / "metrics.jsonl"))
    return 0


def _announce_end(node_id: str) -> None:
    """As Ray's autoscaler does when the cloud takes an instance back."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, reason = client.drain_node(node_id, preemption, "taken back", int(1000 * (time.time() + 120)))
    assert accepted, reason


def _events(run: Path, field: str) -> list[tuple[str, Any]]:
    return [(event["kind"], event.get(field)) for event in json_lines(run / "events.jsonl")]


@pytest.mark.timeout(1800)
def test_roles_land_where_asked_and_a_run_outlives_the_nodes_of_a_replica_and_a_rank(
    cluster: Cluster, workplace: Path, marker: str
) -> None:
    """The recipe of the other tests with only its cluster section changed; then a teacher's node goes, and the student's,
    which the cluster announces."""
    training = {"steps": _STEPS, "checkpoint_every": 20, "batch_size": 32, "learning_rate": 1e-3}
    recipe = write_recipe(workplace, "placed", training=training, rollout={"max_new_tokens": 8, "retries": 8})
    plain = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(plain | {"cluster": _roles(cluster) | {"health_check_period_s": 2}}))
    process = start("run", str(recipe))
    run = workplace / "runs" / "placed"
    _until(lambda: len(_ranks()) == 2 and len(_replicas()) == 2 and _steps(run) >= 7, "placed and training", 600)
    labels = _labels()
    assert {labels[node].get("kind") for node in _replicas()} == {"large", "small"}
    assert [labels[node].get("role") for node in _ranks()] == ["student", "student"]

    by_label = {(node.get("kind") or node["role"]): node_id for node_id, node in labels.items() if node.get("role")}
    raylets = {each.node_id: each for each in cluster.worker_nodes}
    spare = cluster.add_node(num_cpus=2, labels={"role": "student", "kind": "spare"})
    cluster.remove_node(raylets[by_label["small"]], allow_graceful=False)
    _until(lambda: len(_replicas()) == 1, "the teacher's node is gone")
    before = _steps(run)
    _announce_end(by_label["student"])
    _until(lambda: ("checkpoint_early", "preemption") in _events(run, "reason"), "a checkpoint before the node is taken away")
    cluster.remove_node(raylets[by_label["student"]], allow_graceful=False)
    finish(process, 0, 600)

    assert before < _STEPS, "the student's node went in mid-run"
    check_ledger(run, _STEPS)
    kinds = [event["kind"] for event in json_lines(run / "events.jsonl")]
    assert "replicas" in kinds
    summary = yaml.safe_load((run / "summary.json").read_text())
    assert summary["restarts"] >= 1
    assert [counted for kind, counted in _events(run, "counted") if kind == "ranks_lost"] == [False], "it was announced"
    assert (summary["lost_samples"], summary["duplicated_samples"]) == (0, 0)
    # For the other tests, as it was.
    cluster.remove_node(spare)
    cluster.add_node(**SMALL)
    cluster.add_node(**STUDENT)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_killed_driver_leaves_no_replica_and_the_resumed_run_trains_every_sample_once(
    cluster: Cluster, workplace: Path, marker: str
) -> None:
    training = {"steps": 16, "checkpoint_every": 4, "batch_size": 32, "learning_rate": 3e-3}
    recipe = write_recipe(workplace, "killed", training=training, rollout={"max_new_tokens": 8}, cluster=_roles(cluster))
    process = start("run", str(recipe))
    run = workplace / "runs" / "killed"
    _until(lambda: _steps(run) >= 5, "trained", 400)
    process.kill()
    process.wait()
    _until(lambda: not _replicas() and not _ranks(), "nobody left of the killed run")
    finish(start("run", str(recipe), "--resume"), 0, 400)
    check_ledger(run, 16)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_driver_killed_while_an_engine_loads_leaves_no_application_and_all_resources(
    cluster: Cluster, workplace: Path
) -> None:
    from ray import serve

    recipe = write_recipe(workplace, "loading", training={"steps": 4, "batch_size": 32}, cluster=_roles(cluster))
    process = start("run", str(recipe))
    _until(lambda: bool(_replicas()), "a replica, which starts its engine", 240)
    time.sleep(4)
    process.kill()
    process.wait()
    assert "serving" not in [event["kind"] for event in json_lines(workplace / "runs" / "loading" / "events.jsonl")]

    def free() -> bool:
        held = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
        return not held and not [name for name in serve.status().applications if name.startswith("kdray-")]

    _until(free, "nothing held by the killed run")
    assert not _replicas()
    assert not _ranks()


def test_what_waits_for_room_is_what_the_autoscaler_is_asked_for(cluster: Cluster) -> None:
    """No node has the label: the request waits, is seen as demand with its labels, and its end says what is missing."""
    from ray._raylet import GcsClient
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    wanted = [
        Bundle("teacher big", "teachers.big.replicas", 2, {"CPU": 1.0}, {"kind": "absent"}),
        Bundle("student", "training.ranks", 1, {"CPU": 1.0}),
    ]
    lines: list[str] = []
    seen: list[tuple[dict[str, float], dict[str, list[str]]]] = []

    def tell(line: str) -> None:
        lines.append(line)
        seen.clear()
        state = get_cluster_resource_state(GcsClient(address=cluster.address))
        for gang in state.pending_gang_resource_requests:
            for option in gang.bundle_selectors:
                for request in option.resource_requests:
                    constraints = [c for selector in request.label_selectors for c in selector.label_constraints]
                    selected = {c.label_key: list(c.label_values) for c in constraints}
                    seen.append((dict(request.resources_bundle), selected))

    settings = ClusterSettings(may_grow=True, wait_s=20)
    with pytest.raises(CapacityError, match=r"cluster.wait_s=20: no room .*teachers\.big\.replicas.*no node has these labels"):  # noqa: SIM117
        with reserved(wanted, settings, tell):
            pass
    assert lines
    assert "teachers.big.replicas" in lines[0]
    assert sorted(map(str, seen)) == sorted(
        map(str, [({"CPU": 1.0}, {"kind": ["absent"]}), ({"CPU": 1.0}, {"kind": ["absent"]}), ({"CPU": 1.0}, {})])
    )
    with pytest.raises(CapacityError, match="teachers.big.replicas"), reserved(wanted, ClusterSettings(), tell):
        pass


def test_a_run_waits_for_what_others_hold_and_goes_on_when_it_is_free(cluster: Cluster) -> None:
    holder = ray.util.placement_group([{"large": 1.0}])
    assert holder.wait(20)
    wanted = [Bundle("teacher", "teachers.a.replicas", 1, {"large": 1.0})]
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        ray.util.remove_placement_group(holder)

    with reserved(wanted, ClusterSettings(wait_s=120), tell):
        pass
    assert len(lines) == 1
    assert "1 large" in lines[0]


@pytest.mark.timeout(300)
def test_room_that_others_took_after_the_reservation_is_not_waited_for_for_ever(
    cluster: Cluster, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher's replica, then the student's rank, are started while another holds the only node that has what they need."""
    from ray import serve

    monkeypatch.setattr(reservation, "_START_S", 5.0)
    serve.start(proxy_location="Disabled")
    model = str(tiny_models.make("placed", 2, 64, seed=5))
    needs = {"resources": {"large": 1.0}}
    config = parse_config(
        {
            "run": {"name": "late"},
            "student": {"model": model},
            "teachers": {"a": {"model": model, **needs}},
            "training": needs,
            "cluster": {"wait_s": 0},
        }
    )
    replicas, ranks = bundles(config)
    spec = EngineSpec("teacher", model, None, VOCAB, (EOS,), 64, teacher="a", kv_cache_gib=0.1)
    pool = ReplicaPool("a", spec, config.served_teachers["a"], config.cluster, RunHandles(), retries=0)
    store = ray.remote(WeightStore).options(num_cpus=0).remote()
    tokenizer = TokenizerSource(model)
    student = StudentGroup(config.training, VOCAB, 0, tokenizer, store, tmp_path / "checkpoints", tmp_path / "train")
    job: Any = SimpleNamespace(_config=config, _beside=SimpleNamespace(rank_groups=1))
    holder = ray.util.placement_group([{"large": 1.0}])
    assert holder.wait(20)

    async def both() -> None:
        try:
            with pytest.raises(CapacityError, match=r"cluster.wait_s=0: .*teachers\.a\.replicas: .*1 large"):
                await deployed([pool], [replicas, ranks], config.cluster, lambda kind, **fields: None)
        finally:
            await asyncio.to_thread(pool.delete)
        await student.start()

        def unplaced() -> list[Bundle]:
            return Runner._unplaced_ranks(job, student)

        try:
            with pytest.raises(CapacityError, match=r"training\.ranks: .*1 large"):
                await await_placed(unplaced, config.cluster, lambda kind, **fields: None)
            ray.util.remove_placement_group(holder)
            await await_placed(unplaced, ClusterSettings(wait_s=120), lambda kind, **fields: None)
            assert len(_ranks()) == 1
        finally:
            await student.close()

    asyncio.run(both())
