"""Graders: what counts as the same answer, references that cannot be used, and graders that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kdray.config import load_config, parse_config
from kdray.config.graders import GRADERS
from kdray.config.plugins import implemented
from kdray.data.dataset import load_dataset
from kdray.data.graders import Grader, Grading, grading_of
from kdray.errors import ConfigError, DataError, ResponseError
from kdray.models.resolve import task_tokenizer
from kdray.types import Prompt


def prompt(answer: str | None, number: int = 7, domain: str | None = None) -> Prompt:
    return Prompt(number, np.array([1], np.int32), "how many?", answer, domain)


def grader(kind: str, **settings: Any) -> Grader:
    made: Grader = implemented(GRADERS.parse({"type": kind} | settings))
    return made


def right(made: Grader, response: str, answer: str) -> bool:
    return made.grade(prompt(answer), response)


@pytest.fixture(scope="module")
def mathematical() -> Grader:
    return grader("math")


@pytest.mark.parametrize(
    ("response", "answer", "same"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", True),
        ("The answer is $(x+1)^2$.", "$x^2+2x+1$", True),
        ("#### 42", "6 * 7 = 42\n#### 42", True),
        ("It costs 1,200 dollars.", "1200", True),
        (r"\boxed{\{2, 1\}}", r"$\{1, 2\}$", True),
        (r"\boxed{\frac{1}{3}}", "0.5", False),
        ("no idea", "0.5", False),
        ("", "0.5", False),
        # Nobody computes that in time.
        ("$9^{9^{9^{9}}}$", "$9^{9^{9^{8}}}$", False),
    ],
)
def test_equal_expressions_are_the_same_answer(mathematical: Grader, response: str, answer: str, same: bool) -> None:
    assert right(mathematical, response, answer) == same


def test_expressions_of_votes_and_references_without_one(mathematical: Grader) -> None:
    assert mathematical.answer_of(r"first 3, then \boxed{\frac{2}{4}}") == mathematical.answer_of(r"$\frac{1}{2}$") == "1/2"
    assert mathematical.answer_of("none") is None
    with pytest.raises(ValueError, match="no mathematical expression in the reference answer 'none'"):
        mathematical.check(prompt("none"))


def test_a_process_that_dies_is_started_again_and_one_that_never_answers_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: Any = grader("math")
    assert right(made, "2", "2")
    made._process.kill()
    made._process.wait()
    assert right(made, "2", "2")
    monkeypatch.setattr("kdray.data.math_equality.sys.executable", "/bin/false")
    made._process.kill()
    made._process.wait()
    with pytest.raises(RuntimeError, match="does not answer; is math-verify installed"):
        made.grade(prompt("2"), "2")


def test_exact_is_the_same_text() -> None:
    assert right(grader("exact"), " ab\n", "ab ")
    assert not right(grader("exact"), "ab.", "ab")
    assert not right(grader("exact"), "AB", "ab")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("It is 42.", "42"),
        ("6 * 7 = 42", "42"),
        ("#### 72", "72"),
        ("50 + 22 = 72\n#### 72", "72"),
        ("so 9.\n#### 1,234,567.50 dollars", "1234567.5"),
        ("#### -5", "-5"),
        ("it costs $1,200", "1200"),
        ("it costs -$1,200.00", "-1200"),
        ("minus: \u22123", "-3"),
        ("pages 10-15", "15"),
        ("(2)-1", "1"),
        ("x=-1.5", "-1.5"),
        ("about +7", "7"),
        ("half is .5", "0.5"),
        ("the answer is...5", "5"),
        ("50%", "50"),
        ("1.5e3", "1500"),
        ("2E-3 m", "0.002"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("room 007", "7"),
        ("42.0", "42"),
        ("1" + 40 * "0" + "1", "1" + 40 * "0" + "1"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert grader("last_number").answer_of(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "forty-two", "42 ####", "#### none", "..."])
def test_a_text_may_have_no_number(text: str) -> None:
    made = grader("last_number")
    assert made.answer_of(text) is None
    assert not right(made, text, "42")


def test_numbers_are_compared_exactly() -> None:
    made = grader("last_number")
    assert right(made, "so it is 1200.00", "She sold 4.\n#### 1,200")
    assert not right(made, "4", "She sold 4.\n#### 1,200")
    assert not right(made, "-42", "42")
    assert not right(made, "1" + 30 * "0" + "1", "1" + 30 * "0" + "2")
    # What stands behind the marker decides, in a response too.
    assert not right(made, "42 it is\n#### 41", "42")


@pytest.mark.parametrize("text", ["1," * 50_000, "1" * 100_000, "1,000" * 20_000, "-$" * 50_000, "." * 100_000, "1e" * 50_000])
def test_long_texts_take_no_time(text: str) -> None:
    import time

    started = time.monotonic()
    grader("last_number").answer_of(text)
    grader("multiple_choice").answer_of(text + "(A" * 50_000)
    assert time.monotonic() - started < 5


def test_a_pattern_finds_the_answer() -> None:
    boxed = grader("regex", pattern=r"\\boxed\{([^}]*)\}")
    assert right(boxed, r"first \boxed{1}, no: \boxed{ x }", "x")
    assert not right(boxed, "x", "x")
    both = grader("regex", pattern=r"answer: (\w+)", reference_pattern=r"#### (\w+)")
    assert right(both, "answer: 5", "long\n#### 5")
    assert not right(both, "answer: 6", "long\n#### 5")
    optional = grader("regex", pattern=r"a(b)?")
    assert not right(optional, "a", "b")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (b). ", "B"),
        ("**C**", "C"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("The answer is B.", "B"),
        ("the answer is (c)", "C"),
        ("The correct answer is: d", "D"),
        ("Answer: A", "A"),
        ("Answer: **A**", "A"),
        ("I choose option C, since A dog is no cat", "C"),
        ("(A) is wrong, (B) is wrong, so it has to be (D)", "D"),
        ("Not A. Hence the final answer is \\boxed{E}", "E"),
        ("\\boxed{\\text{(B)}}", "B"),
        ("first I thought the answer is A, but the answer is B", "B"),
        ("Let us think.\nC: it is so", "C"),
        ("working\n#### D", "D"),
        ("I would say C", "C"),
        ("A dog is an animal", None),
        ("the answer is a dog", None),
        ("option Because", None),
        ("F", None),
        ("so do I", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_chooses(text: str, letter: str | None) -> None:
    assert grader("multiple_choice").answer_of(text) == letter


def test_choices_are_compared_by_letter() -> None:
    assert right(grader("multiple_choice"), "The answer is (B).", "B. Paris")
    assert not right(grader("multiple_choice"), "nobody knows", "B")
    assert grader("multiple_choice", letters="ABCDEFGHIJ").answer_of("F") == "F"


@pytest.mark.parametrize(
    ("made", "answer", "reason"),
    [
        (grader("last_number"), "forty", "no number in the reference answer 'forty'"),
        (grader("multiple_choice"), "Paris", "no letter of a choice in the reference answer 'Paris'"),
        (grader("regex", pattern="(a)", reference_pattern="(b)"), "a", "reference_pattern is not found in the reference"),
    ],
)
def test_a_reference_that_nothing_could_equal_is_refused(made: Grader, answer: str, reason: str) -> None:
    grading = Grading("data.grader.type=x", made)
    with pytest.raises(DataError, match=f"data.grader.type=x on prompt 7: {reason}"):
        grading.check([prompt(None), prompt(answer)])
    with pytest.raises(ResponseError, match=reason):
        grading(prompt(answer), "1")


class Scripted(Grader):
    def __init__(self, grade: Callable[[], Any]) -> None:
        self._grade = grade

    def grade(self, prompt: Prompt, response: str) -> bool:
        return self._grade()  # type: ignore[no-any-return]


def test_a_grader_that_fails_is_told_with_prompt_and_response() -> None:
    def broken() -> bool:
        raise KeyError("units")

    with pytest.raises(ResponseError) as refusal:
        Grading("data.grader.type=broken", Scripted(broken))(prompt("3"), "x" * 200)
    assert str(refusal.value) == (
        f"data.grader.type=broken failed on prompt 7 ('how many?') with the response {'x' * 80 + '...'!r}: KeyError: 'units'"
    )
    for said in (None, 0.5, "yes"):
        with pytest.raises(ResponseError, match="neither True nor False"):
            Grading("x", Scripted(lambda said=said: said))(prompt("3"), "4")
    assert Grading("x", Scripted(lambda: np.True_))(prompt("3"), "4") is True


def test_what_can_be_graded() -> None:
    assert not Grading("x", grader("exact")).can_grade(prompt(None))
    assert Grading("x", Scripted(lambda: True), needs_reference=False).can_grade(prompt(None))


# ------------------------------------------------------------------------------------------------- a run's grader


def config(prompts: dict[str, Any], **data: Any) -> Any:
    tiny = {"type": "tiny"}
    sections = {"student": {"model": tiny}, "teachers": {"t": {"model": tiny}}}
    return parse_config({"run": {"name": "x"}, "data": {"prompts": prompts, "heldout_size": 2} | data} | sections)


def test_files_are_graded_where_the_config_says_how(tmp_path: Path) -> None:
    rows = [{"question": f"{n} and {n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"} for n in range(5)]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "path": str(path)}
    assert load_dataset(config(source), task_tokenizer()).grade is None
    data = load_dataset(config(source, grader="last_number"), task_tokenizer())
    assert data.grade is not None
    last = data.heldout[-1]
    assert data.grade(last, "4 and 4 make 8")
    assert not data.grade(last, "4 and 4 make 44")
    data.grade.check(data.train + data.heldout)


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_one_gpu"])
def test_the_recipe_for_gsm8k_reads_the_hubs_splits_and_grades_as_gsm8k_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A folder as the hub's client leaves it, which the datasets library reads by the same name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = tmp_path / "openai/gsm8k"
    configs = [
        {
            "config_name": subset,
            "data_files": [{"split": split, "path": f"{subset}/{split}-*"} for split in ("train", "test")],
        }
        for subset in ("main", "socratic")
    ]
    for each in configs:
        (dataset / str(each["config_name"])).mkdir(parents=True)
        for split, rows in (("train", 3), ("test", 2)):
            asked = [f"{split} {each['config_name']} {row}: how much?" for row in range(rows)]
            answers = ["She has 3 * 400 = <<3*400=1200>>1200 left.\n#### 1,200"] * rows
            table = pa.table({"question": asked, "answer": answers})
            pq.write_table(table, dataset / str(each["config_name"]) / f"{split}-00000-of-00001.parquet")
    (dataset / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    data = load_dataset(load_config(Path(__file__).parents[4] / "configs" / f"{name}.yaml"), task_tokenizer())
    assert sorted(str(each.question) for each in data.train) == [f"train main {row}: how much?" for row in range(3)]
    assert sorted(str(each.question) for each in data.heldout) == [f"test main {row}: how much?" for row in range(2)]
    assert data.grade is not None
    assert data.grade(data.heldout[0], "3 times 400 is 1200, so $1200.00.")
    assert not data.grade(data.heldout[0], "3 times 400 is 1200, so 3.")


def test_generated_tasks_grade_themselves_unless_the_config_says_otherwise(example_plugin: Path) -> None:
    source = {"type": "task", "tasks": ["arithmetic"], "transfer_tasks": ["reversal"], "size": 4}
    own = grading_of(config(source))
    assert own is not None
    assert own(prompt("95", domain="arithmetic"), " 95 ")
    assert not own(prompt("95", domain="arithmetic"), "it is 95")
    assert own.name == "the grader of arithmetic, reversal"
    number = grading_of(config(source, grader="last_number"))
    assert number is not None
    assert number(prompt("95", domain="arithmetic"), "it is 95")


def test_a_tasks_own_grader_is_asked(example_plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdray.config.tasks import TASKS

    grading = grading_of(config({"type": "task", "tasks": ["arithmetic", "reversal"]}))
    assert grading is not None
    monkeypatch.setattr(TASKS.get("reversal"), "grade", lambda self, response, answer: response == "told")
    assert grading(prompt("ba", domain="reversal"), "told")
    assert not grading(prompt("ba", domain="reversal"), "ba")
    assert grading(prompt("ba", domain="arithmetic"), "ba")


class ByChance:
    """Not a Grader, so that it lacks what a run asks of one beside `grade`."""

    def __init__(self, settings: object) -> None: ...

    def grade(self, prompt: Prompt, response: str) -> bool:
        return True


def test_a_grader_that_is_none_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRADERS.get("exact"), "implementation", f"{__name__}:ByChance")
    with pytest.raises(ConfigError, match=r"data.grader.type=exact: .*:ByChance is no subclass of .*Grader; derive it"):
        grading_of(config({"type": "task"}, grader="exact"))
