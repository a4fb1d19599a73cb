"""The table of shapes: what each shape trains on, what a claim is read from, and what an interval says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import evidence_in_process as bench
from benchmarks import kept_rows, shapes
from kdray.config import Config

SMALL = (
    "student.model.width=32",
    "teachers.sums.model.width=32",
    "teachers.sums.model.train.steps=2",
    "teachers.sums.model.train.batch_size=4",
    "training.steps=2",
    "training.warmup_steps=1",
    "training.batch_size=16",
    "training.sft.steps=2",
    "training.sft.batch_size=16",
    "data.heldout_size=4",
)
CACHED = (shapes.weak_start, shapes.forgetful, shapes.styled, shapes.other_teacher)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    full = shapes.config_of

    def config_of(seed: int, *settings: str) -> Config:
        return full(seed, *settings, *SMALL)

    monkeypatch.setattr(bench, "MODELS", tmp_path)
    monkeypatch.setattr(shapes, "config_of", config_of)
    for each in CACHED:
        each.cache_clear()
    yield
    for each in CACHED:
        each.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every distillation: its config, questions and teacher; it is not run."""
    found: list[dict[str, Any]] = []

    def distil(student: Any, teacher: Any, config: Config, dataset: Any, tokenizer: Any) -> int:
        found.append({"student": student, "teacher": teacher, "config": config, "dataset": dataset})
        return 0

    monkeypatch.setattr(shapes, "distil", distil)
    return found


def row(variant: str, seed: int, after: float) -> kept_rows.Row:
    right = {"held-out questions": {"before": 10.0, "after": after, "teacher": 99.0}}
    return {"shape": "staleness", "variant": variant, "rate": "high", "seed": seed, "right": right}


def test_starts_stand_seed_by_seed_and_variants_with_one_start_share_a_line() -> None:
    rows = [row(variant, seed, 80.0) for variant in shapes.STALE_VARIANTS for seed in (0, 100, 101)]
    rows[-1]["right"]["held-out questions"]["before"] = 30.0
    *_, last = shapes.STALE_VARIANTS
    others = "; ".join(variant for variant in shapes.STALE_VARIANTS if variant != last)
    assert shapes.starts_table(rows).splitlines()[2:] == [
        f"| staleness | {others} | held-out questions | 10.0 | 10.0 |",
        f"| staleness | {last} | held-out questions | 10.0 | 30.0 |",
    ]
    assert "| staleness | all | held-out questions | 10.0 | 10.0 |" in shapes.starts_table([*rows[:-1], row(last, 101, 80.0)])


def test_every_name_is_a_row_of_its_own() -> None:
    found = list(shapes.names(list(shapes.SHAPES), list(shapes.RATES), [100, 101]))
    assert len(set(found)) == len(found) == 2 * 2 * sum(len(shape.variants) for shape in shapes.SHAPES.values())
    assert {each.split("; ")[0] for each in found} == set(shapes.SHAPES)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_claim_is_read_from_what_its_shape_measures(shape: str, small: None, calls: list[dict[str, Any]]) -> None:
    found = {variant: {"right": shapes.SHAPES[shape].run(variant, 3, ())} for variant in shapes.SHAPES[shape].variants}
    for claim in (each for each in shapes.CLAIMS if each.shape == shape):
        assert -200.0 <= claim.of(found) <= 200.0


def test_one_question_is_trained_on_that_has_no_label(small: None, calls: list[dict[str, Any]]) -> None:
    def learned(seed: int) -> list[str]:
        return [prompt.text for prompt in shapes.trial_of(seed).dataset.train if prompt.has_reference]

    def first(seed: int) -> str:
        return shapes.trial_of(seed, *shapes.ONE_PROMPT).dataset.train[0].text

    # A seed where the first one has a label, so that it is not taken by chance.
    seed = next(seed for seed in range(3, 20) if first(seed) in learned(seed))
    shapes.one_prompt("one question", seed, ())
    (call,) = calls
    (prompt,) = call["dataset"].train
    assert len(learned(seed)) == 256
    assert prompt.text not in learned(seed)
    assert call["config"].rollout.alpha == 0.0


