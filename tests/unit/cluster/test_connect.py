"""How often a Ray of one's own is started. No Ray is."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray
from ray._private import ray_constants

from cluster.connect import connected, start_local
from kdray.config import parse_config

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.mark.parametrize(
    ("errors", "ends_with"),
    [
        ([], None),
        ([SLOW] * 2, None),
        ([SLOW] * 3, "in 3 attempts.*cluster.address.*timed out during"),
        (["no room"], "^no room"),
    ],
)
def test_a_start_that_a_busy_machine_was_too_slow_for_is_repeated(
    monkeypatch: pytest.MonkeyPatch, errors: list[str], ends_with: str | None
) -> None:
    calls: list[dict[str, Any]] = []
    before = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER

    def init(**options: Any) -> None:
        calls.append(options)
        assert not ray_constants.ENABLE_RAY_CLUSTER, "on every interface"
        assert os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] == "0"
        if len(calls) <= len(errors):
            raise Exception(errors[len(calls) - 1])

    monkeypatch.setattr(ray, "init", init)
    if ends_with is None:
        start_local(num_cpus=2)
    else:
        with pytest.raises(Exception, match=ends_with):
            start_local(num_cpus=2)
    assert len(calls) == min(3, len(errors) + (ends_with is None))
    assert all(call["address"] == "local" and call["num_cpus"] == 2 for call in calls)
    assert (dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER) == before


@pytest.mark.parametrize(("where", "variable"), [("local", None), (None, "local"), (None, None)])
def test_local_by_name_is_the_same_as_none(monkeypatch: pytest.MonkeyPatch, where: str | None, variable: str | None) -> None:
    """Ray's own word for it must not lead past the loopback interface and the number of CPUs."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("cluster.connect.start_local", lambda **options: started.append(options))
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail(f"joined {options}"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    tree = {"run": {"name": "x"}, "student": {"model": {"type": "tiny"}}, "teachers": {"t": {"model": {"type": "tiny"}}}}
    config = parse_config(tree | {"cluster": {"address": where, "local_cpus": 3}})
    with connected(config, serving=False):
        pass
    assert [options["num_cpus"] for options in started] == [3]
