"""Route of a run: who samples, who scores and what is measured, for every way to distill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdray.config import parse_config
from kdray.config.route import Route
from kdray.errors import ConfigError

TEACHER = {"model": {"type": "tiny", "layers": 4}}
FAR: dict[str, Any] = {"type": "openai", "base_url": "http://far/v1", "model": "m", "api_key_env": None}
TEXT = {"rollout": {"alpha": 1.0}, "loss": {"type": "sequence"}}
BY_STUDENT = {"rollout": {"sampler": "student"}, "loss": {"type": "forward_kl"}}


def route(tmp_path: Path, teachers: dict[str, Any] | None = None, **sections: Any) -> Route:
    tree = {
        "run": {"name": "r", "output": str(tmp_path)},
        "student": {"model": {"type": "tiny"}},
        "teachers": teachers or {"t": TEACHER},
    }
    return Route.of(parse_config(tree | sections))


def test_a_mixture_is_drawn_scored_and_measured_by_replicas_that_hold_both(tmp_path: Path) -> None:
    found = route(tmp_path)
    assert found == Route(
        sampler="teachers",
        scored_later=False,
        teacher_reads="student_ids",
        student_in_replicas=True,
        student_pool=False,
        data_responds=False,
        scores_references=False,
        measures_on_students=False,
        measures_exact=True,
    )


def test_what_students_sample_is_scored_later(tmp_path: Path) -> None:
    found = route(tmp_path, **BY_STUDENT)
    assert (found.sampler, found.scored_later, found.student_pool) == ("students", True, True)
    assert found.student_in_replicas
    assert found.measures_exact


def test_plain_prefill_of_what_students_sample_gives_no_exact_divergence(tmp_path: Path) -> None:
    found = route(tmp_path, {"t": TEACHER | {"scoring": "prompt_logprobs"}}, **BY_STUDENT)
    assert not found.measures_exact
    # Beside the student it samples with its recorder, whatever scores by prefill.
    assert route(tmp_path, {"t": TEACHER | {"scoring": "prompt_logprobs"}}, loss={"type": "forward_kl"}).measures_exact


@pytest.mark.parametrize(
    ("teacher", "sections", "reads"),
    [
        (TEACHER | {"prompt_template": "hint: {prompt}"}, BY_STUDENT, "own_prompts"),
        (TEACHER, {"rollout": {"sampler": "student"}, "loss": {"type": "uld"}}, "own_ids"),
    ],
)
def test_a_teacher_that_reads_something_else_holds_no_student(tmp_path, teacher, sections, reads) -> None:
    found = route(tmp_path, {"t": teacher}, **sections)
    assert found.teacher_reads == reads
    assert (found.student_in_replicas, found.student_pool, found.scored_later) == (False, True, True)
    assert (found.measures_on_students, found.measures_exact) == (True, False)


def test_a_teacher_that_only_scores_holds_no_student(tmp_path: Path) -> None:
    found = route(tmp_path, {"t": TEACHER | {"holds_student": False}}, **BY_STUDENT)
    assert (found.student_in_replicas, found.student_pool, found.measures_on_students) == (False, True, True)
    assert not found.measures_exact
    with pytest.raises(ConfigError, match=r"teachers.t.holds_student=false: .* set rollout.sampler=student"):
        route(tmp_path, {"t": TEACHER | {"holds_student": False}})


def test_a_black_box_writes_and_students_are_measured_alone(tmp_path: Path) -> None:
    found = route(tmp_path, {"far": FAR}, **TEXT)
    assert (found.sampler, found.scored_later, found.student_pool) == ("teachers", False, True)
    assert (found.measures_on_students, found.measures_exact) == (True, False)


def test_a_program_samples(tmp_path: Path) -> None:
    program = {"rollout": {"alpha": 1.0, "program": {"type": "direct"}}, "loss": {"type": "sequence"}}
    found = route(tmp_path, **program)
    assert (found.sampler, found.scored_later, found.measures_exact) == ("program", False, True)
    assert found.without_student().sampler == "program"


def test_an_ensemble_scores_what_one_of_it_sampled(tmp_path: Path) -> None:
    def sharing(kind: str) -> dict[str, Any]:
        return {"rollout": {"teachers": {"type": kind}}, "loss": {"type": "forward_kl"}}

    two = {"a": TEACHER, "b": TEACHER}
    assert route(tmp_path, two, **sharing("ensemble")).scored_later
    domains = {"rollout": {"teachers": {"type": "route", "weights": {"a": 1.0, "b": 1.0}}}, "loss": {"type": "forward_kl"}}
    assert not route(tmp_path, two, **domains).scored_later


@pytest.mark.parametrize(
    ("rollout", "loss", "scored"),
    [
        ({"data_share": 0.5}, "forward_kl", True),
        ({"data_share": 0.5, "alpha": 1.0}, "sequence", False),
        ({"data_share": 0.5, "sampler": "student"}, "forward_kl", False),
    ],
)
def test_reference_answers_are_scored_at_once_unless_all_is_scored_later(tmp_path, rollout, loss, scored) -> None:
    found = route(tmp_path, rollout=rollout, loss={"type": loss})
    assert (found.data_responds, found.scores_references) == (True, scored)


def test_a_share_of_the_data_that_only_a_schedule_gives_counts(tmp_path: Path) -> None:
    schedules = {"rollout.data_share": {"type": "linear", "to": 0.5}}
    found = route(tmp_path, loss={"type": "forward_kl"}, training={"schedules": schedules})
    assert found.data_responds
    assert found.scores_references


def test_a_capture_asks_the_teachers_alone(tmp_path: Path) -> None:
    found = route(tmp_path, **(BY_STUDENT | {"rollout": {"sampler": "student", "data_share": 1.0}})).without_student()
    assert (found.sampler, found.student_in_replicas, found.student_pool) == ("teachers", False, False)
    # What the run scores later, the capture scores, too.
    assert found.scored_later