def test_the_old_self_teaches_the_one_that_forgot(small: None, calls: list[dict[str, Any]]) -> None:
    shapes.forgetting("on-policy reverse KL", 3, ())
    (call,) = calls
    sums = shapes.trial_of(3, *shapes.OLD_SELF)
    old = sums.supervise(shapes.drawn_student(sums), shapes.OLD)
    assert all(torch.equal(left, right) for left, right in zip(old.parameters(), call["teacher"].parameters(), strict=True))
    assert any(not torch.equal(left, right) for left, right in zip(old.parameters(), call["student"].parameters(), strict=True))
    assert call["dataset"].train[0].text.startswith("a"), "distilled on sums, not on the times table"


def test_the_other_teacher_says_the_same_in_another_way() -> None:
    assert shapes.carry_first("a2+0=2 b0+2=2 c1+2=0") == "a0+2=2 b2+0=2 c2+1=0"


def test_a_student_learns_from_the_texts_of_a_teacher(
    small: None, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons: list[list[tuple[str, str]]] = []

    def supervise(student: Any, config: Any, dataset: Any, tokenizer: Any, enough: Any) -> None:
        lessons.append([(prompt.text, prompt.answer) for prompt in dataset.train])

    monkeypatch.setattr(shapes, "supervise", supervise)
    for taught in (shapes.SAME, "other teacher"):
        for place in ("offline", "online"):
            shapes.same_teacher(f"{taught}, {place}", 3, ())
    same, lesson_of_the_other, other = lessons
    labels = {prompt.text: prompt.answer for prompt in shapes.trial_of(3).dataset.train if prompt.answer}
    assert {text for text, _ in same} == {text for text, _ in other} == set(labels)
    assert all(answer != labels[text] for text, answer in [*same, *other]), "the labels, not a teacher's texts"
    assert len(lesson_of_the_other) == 512
    assert lesson_of_the_other[0][1].startswith("a0+"), "there is no sum before the first digit"
    offline, online, *_ = calls
    assert (offline["config"].rollout.max_staleness, online["config"].rollout.max_staleness) == (40, 0)
    assert all(call["teacher"] is not None and call["config"].loss.type == "reverse_kl" for call in calls)
    assert shapes.load_config(shapes.RECIPE, shapes.SUMS).training.steps <= 40, "an offline student would write in the middle"


def test_claims_are_means_over_the_seeds_that_confirm() -> None:
    after = {100: 70.0, 101: 60.0, 102: 50.0, 0: 170.0}
    others = [variant for variant in shapes.STALE_VARIANTS if variant != "reverse KL, 16"]
    rows = [row(variant, seed, 80.0) for variant in others for seed in (*after, 103)]
    rows += [row("reverse KL, 16", seed, right) for seed, right in after.items()]
    (line,) = [each for each in shapes.claims_table(rows).splitlines() if "reverse KL does not" in each]
    # A standard deviation of 10 over three seeds, and t is 4.303 at two degrees of freedom.
    assert line.endswith("| -20.0 (-44.8 to 4.8), 3 | not seen | 0 | too few seeds |")
    assert "| staleness | reverse KL, 0 | held-out questions | high | 4 | 10.0 ± 0.0 | 80.0 ± 0.0 | 99.0 ± 0.0 |" in (
        shapes.scores_table(rows)
    )


@pytest.mark.parametrize(
    ("expected", "low", "high", "said"),
    [
        ("above", 1.0, 9.0, "yes"),
        ("above", -1.0, 9.0, "not seen"),
        ("above", -9.0, -1.0, "no"),
        ("below", -9.0, -1.0, "yes"),
        ("below", 1.0, 9.0, "no"),
        ("below", -9.0, 1.0, "not seen"),
        ("kept", -4.0, 2.0, "yes"),
        ("kept", -9.0, 2.0, "cannot be told"),
        ("kept", -9.0, -6.0, "no"),
        ("kept", 0.0, 0.0, "yes"),
        ("above", 0.0, 0.0, "not seen"),
    ],
)
def test_an_interval_says_yes_no_or_nothing(expected: str, low: float, high: float, said: str) -> None:
    assert shapes.verdict(expected, low, high) == said


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_the_low_rate_is_that_of_every_distillation(shape: str, small: None, calls: list[dict[str, Any]]) -> None:
    for rate in shapes.RATES:
        shapes.SHAPES[shape].run(shapes.SHAPES[shape].variants[0], 3, shapes.RATES[rate])
    high, low = (call["config"].training.learning_rate for call in calls)
    assert low == 3e-4 < high


def test_no_row_is_started_when_the_time_is_up() -> None:
    assert list(shapes.until(float("-inf"), ["a", "b"])) == []
    assert list(shapes.until(float("inf"), ["a", "b"])) == ["a", "b"]
