"""What fits on which nodes, as tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planning.placement import Bundle, Node, bundles, check_capacity, matches
from kdray.config import parse_config
from kdray.errors import CapacityError, ConfigError


def _node(resources: dict[str, float] | None = None, /, **labels: str) -> Node:
    return Node(resources or {}, {key.replace("_", "-"): value for key, value in labels.items()})


def _bundle(role: str, count: int, **resources: float) -> Bundle:
    return Bundle(role, f"{role}.replicas", count, {key.replace("__", ":"): value for key, value in resources.items()})


def _picky(role: str, count: int, labels: dict[str, str], **resources: float) -> Bundle:
    return Bundle(role, f"{role}.replicas", count, resources, labels)


EITHER = {"ray.io/accelerator-type": "in(A,B)"}
A = {"ray.io/accelerator-type": "A"}
B = {"ray.io/accelerator-type": "B"}

FITS: list[tuple[list[Bundle], list[Node]]] = [
    ([_bundle("teacher", 2, GPU=1, CPU=1)], [_node({"GPU": 2, "CPU": 4})]),
    ([_bundle("teacher", 2, GPU=2), _bundle("student", 4, GPU=1)], [_node({"GPU": 4}), _node({"GPU": 4})]),
    # Largest first: the halves fill what the wholes leave.
    ([_bundle("student", 2, GPU=0.5), _bundle("teacher", 1, GPU=2)], [_node({"GPU": 1}), _node({"GPU": 2})]),
    (
        [_bundle("teacher", 3, CPU=1, accelerator_type__H100=0.001)],
        [_node({"CPU": 8, "accelerator_type:H100": 1}), _node({"CPU": 1})],
    ),
    ([_picky("teacher", 2, EITHER, GPU=1)], [Node({"GPU": 8}), Node({"GPU": 1}, A), Node({"GPU": 1}, B)]),
    # The picky role first: the other takes the node that is of no use to it.
    ([_bundle("teacher", 1, GPU=4), _picky("student", 1, A, GPU=1)], [Node({"GPU": 4}, A), Node({"GPU": 4})]),
    # A small picky role beside a large one that needs a whole node of the same kind.
    (
        [_picky("student", 1, A, GPU=1), _picky("teacher", 1, EITHER, GPU=4)],
        [Node({"GPU": 4}, A), Node({"GPU": 1}, A)],
    ),
    ([Bundle("student", "training.ranks", 2, {"GPU": 1}, per_node=1)], [Node({"GPU": 8}), Node({"GPU": 8})]),
    ([Bundle("student", "training.ranks", 8, {"GPU": 1}, together=True)], [Node({"GPU": 4}), Node({"GPU": 8})]),
]

DOES_NOT: list[tuple[list[Bundle], list[Node], str]] = [
    (
        [_bundle("teacher", 1, GPU=8)],
        [Node({"GPU": 4}), Node({"GPU": 4})],
        r"teacher\.replicas.*8 GPU on one node, and no node has that \(nodes: 2 x 4 GPU\); ask for less, or add a node$",
    ),
    (
        [Bundle("teacher large", "teachers.large.replicas", 1, {"GPU": 8})],
        [Node({"GPU": 4}), Node({"GPU": 4})],
        r"or add a node; a teacher that needs more GPUs .* vLLM server of your own.*type openai .*A teacher on several nodes",
    ),
    (
        # It is the CPUs that no node has.
        [Bundle("teacher large", "teachers.large.replicas", 1, {"GPU": 4, "CPU": 9})],
        [Node({"GPU": 4, "CPU": 8})],
        r"or add a node$",
    ),
    ([_bundle("teacher", 64, CPU=1)], [Node({"CPU": 2})], r"teacher\.replicas=64 x 1"),
    # The sum is enough, and each fits alone, but not together.
    ([_bundle("teacher", 3, GPU=2)], [Node({"GPU": 3}), Node({"GPU": 3})], r"teacher\.replicas=3.*cannot be placed together"),
    ([_bundle("teacher", 1, accelerator_type__H100=0.001)], [Node({"CPU": 8})], r"accelerator_type:H100"),
    (
        [_picky("teacher", 1, EITHER, GPU=1)],
        [Node({"GPU": 8})],
        r"1 GPU and labels ray.io/accelerator-type=in\(A,B\) on one node, and no node has these labels",
    ),
    ([_picky("teacher", 2, EITHER, GPU=1)], [Node({"GPU": 8}), Node({"GPU": 1}, A)], r"cannot be placed together"),
    (
        [Bundle("student", "training.ranks", 2, {"GPU": 1}, per_node=1)],
        [Node({"GPU": 8})],
        r"training\.ranks=2.*cannot be placed together; after 1",
    ),
    (
        [Bundle("student", "training.ranks", 8, {"GPU": 1}, together=True)],
        [Node({"GPU": 4}), Node({"GPU": 4})],
        r"1 GPU, 8 times on one node",
    ),
]


@pytest.mark.parametrize(("wanted", "nodes"), FITS)
def test_what_fits_is_placed(wanted: list[Bundle], nodes: list[Node]) -> None:
    _check_layout(check_capacity(wanted, nodes), wanted, nodes)


@pytest.mark.parametrize(("wanted", "nodes", "message"), DOES_NOT)
def test_what_can_never_fit_is_refused(wanted: list[Bundle], nodes: list[Node], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        check_capacity(wanted, nodes)


def _check_layout(placed: list[Any], wanted: list[Bundle], nodes: list[Node]) -> None:
    """Everything is somewhere, where it may be, and no node gives more than it has."""
    assert [item.bundle for item in placed] == wanted
    used: list[Counter[str]] = [Counter() for _ in nodes]
    for item in placed:
        assert sum(item.nodes.values()) == item.bundle.count
        assert not item.bundle.together or len(item.nodes) <= 1
        for index, count in item.nodes.items():
            assert matches(nodes[index].labels, item.bundle.labels)
            assert item.bundle.per_node is None or count <= item.bundle.per_node
            for name, amount in item.bundle.resources.items():
                used[index][name] += count * amount
    for node, taken in zip(nodes, used, strict=True):
        assert all(amount <= node.resources.get(name, 0.0) + 1e-6 for name, amount in taken.items())


_NODES = st.lists(
    st.builds(
        Node,
        st.fixed_dictionaries({"GPU": st.integers(0, 8), "CPU": st.integers(1, 16)}),
        st.sampled_from([{}, A, B]),
    ),
    min_size=1,
    max_size=6,
)
_WANTED = st.lists(
    st.builds(
        Bundle,
        st.just("role"),
        st.just("setting"),
        st.integers(1, 5),
        st.fixed_dictionaries({"GPU": st.sampled_from([0.5, 1, 2, 4]), "CPU": st.just(1)}),
        st.sampled_from([{}, A, EITHER, {"ray.io/accelerator-type": "!A"}]),
        st.sampled_from([None, 1, 2]),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, derandomize=True)
@given(_WANTED, _NODES)
def test_a_layout_is_sound_and_a_refusal_of_one_role_is_right(wanted: list[Bundle], nodes: list[Node]) -> None:
    try:
        placed = check_capacity(wanted, nodes)
    except CapacityError:
        if len(wanted) == 1:
            # With one role first-fit is exact: count what each node could take.
            (bundle,) = wanted
            rooms = []
            for node in nodes:
                if matches(node.labels, bundle.labels):
                    room = min(int(node.resources[name] / amount) for name, amount in bundle.resources.items())
                    rooms.append(room if bundle.per_node is None else min(room, bundle.per_node))
            assert (max(rooms, default=0) if bundle.together else sum(rooms)) < bundle.count
        return
    _check_layout(placed, wanted, nodes)


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ({}, {}, True),
        ({"market": "spot"}, {"market": "spot"}, True),
        ({"market": "spot"}, {}, False),
        ({"market": "!spot"}, {"market": "spot"}, False),
        # As Ray has it: a node without the label is not of that value.
        ({"market": "!spot"}, {}, True),
        ({"gpu": "in(A, B)"}, {"gpu": "B"}, True),
        ({"gpu": "in(A,B)"}, {"gpu": "C"}, False),
        ({"gpu": "!in(A,B)"}, {"gpu": "C"}, True),
        ({"gpu": "A", "rack": "1"}, {"gpu": "A", "rack": "2"}, False),
    ],
)
def test_label_selectors(selector: dict[str, str], labels: dict[str, str], expected: bool) -> None:
    assert matches(labels, selector) is expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a b": "c"}, "'a b' is no label of a Ray node"),
        ({"a": "in()"}, r"labels.a='in\(\)': write `value`"),
        ({"a": "x,y"}, r"labels.a='x,y'"),
        ({"a": "!!x"}, r"labels.a"),
    ],
)
def test_labels_that_ray_would_not_take_are_refused(labels: dict[str, str], message: str) -> None:
    tree = {"run": {"name": "x"}, "student": {"model": "s"}, "teachers": {"t": {"model": "m", "labels": labels}}}
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


def test_a_list_of_values_reaches_ray_without_spaces() -> None:
    """Ray 2.60 accepts `in(a, b)` and then never matches b."""
    teacher = {"model": "m", "labels": {"kind": "in(a, b)"}, "replicas": 1}
    config = parse_config({"run": {"name": "x"}, "student": {"model": "s"}, "teachers": {"t": teacher}})
    assert config.served_teachers["t"].label_selector == {"kind": "in(a,b)"}


def test_a_node_with_an_accelerator_resource_has_its_label() -> None:
    found = Node.of_ray({"Resources": {"CPU": 1.0, "accelerator_type:L4": 1.0}, "NodeID": "abc"})
    assert matches(found.labels, {"ray.io/accelerator-type": "in(L4,T4)"})


def test_bundles_of_a_config() -> None:
    tree: dict[str, Any] = {
        "run": {"name": "x"},
        "student": {"model": "s"},
        "teachers": {
            "big": {"model": "t", "replicas": 3, "num_gpus": 2, "tensor_parallel_size": 2, "accelerator_type": "H100"}
        },
        "training": {"ranks": 2, "gpus_per_rank": 1, "batch_size": 64, "placement": "strict_spread", "labels": {"role": "s"}},
    }
    teacher, student = bundles(parse_config(tree))
    assert teacher.count == 3
    assert teacher.resources == {"CPU": 1, "GPU": 2, "accelerator_type:H100": 0.001}
    assert (student.count, student.resources) == (2, {"CPU": 1, "GPU": 1})
    assert (student.labels, student.per_node, student.together) == ({"role": "s"}, 1, False)
    tree["teachers"]["big"]["autoscaling"] = {"min_replicas": 2, "max_replicas": 8}
    assert bundles(parse_config(tree))[0].count == 2
    tree["teachers"]["big"]["autoscaling"] = {"min_replicas": 0, "max_replicas": 8}
    assert bundles(parse_config(tree))[0].count == 1, "it starts with one, whatever it may shrink to"
    tree["rollout"] = {"sampler": "student", "pool": {"replicas": 5, "max_replicas_per_node": 1, "labels": {"a": "!b"}}}
    found = bundles(parse_config(tree))
    assert [bundle.setting for bundle in found] == [
        "teachers.big.autoscaling.initial_replicas",
        "rollout.pool.replicas",
        "training.ranks",
    ]
    assert (found[1].per_node, found[1].labels) == (1, {"a": "!b"})


def test_4096_gpus_on_512_nodes_are_placed() -> None:
    nodes = [Node({"GPU": 8, "CPU": 96}, A if index % 2 else B) for index in range(512)]
    wanted = [
        _picky("teacher", 256, A, GPU=8, CPU=8),
        _picky("rollout", 1024, B, GPU=1, CPU=1),
        _bundle("student", 1024, GPU=1, CPU=1),
    ]
    _check_layout(check_capacity(wanted, nodes), wanted, nodes)
