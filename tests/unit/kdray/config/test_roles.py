"""A recipe's `cluster` section says where its parts run, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdray.config import Config, load_config, parse_config
from kdray.errors import ConfigError
from kdray.runs.folder import RunFolder


def _tree(**cluster: Any) -> dict[str, Any]:
    return {
        "run": {"name": "x"},
        "student": {"model": "s"},
        "teachers": {"a": {"model": "m"}, "b": {"model": "n", "num_cpus": 3}, "api": {"type": "openai", "model": "z"}},
        "rollout": {"teachers": {"type": "route", "weights": {"a": 1, "b": 1}}},
        "cluster": cluster,
    }


def _config(roles: dict[str, Any], sampler: str = "mixture") -> Config:
    tree = _tree(roles=roles)
    del tree["teachers"]["api"]
    tree["rollout"]["sampler"] = sampler
    return parse_config(tree)


def test_roles_are_laid_over_the_sections_the_specific_one_last() -> None:
    config = _config(
        {
            "teachers.b": {"labels": {"kind": "big"}, "replicas": 4},
            "teachers": {"labels": {"kind": "small"}, "num_gpus": 1},
            "training": {"labels": {"role": "student"}, "ranks": 2, "gpus_per_rank": 1},
            "rollout.pool": {"replicas": 3},
        },
        sampler="student",
    )
    a, b = config.served_teachers.values()
    assert (a.labels, a.replicas, a.num_gpus) == ({"kind": "small"}, 1, 1)
    assert (b.labels, b.replicas, b.num_gpus, b.num_cpus) == ({"kind": "big"}, 4, 1, 3)
    assert (config.training.labels, config.training.ranks) == ({"role": "student"}, 2)
    assert config.rollout.pool.replicas == 3


def test_a_dump_means_the_same_again() -> None:
    config = _config({"teachers": {"labels": {"kind": "small"}}, "training": {"placement": "spread"}})
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            {"techers": {"replicas": 2}},
            r"cluster.roles.techers: no role .*there are teachers, teachers.a, teachers.b",
        ),
        ({"teachers.c": {"replicas": 2}}, r"cluster.roles.teachers.c: no role"),
        ({"teachers": {"model": "other"}}, r"cluster.roles.teachers.model: says nothing about size or place"),
        ({"training": {"learning_rate": 1}}, r"cluster.roles.training.learning_rate: says nothing about size or place"),
        ({"training": {"ranks": 3}}, r"training.batch_size=64 is not a multiple of ranks"),
        ({"training": 3}, r"cluster.roles.training: expected settings"),
        (
            {"rollout.pool": {"replicas": 3}},
            r"cluster.roles.rollout.pool with rollout.sampler=mixture: .*set rollout.sampler=student",
        ),
    ],
)
def test_what_is_no_role_or_no_place_is_refused(roles: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(roles)


@pytest.mark.parametrize(
    ("override", "setting", "value"),
    [
        ("teachers.large.num_gpus=2", "teachers.large.num_gpus", 2),
        ("teachers.large.labels.kind=big", "teachers.large.labels", {"kind": "big"}),
        ("teachers.large={num_gpus: 4}", "teachers.large.num_gpus", 4),
        # Of all teachers; the recipe's own for the one stays.
        ("teachers.num_gpus=3", "teachers.large.num_gpus", 1),
        ("teachers.labels.kind=any", "teachers.small.labels", {"kind": "any"}),
        ("rollout.pool.replicas=3", "rollout.pool.replicas", 3),
        ("training.ranks=2", "training.ranks", 2),
    ],
)
def test_an_override_finds_the_role_whose_name_has_dots(tmp_path: Path, override: str, setting: str, value: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "run: {name: x}\nstudent: {model: s}\nteachers: {large: {model: m}, small: {model: n}}\n"
        "rollout: {sampler: student, teachers: {type: route, weights: {large: 1, small: 1}}}\n"
        "cluster: {roles: {teachers.large: {num_gpus: 1, replicas: 5}, rollout.pool: {num_cpus: 2}}}\n"
    )
    config = load_config(recipe, [f"cluster.roles.{override}"])
    found: Any = config.model_dump()
    for key in setting.split("."):
        found = found[key]
    assert found == value
    assert config.served_teachers["large"].replicas == (5 if "={" not in override else 1), "what else the recipe says there"
    assert config.rollout.pool.num_cpus == 2


@pytest.mark.parametrize(
    ("override", "role"), [("teachers.lrage.num_gpus=2", "teachers.lrage"), ("rollout.replicas=3", "rollout")]
)
def test_an_override_of_no_role_names_those_that_there_are(tmp_path: Path, override: str, role: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {name: x}\nstudent: {model: s}\nteachers: {large: {model: m}}\n")
    with pytest.raises(ConfigError, match=rf"cluster.roles.{role}: no role of this run; there are .*teachers.large"):
        load_config(recipe, [f"cluster.roles.{override}"])


def test_an_api_has_no_place_on_the_cluster() -> None:
    with pytest.raises(ConfigError, match=r"cluster.roles.teachers.api: no role of this run"):
        parse_config(_tree(roles={"teachers.api": {"replicas": 1}}))


def test_a_run_may_move_to_another_cluster_and_another_number_of_ranks(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run: {{name: moved, output: {tmp_path}}}\nstudent: {{model: s}}\nteachers: {{a: {{model: m}}}}\n"
        "cluster: {roles: {teachers: {replicas: 2, labels: {kind: a}}, training: {labels: {kind: b}}}}\n"
    )
    RunFolder.create(load_config(recipe))
    RunFolder.create(load_config(recipe, ["cluster.roles={teachers: {replicas: 5, num_gpus: 1}}"]), resume=True)
    RunFolder.create(load_config(recipe, ["cluster.roles={training: {ranks: 2}}"]), resume=True)
    with pytest.raises(ConfigError, match="student.model: 's' there, 't' now"):
        RunFolder.create(load_config(recipe, ["student.model=t"]), resume=True)
