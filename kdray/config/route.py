"""Route of a run's rollouts: the sampler and the scorer, decided once, from the config alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kdray.config.run_config import Config


@dataclass(frozen=True)
class Route:
    """Sampler and scorer of a run, and the models that the replicas hold for them."""

    sampler: Literal["teachers", "students", "program"]
    """`teachers`: teacher replicas, with the student or alone. `students`: student-only replicas. `program`: a System-2 program
    that calls the teachers."""
    scored_later: bool
    """The teachers score by prefill what was sampled elsewhere; otherwise rollouts come back scored, or need no scores."""
    teacher_reads: Literal["student_ids", "own_prompts", "own_ids"]
    """Input of a served teacher. `own_prompts`: it has a `prompt_template`. `own_ids`: it has a different tokenizer."""
    student_in_replicas: bool
    """Replicas of teachers also hold the student, to sample with it or for exact divergences: those of all teachers except
    the ones with `holds_student: false`."""
    student_pool: bool
    """Student-only replicas run: to sample, or to be evaluated if no teacher replica holds the student."""
    data_responds: bool
    """Some responses are the data's reference answers."""
    scores_references: bool
    """The teachers score those answers at once; otherwise they are scored with the rest, or need no scores."""
    measures_on_students: bool
    """Student-only replicas sample the evaluated responses."""
    measures_exact: bool
    """The held-out KLs are exact, over the full vocabulary: this needs replicas with both models. Otherwise the student's
    responses are only graded, if the task has a grader."""

    @classmethod
    def of(cls, config: Config) -> Route:
        """The route of a run with this config."""
        by_students = config.rollout.sampler == "student"
        scored_later = by_students or (config.rollout.teachers is not None and config.rollout.teachers.one_target)
        schedule = config.training.schedules.get("rollout.data_share")
        data_responds = max((config.rollout.data_share, *(() if schedule is None else schedule.extremes))) > 0.0
        beside = [config.student_beside(name) for name in config.served_teachers]
        holds_both = not config.other_teachers and all(beside)
        # If the teachers only score by prefill, the recorder must do it, since it sees both rows.
        recorded = all(teacher.scoring == "recorder" for teacher in config.served_teachers.values())
        return cls(
            sampler="program" if config.rollout.program is not None else "students" if by_students else "teachers",
            scored_later=scored_later,
            teacher_reads=(
                "own_ids" if not config.loss.shared_ids else "own_prompts" if config.teacher_needs_own_engine else "student_ids"
            ),
            student_in_replicas=any(beside),
            student_pool=config.has_rollout_pool,
            data_responds=data_responds,
            scores_references=data_responds and not scored_later and bool(config.loss.signals),
            measures_on_students=not holds_both,
            measures_exact=holds_both and (recorded or not by_students),
        )

    def without_student(self) -> Route:
        """The same route with the teachers alone, as in `kdray capture`: they sample every response that is not in the data."""
        return replace(
            self,
            sampler="teachers" if self.sampler == "students" else self.sampler,
            student_in_replicas=False,
            student_pool=False,
            measures_on_students=False,
            measures_exact=False,
        )
