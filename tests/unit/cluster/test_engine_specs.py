"""The settings of the run that its engines' specifications carry."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.engine_specs import student_spec, teacher_spec
from kdray.checks.preflight import check
from kdray.config import parse_config

TINY = {"type": "tiny", "layers": 1, "width": 32}


@pytest.mark.parametrize(
    ("cluster", "seconds"), [({}, 3600.0), ({"start_timeout_s": 7200, "stuck_run_after_s": 36000}, 7200.0)]
)
def test_every_engine_has_the_clusters_time_to_start(tmp_path: Path, cluster: dict[str, float], seconds: float) -> None:
    config = parse_config(
        {
            "run": {"name": "x", "output": str(tmp_path)},
            "data": {"prompts": {"type": "task", "tasks": ["last_letters"], "size": 16}, "heldout_size": 4},
            "student": {"model": TINY | {"seed": 1}},
            "teachers": {"t": {"model": TINY}},
            "rollout": {"sampler": "student", "max_new_tokens": 8},
            "cluster": cluster,
        }
    )
    context = check(config).with_models()
    assert teacher_spec(context, "t").start_timeout_s == student_spec(context).start_timeout_s == seconds


def test_an_engine_gets_its_arguments_of_both_kinds(tmp_path: Path) -> None:
    given = {"engine_args": {"block_size": 64}, "unsafe_engine_args": {"log_level": "debug"}}
    config = parse_config(
        {
            "run": {"name": "x", "output": str(tmp_path)},
            "data": {"prompts": {"type": "task", "tasks": ["last_letters"], "size": 16}, "heldout_size": 4},
            "student": {"model": TINY | {"seed": 1}},
            "teachers": {"t": {"model": TINY, **given}},
            "rollout": {"max_new_tokens": 8},
        }
    )
    context = check(config).with_models()
    assert teacher_spec(context, "t").engine_args == {"block_size": 64, "log_level": "debug"}


@pytest.mark.parametrize("holds", [True, False])
def test_a_teacher_that_only_scores_is_an_engine_without_a_student(holds: bool, tmp_path: Path) -> None:
    config = parse_config(
        {
            "run": {"name": "x", "output": str(tmp_path)},
            "data": {"prompts": {"type": "task", "tasks": ["last_letters"], "size": 16}, "heldout_size": 4},
            "student": {"model": TINY | {"seed": 1}},
            "teachers": {"t": {"model": TINY, "holds_student": holds}},
            "rollout": {"sampler": "student", "max_new_tokens": 8},
            "loss": {"type": "forward_kl"},
        }
    )
    spec = teacher_spec(check(config).with_models(), "t")
    assert spec.role == ("mixture" if holds else "teacher")
    assert (spec.student is None, spec.student_revision) == (not holds, None)
