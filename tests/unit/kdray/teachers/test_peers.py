"""Mutual distillation as configs: every student once, taught by all others, in folders apart."""

from __future__ import annotations

from typing import Any

import pytest

from kdray.config import parse_config
from kdray.errors import ConfigError
from kdray.teachers.peers import peer_configs

BASE: dict[str, Any] = {
    "run": {"name": "x", "seed": 7},
    "student": {"model": {"type": "tiny"}},
    "teachers": {
        "b": {"type": "peer", "model": {"type": "tiny", "width": 96}, "kv_cache_gib": 0.5},
        "c": {"type": "peer", "model": {"type": "tiny", "width": 128}, "kv_cache_gib": 0.25},
    },
    "rollout": {"data_share": 1, "teachers": {"type": "ensemble"}},
    "loss": {"type": "hinton"},
    "evaluation": {"control": True},
}


def test_every_student_has_all_others_as_teachers():
    config = parse_config(BASE)
    found = peer_configs(config, {"b": "/m/b", "c": "/m/c"}, "/m/a")
    teachers = {name: {n: t.model for n, t in each.teachers.items()} for name, each in found.items()}
    assert teachers == {"b": {"student": "/m/a", "c": "/m/c"}, "c": {"student": "/m/a", "b": "/m/b"}}
    assert {name: each.student.model for name, each in found.items()} == {"b": "/m/b", "c": "/m/c"}
    assert {name: str(each.run_folder) for name, each in found.items()} == {"b": "runs/x/peers/b", "c": "runs/x/peers/c"}
    # One pool's size for each pair of the run and that peer.
    assert {each.teachers["student"].kv_cache_gib for each in (found["b"],)} == {0.5}
    for each in found.values():
        assert (each.training, each.loss, each.data, each.run.seed) == (config.training, config.loss, config.data, 7)
        assert not each.evaluation.control
        assert each.peers.keys() == each.teachers.keys()
        # What is written to a peer's folder is a config like any other.
        parse_config(each.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"data_share": 1, "teachers": {"type": "route", "weights": {"b": 1, "c": 1}}}},
            "several peers teach as one",
        ),
        ({"rollout": {"data_share": 1, "teachers": {"type": "ensemble", "weights": {"b": 2, "c": 1}}}}, "peers count alike"),
        ({"teachers": {**BASE["teachers"], "d": {"model": "m"}}}, "keep peers alone"),
        (
            {"teachers": {"b": {"type": "peer", "model": "m"}}, "rollout": {"data_share": 1, "teacher_signal": "hidden"}},
            "teachers change",
        ),
        ({"teachers": {"b": {"type": "peer", "model": {"type": "tiny"}}}, "rollout": {"data_share": 1}}, "stay one model"),
    ],
)
def test_peers_that_cannot_be_alike_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_config(BASE | changes)


def test_a_peer_may_not_have_the_name_of_the_runs_student():
    config = parse_config(BASE | {"teachers": {"student": {"type": "peer", "model": "m"}}, "rollout": {"data_share": 1}})
    with pytest.raises(ConfigError, match=r"teachers\.student: that is what peers call"):
        peer_configs(config, {"student": "m"}, "/m/a")
