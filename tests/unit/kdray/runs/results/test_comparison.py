"""The verdict on a run, the share of the gap closed, warnings and first lines, against hand-computed values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdray.config import parse_config
from kdray.runs.folder import RunFolder
from kdray.runs.results.comparison import TeacherFacts, compare, compared, headlines, show_interval
from kdray.runs.results.draws import Draw, ratios, write_draws

FIXED = TeacherFacts(left_out=None, changes=False)
PROMPTS = 200


def draws_of(right: int | None = None, kl: float | None = None, tokens: int = 4, loops: int = 0) -> list[Draw]:
    """One draw a prompt: the first `right` are right, the first `loops` end in a loop, and KLs alternate around `kl`."""
    return [
        Draw(
            prompt_id=n,
            draw=0,
            domain=None,
            tokens=tokens,
            truncated=False,
            repeats=n < loops,
            exact_match=None if right is None else n < right,
            reverse_kl=None if kl is None else tokens * kl * (0.8 if n % 2 else 1.2),
            forward_kl=None,
            top_overlap=None,
        )
        for n in range(PROMPTS)
    ]


def comparison(facts: TeacherFacts = FIXED, /, **evaluations: list[Draw]) -> dict[str, Any]:
    found = {name: ratios(draws) for name, draws in evaluations.items()}
    summary: dict[str, Any] = {name: {key: each.value for key, each in of.items()} for name, of in found.items()}
    return summary | compared(summary, found, facts)


def test_a_run_that_beats_before_and_its_control() -> None:
    found = comparison(before=draws_of(40), after=draws_of(120), control=draws_of(80), teacher=draws_of(180))
    assert found["verdict"].startswith("Distillation raised exact match from 20.0% to 60.0% (+40.0 points, 95% interval +33")
    assert "; the student beats its control, 40.0% (+20.0 points, 95% interval +1" in found["verdict"]
    gap = found["gap_closed"]
    assert (gap["metric"], gap["reference"], gap["reason"]) == ("exact_match", "teacher", None)
    assert gap["value"] == pytest.approx((0.6 - 0.2) / (0.9 - 0.2))
    assert 0.45 < gap["low"] < gap["value"] < gap["high"] < 0.68
    lines = headlines(found)
    assert lines[0].startswith("Share of the gap to the teacher closed: 57% (95% interval ")
    assert lines[0].endswith(", by exact match.")
    assert lines[1] == found["verdict"]
    assert lines[2:] == []
    assert found["teacher_left_out"] is None
    assert found["differences"]["after - before"]["exact_match"]["value"] == pytest.approx(0.4)
    low, high = found["intervals"]["before"]["exact_match"]
    assert low == pytest.approx(0.2 - 1.96 * np.sqrt(0.16 / PROMPTS), abs=0.01)
    assert show_interval(found["intervals"], "before", "exact_match") == f" ({low:.3g} to {high:.3g})"
    assert show_interval(found["intervals"], "before", "distinct_1") == show_interval(None, "before", "exact_match") == ""


@pytest.mark.parametrize(
    ("before", "after", "control", "parts"),
    [
        (40, 40, 41, ["Exact match after distillation, 20.0%, is not distinguishable from before, 20.0%", "20.5%"]),
        (40, 41, 80, ["not distinguishable from before", "falls short of its control, 40.0% (-19.5 points"]),
        (80, 40, None, ["Distillation lowered exact match from 40.0% to 20.0% (-20.0 points", "; no control was trained."]),
        (40, 120, 118, ["raised exact match", "the student is not distinguishable from its control, 59.0% (+1.0 points"]),
    ],
)
def test_the_verdict_says_what_the_intervals_allow(before: int, after: int, control: int | None, parts: list[str]) -> None:
    others = {} if control is None else {"control": draws_of(control)}
    verdict = comparison(before=draws_of(before), after=draws_of(after), **others)["verdict"]
    for part in parts:
        assert part in verdict
    assert verdict.endswith(".")
    assert verdict.count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (41, "the teacher is not distinguishable from the student before: 20.5% and 20.0% (+0.5 points"),
        (10, "the teacher is worse than the student before: 5.0% and 20.0% (-15.0 points"),
    ],
)
def test_no_share_of_a_gap_that_is_not_there(teacher: int, reason: str) -> None:
    found = comparison(before=draws_of(40), after=draws_of(120), teacher=draws_of(teacher))
    gap = found["gap_closed"]
    assert (gap["value"], gap["low"], gap["high"]) == (None, None, None)
    assert gap["reason"].startswith(reason)
    assert headlines(found)[0] == found["verdict"], "a share that is undefined is no first number"
    assert headlines(found)[1].startswith(f"Share of the gap to the teacher closed: undefined, since {reason}")


def test_numbers_that_are_all_equal_are_not_certain() -> None:
    found = comparison(before=draws_of(0), after=draws_of(0), control=draws_of(0), teacher=draws_of(PROMPTS))
    gap = found["gap_closed"]
    assert gap["value"] == 0.0
    assert -0.05 < gap["low"] < -0.02
    assert 0.02 < gap["high"] < 0.05
    assert "0.0%, is not distinguishable from before, 0.0% (+0.0 points, 95% interval -1.8 to +1.8)" in found["verdict"]
    assert headlines(found)[0] == "Share of the gap to the teacher closed: 0% (95% interval -2% to 2%), by exact match."


def test_no_gap_where_not_even_the_teacher_is_right() -> None:
    found = comparison(before=draws_of(0), after=draws_of(0), teacher=draws_of(0))
    assert (found["gap_closed"]["value"], found["gap_closed"]["low"]) == (None, None)
    assert headlines(found)[1] == (
        "Share of the gap to the teacher closed: undefined, since no response to 200 held-out prompts is right, neither the "
        "student's nor the teacher's."
    )


def test_without_a_score_of_the_teacher_the_gap_is_that_of_the_reverse_kl() -> None:
    left_out = TeacherFacts("nothing grades the held-out prompts", changes=False)
    found = comparison(left_out, before=draws_of(kl=2.0), after=draws_of(kl=0.5))
    assert found["gap_closed"]["value"] == pytest.approx(1 - 0.5 / 2.0)
    assert found["gap_closed"]["low"] == pytest.approx(0.75), "KLs that are all a quarter of those before leave no spread"
    assert found["verdict"].startswith("Distillation lowered reverse KL from 2 nats per token to 0.5 nats per token (-1.5 nats")
    assert headlines(found)[0].startswith("Share of the gap to the teacher closed: 75% (")
    assert headlines(found)[2] == "The teacher's own score is left out: nothing grades the held-out prompts."
    better = comparison(left_out, before=draws_of(kl=2.0), after=draws_of(kl=0.5), control=draws_of(kl=1.0))
    assert "the student beats its control, 1 nats per token (-0.5 nats" in better["verdict"]


@pytest.mark.parametrize(
    ("teacher", "before", "reason"),
    [
        (TeacherFacts("teacher ema changes during the run", True), 2.0, "the teacher changes during the run"),
        (FIXED, 1e-5, "the student began at the teacher (1e-05 nats per token)"),
        (TeacherFacts("teacher a returns text only", False), None, "teacher a returns text only"),
        (FIXED, None, "the responses of before, after or the teacher are not stored"),
    ],
)
def test_the_gap_in_reverse_kl_is_undefined_too(teacher: TeacherFacts, before: float | None, reason: str) -> None:
    found = comparison(teacher, before=draws_of(kl=before), after=draws_of(kl=before))
    assert (found["gap_closed"]["value"], found["gap_closed"]["reason"]) == (None, reason)
    said = [line for line in headlines(found) if str(found["teacher_left_out"]) in line]
    assert len(said) == 1, "once"


def test_a_programs_score_stands_for_its_teacher() -> None:
    found = comparison(before=draws_of(40, kl=1.0), after=draws_of(120, kl=2.0), program=draws_of(180))
    assert (found["gap_closed"]["reference"], found["gap_closed"]["value"]) == ("program", pytest.approx(4 / 7))


def test_what_cannot_be_compared_is_said() -> None:
    ungraded = comparison(before=draws_of(), after=draws_of())
    assert ungraded["verdict"] == (
        "Before and after cannot be compared: nothing grades the held-out prompts, and no replica holds both models."
    )
    moving = comparison(TeacherFacts(None, True), before=draws_of(kl=1.0), after=draws_of(kl=0.1))
    assert moving["verdict"].endswith("and the teacher changes during the run.")


def test_responses_that_degenerate_are_a_warning() -> None:
    fine = comparison(before=draws_of(40, loops=2), after=draws_of(120, loops=3))
    assert fine["warnings"] == []
    found = comparison(before=draws_of(40, tokens=4, loops=2), after=draws_of(120, tokens=6, loops=30))
    longer, loops = found["warnings"]
    assert longer.startswith("responses became longer: 4 tokens before, 6 after (+2, ")
    assert loops.startswith("more responses end in a loop: 1.0% before, 15.0% after (+14.0 points, ")
    assert headlines(found)[-2:] == [f"Warning: {longer}", f"Warning: {loops}"]
    assert comparison(before=draws_of(40, tokens=8), after=draws_of(40, tokens=9))["warnings"] == [], "a little longer"


def test_responses_without_an_end_are_a_warning() -> None:
    cut = [replace(draw, truncated=draw.prompt_id < PROMPTS * 0.6) for draw in draws_of(40)]
    (found,) = comparison(before=draws_of(40), after=cut)["warnings"]
    assert found.startswith("60% of the responses after training are cut off at rollout.max_new_tokens")
    assert comparison(before=cut, after=draws_of(40))["warnings"] == []


def test_few_prompts_are_a_warning() -> None:
    found = comparison(before=draws_of(40)[:12], after=draws_of(120)[:12])
    assert found["warnings"] == ["12 held-out prompts are few: intervals from fewer than 30 tend to be too narrow."]


def test_before_and_after_on_other_prompts_are_compared_on_those_that_both_have() -> None:
    """A resume may change `evaluation.prompts`: the difference is of 40 prompts, and so are the scores beside it."""
    found = comparison(before=draws_of(20)[:40], after=draws_of(36)[:150])
    assert found["verdict"].startswith("Distillation raised exact match from 50.0% to 90.0% (+40.0 points")
    assert found["warnings"] == [
        "before was measured on 40 held-out prompts and after on 150: the verdict and the differences are "
        "of those that both have."
    ]
    assert found["after"]["exact_match"] == pytest.approx(0.24), "the table has all of them"
    assert comparison(before=draws_of(20), after=draws_of(36))["warnings"] == []
    none = comparison(before=draws_of(20)[:40], after=draws_of(36)[40:])
    assert none["verdict"].startswith("Before and after cannot be compared")


def test_a_folder_without_the_files_has_numbers_without_intervals(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    summary = {"before": {"exact_match": 0.2}, "after": {"exact_match": 0.6}, "control": {"exact_match": 0.5}, "teacher": None}
    found = compare(folder, summary, [], FIXED)
    assert found["verdict"].startswith("Exact match was 20.0% before and 60.0% after distillation; there is no interval, since")
    assert found["intervals"] == {}
    write_draws(folder.evaluations / "after.parquet", draws_of(120))
    write_draws(folder.evaluations / "teacher.parquet", draws_of(180))
    found = compare(folder, summary, [], FIXED)
    assert set(found["intervals"]) == {"after"}, "the summary has no teacher"
    assert found["verdict"].startswith("Exact match was 20.0% before")
    write_draws(folder.evaluations / "before.parquet", draws_of(40))
    found = compare(folder, summary, [], FIXED)
    assert found["verdict"].endswith("; the control is at 50.0%, without an interval.")
    assert headlines({}) == []


@pytest.mark.parametrize(
    ("loss", "finetune", "words"),
    [
        ({}, 0, "Distillation"),
        ({"reward_weight": 1.0}, 0, "Distillation and a reward"),
        ({"reward_weight": 1.0, "distillation_weight": 0.0}, 0, "A reward alone"),
        ({"reward_weight": 1.0}, 5, "Distillation, a reward and fine-tuning"),
        ({}, 5, "Distillation and fine-tuning"),
    ],
)
def test_the_verdict_names_what_trained(loss: dict[str, float], finetune: int, words: str) -> None:
    tiny = {"model": {"type": "tiny"}}
    tree = {"run": {"name": "x"}, "student": tiny, "teachers": {"t": tiny}, "rollout": {"samples_per_prompt": 2}}
    config = parse_config(tree | {"loss": loss, "training": {"finetune": {"steps": finetune}}})
    facts = replace(FIXED, trained_by=config.trained_by)
    raised = comparison(facts, before=draws_of(right=40), after=draws_of(right=120))["verdict"]
    assert raised.startswith(f"{words} raised exact match from 20.0% to 60.0%")
    same = comparison(facts, before=draws_of(right=40), after=draws_of(right=40))["verdict"]
    assert same.startswith(f"Exact match after {words[:1].lower()}{words[1:]}, 20.0%, is not distinguishable")
