"""What fits on which nodes, as tables."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.placement import Bundle, bundles, check_capacity
from kdray.config import parse_config
from kdray.errors import CapacityError


def _bundle(role: str, count: int, **resources: float) -> Bundle:
    return Bundle(role, f"{role}.replicas", count, {key.replace("__", ":"): value for key, value in resources.items()})


def _either(role: str, count: int, **resources: float) -> Bundle:
    return Bundle(role, f"{role}.replicas", count, resources, ("accelerator_type:A", "accelerator_type:B"))


FITS: list[tuple[list[Bundle], list[dict[str, float]]]] = [
    ([_bundle("teacher", 2, GPU=1, CPU=1)], [{"GPU": 2, "CPU": 4}]),
    ([_bundle("teacher", 2, GPU=2), _bundle("student", 4, GPU=1)], [{"GPU": 4}, {"GPU": 4}]),
    # Largest first: the halves fill what the wholes leave.
    ([_bundle("student", 2, GPU=0.5), _bundle("teacher", 1, GPU=2)], [{"GPU": 1}, {"GPU": 2}]),
    ([_bundle("teacher", 3, CPU=1, accelerator_type__H100=0.001)], [{"CPU": 8, "accelerator_type:H100": 1}, {"CPU": 1}]),
    ([_either("teacher", 2, GPU=1)], [{"GPU": 8}, {"GPU": 1, "accelerator_type:A": 1}, {"GPU": 1, "accelerator_type:B": 1}]),
]

DOES_NOT: list[tuple[list[Bundle], list[dict[str, float]], str]] = [
    ([_bundle("teacher", 1, GPU=8)], [{"GPU": 4}, {"GPU": 4}], r"teacher\.replicas.*8 GPU on one node.*no node has that"),
    ([_bundle("teacher", 64, CPU=1)], [{"CPU": 2}], r"teacher\.replicas=64 x 1"),
    # The sum is enough, and each fits alone, but not together.
    ([_bundle("teacher", 3, GPU=2)], [{"GPU": 3}, {"GPU": 3}], r"teacher\.replicas=3.*cannot be placed together"),
    ([_bundle("teacher", 1, accelerator_type__H100=0.001)], [{"CPU": 8}], r"accelerator_type:H100"),
    ([_either("teacher", 1, GPU=1)], [{"GPU": 8}], r"1 GPU and one of accelerator_type:A, accelerator_type:B on one node"),
    ([_either("teacher", 2, GPU=1)], [{"GPU": 8}, {"GPU": 1, "accelerator_type:A": 1}], r"cannot be placed together"),
]


@pytest.mark.parametrize(("wanted", "nodes"), FITS)
def test_what_fits_passes(wanted: list[Bundle], nodes: list[dict[str, float]]) -> None:
    check_capacity(wanted, nodes)


@pytest.mark.parametrize(("wanted", "nodes", "message"), DOES_NOT)
def test_what_can_never_fit_is_refused(wanted: list[Bundle], nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        check_capacity(wanted, nodes)


def test_bundles_of_a_config() -> None:
    tree: dict[str, Any] = {
        "run": {"name": "x"},
        "student": {"model": "s"},
        "teachers": {
            "big": {"model": "t", "replicas": 3, "num_gpus": 2, "tensor_parallel_size": 2, "accelerator_type": "H100"}
        },
        "training": {"ranks": 2, "gpus_per_rank": 1, "batch_size": 64},
    }
    teacher, student = bundles(parse_config(tree))
    assert teacher.count == 3
    assert teacher.resources == {"CPU": 1, "GPU": 2, "accelerator_type:H100": 0.001}
    assert (student.count, student.resources) == (2, {"CPU": 1, "GPU": 1})
    tree["teachers"]["big"]["autoscaling"] = {"min_replicas": 2, "max_replicas": 8}
    assert bundles(parse_config(tree))[0].count == 2
    tree["teachers"]["big"]["autoscaling"] = {"min_replicas": 0, "max_replicas": 8}
    assert bundles(parse_config(tree))[0].count == 1, "it starts with one, whatever it may shrink to"
    tree["rollout"] = {"sampler": "student", "pool": {"replicas": 5}}
    assert [bundle.setting for bundle in bundles(parse_config(tree))] == [
        "teachers.big.autoscaling.initial_replicas",
        "rollout.pool.replicas",
        "training.ranks",
    ]
