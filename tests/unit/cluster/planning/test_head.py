"""What the driver's node has to hold: counted from true rollouts and batches, and refused where it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.planning.head import HEAD, check_head, head_lines, head_needs, head_of
from cluster.planning.memory import GIB
from cluster.planning.placement import Node
from kdray.config import Config, parse_config
from kdray.errors import CapacityError
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.columns import rollout_columns, value_of
from kdray.types import Rollout

PROMPT, RESPONSE, BATCH, TEACHER, STUDENT, HIDDEN = 40, 60, 6, 5, 3, 8


def config_of(tmp_path: Path, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"name": "small", "output": str(tmp_path)},
        "data": {"max_prompt_tokens": PROMPT},
        "student": {"model": {"type": "tiny"}},
        "teachers": {"t": {"model": {"type": "tiny"}}},
        "rollout": {"max_new_tokens": RESPONSE, "teacher_top_k": TEACHER, "student_top_k": STUDENT, "max_staleness": 2},
        "training": {"batch_size": BATCH, "micro_batch_size": 2},
    }
    return parse_config(tree | {name: tree.get(name, {}) | values for name, values in sections.items()})


def full_rollout(sample_id: int) -> Rollout:
    """The longest rollout, with every column."""
    shapes = {"token": (RESPONSE,), "support": (RESPONSE, TEACHER + STUDENT), "hidden": (RESPONSE, HIDDEN)}
    values: dict[str, Any] = {column.name: np.zeros(shapes[column.width], column.dtype) for column in rollout_columns()}
    values["writer"] = np.zeros(RESPONSE, np.int8)
    more = {name: values.pop(name) for name in list(values) if name not in Rollout.__dataclass_fields__}
    prompt = np.zeros(PROMPT, np.int32)
    return Rollout(sample_id=sample_id, prompt_id=0, prompt_ids=prompt, alpha=0.2, finish_reason="stop", more=more, **values)


def test_the_sizes_are_those_of_true_rollouts_and_batches(tmp_path: Path) -> None:
    needs = head_needs(config_of(tmp_path), HIDDEN)
    rollouts = [full_rollout(number) for number in range(BATCH)]
    columns = [value_of(each, column.name) for each in rollouts for column in rollout_columns()]
    held = sum(value.nbytes for value in columns if value is not None)
    assert needs.rollouts == held + BATCH * PROMPT * 4
    ones = {each.sample_id: 1.0 for each in rollouts}
    batch = rollouts_to_batch(rollouts, 1, weights=ones, advantages=ones)
    arrays = batch.token_ids.nbytes + batch.loss_mask.nbytes + sum(value.nbytes for value in batch.columns.values())
    assert needs.batch == pytest.approx(arrays, rel=0.02)
    assert needs.memory == 3 * needs.rollouts + 2 * needs.batch


def node(memory: float, store: float, head: bool = False) -> Node:
    return Node({"CPU": 8, "memory": memory, "object_store_memory": store} | ({HEAD: 1.0} if head else {}), name="a")


def test_a_head_that_is_too_small_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    needs = head_needs(config, 0)
    large = node(1e12, 1e12)
    check_head([config], [large, node(needs.memory, needs.store, head=True)])
    with pytest.raises(CapacityError, match=r"driver's node a: this run needs .* GiB of memory.*training.batch_size=6"):
        check_head([config], [large, node(needs.memory - 1, 1e12, head=True)])
    with pytest.raises(CapacityError, match="object_store_memory .and /dev/shm., or lower training.batch_size=6"):
        check_head([config], [large, node(1e12, needs.store - 1, head=True)])
    with pytest.raises(CapacityError):
        check_head([config, config], [node(1e12, needs.store)])
    with pytest.raises(CapacityError):
        check_head([config], [node(needs.memory, needs.store)], used=1.0)


def test_versions_of_the_student_count_in_the_store_of_a_head_that_holds_them(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    needs, gib = head_needs(config, 0), 2.0**30
    nodes = [node(1e12, 1e12), node(1e12, needs.store + gib, head=True)]
    list(head_lines(config, nodes, 0.0, {0: 1e12}))
    list(head_lines(config, nodes, 0.0, {0: 1e12, 1: gib}))
    with pytest.raises(CapacityError, match=r"of Ray's object store \(1\.00 for versions of the student\), and it has"):
        list(head_lines(config, nodes, 0.0, {1: gib + 1}))


def test_a_head_is_named_or_the_only_node() -> None:
    one, other = node(1, 1), node(2, 2, head=True)
    assert head_of([one]) is one
    assert head_of([one, other]) is other
    assert head_of([one, one]) is None


@pytest.mark.parametrize(("store", "code"), [(0.001, 2), (8, 0)])
def test_the_command_refuses_a_described_head(tmp_path: Path, store: float, code: int) -> None:
    recipe, cluster = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(config_of(tmp_path, training={"batch_size": 512, "replay_gib": 0.01}).dump())
    cluster.write_text(
        f"nodes: [{{count: 1, cpus: 4, head: true, memory_gib: 16, object_store_gib: {store}}}, {{count: 1, cpus: 64}}]"
    )
    result = CliRunner().invoke(app, ["plan", str(recipe), "--cluster", str(cluster)])
    assert result.exit_code == code, result.output
    if code:
        assert re.search(
            r"Ray.s object store \(0\.00 for versions of the student\), and it has 0\.00", result.output.replace("\n", " ")
        )
    else:
        assert "driver's node: at most" in result.output
        assert "training.replay_gib=0.01 holds" in result.output


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    recipe, cluster = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(config_of(tmp_path).dump())
    cluster.write_text(f"nodes: [{{count: 2, cpus: 64, memory_gib: {64 * GIB / GIB}}}]")
    result = CliRunner().invoke(app, ["plan", str(recipe), "--cluster", str(cluster)])
    assert "describe it with head: true" in result.output
