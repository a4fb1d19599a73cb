"""`kdray eval --lm-eval`: the harness itself, on tasks in files and without a network, against transformers alone."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from kdray.config import TinyModel, load_config
from kdray.models.quantization import quantize
from kdray.models.resolve import build_tiny_model
from kdray.runs.checkpoints import commit
from kdray.runs.folder import RunFolder
from kdray.runs.report import write_report
from kdray.runs.results import harness
from kdray.runs.storage import Storage
from tests.unit.kdray.runs.test_report import Page

QUESTIONS = [f"{one}+{two}=" for one in (2, 5, 7) for two in (1, 3, 8, 9)]
CHOICES = ["3", "12", "8", "a b"]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run that has ended with an untrained tiny student."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {name: trial}\nstudent: {model: {type: tiny}}\nteachers: {t: {model: {type: tiny, layers: 4}}}\n")
    run = RunFolder.create(load_config(recipe))
    model = build_tiny_model(TinyModel(type="tiny", layers=1, width=32, seed=3), tmp_path / "model")
    store = Storage.local(run.path)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    commit(store, "student", {}, [{name: store.write(f"student/{name}", content) for name, content in files.items()}])
    return run


class Known:
    """What transformers alone says of a model."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def likely(self, question: str) -> int:
        """The choice of the highest log-likelihood."""
        totals = []
        for choice in CHOICES:
            asked, ids = self.tokenizer.encode(question), self.tokenizer.encode(question + choice)
            with torch.no_grad():
                logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            totals.append(sum(float(logprobs[place - 1, ids[place]]) for place in range(len(asked), len(ids))))
        return totals.index(max(totals))

    def written(self, question: str, count: int) -> str:
        ids = self.tokenizer.encode(question)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return self.tokenizer.decode(ids[len(self.tokenizer.encode(question)) :])


def write_tasks(folder: Path, known: Known) -> float:
    """Write a task with choices, all of whose answers are the first but a third, and one that is written, half of whose answers
    are the model's own. Returns: the share of the first that the model has right."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for number, question in enumerate(QUESTIONS):
        written = known.written(question, 3)
        assert "\n" not in written
        row = {"question": question, "choices": CHOICES, "label": known.likely(question) if number % 3 == 0 else 0}
        rows.append(row | {"answer": written if number % 2 else written + "x"})
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}}, "test_split": "test",
        "doc_to_text": "{{question}}", "target_delimiter": "",
    }  # fmt: skip
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    chosen = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label", "metric_list": accuracy}
    until = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    written_task = {
        "output_type": "generate_until", "doc_to_target": "{{answer}}", "generation_kwargs": until, "metric_list": exact,
    }  # fmt: skip
    for name, task in (("chosen", chosen), ("written", written_task)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return sum(row["label"] == known.likely(row["question"]) for row in rows) / len(rows)


def call(run: RunFolder, *settings: str) -> Any:
    return CliRunner().invoke(app, ["eval", str(run.path), "--lm-eval", *settings])


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_ones_own_are_measured_stored_and_shown(finished: RunFolder, tmp_path: Path) -> None:
    right = write_tasks(tmp_path / "tasks", Known(finished.student))
    assert 0.0 < right < 1.0, "a number that a mistake would not give"
    asked = ["evaluation.lm_eval.tasks=[chosen, written]"]
    harness.add_results(finished, {"before": {"tasks": {"chosen": {"metrics": {"acc": {"value": 0.25}}, "documents": 9}}}})
    result = call(finished, *asked, "--lm-eval-include", "tasks")
    assert result.exit_code == 0, result.output
    found = harness.read_results(finished)
    assert list(found) == ["before", "student"], "an earlier result stays"
    tasks = found["student"]["tasks"]
    assert tasks["chosen"]["metrics"]["acc"]["value"] == pytest.approx(right)
    assert tasks["written"]["metrics"]["exact_match"]["value"] == pytest.approx(0.5)
    assert (tasks["chosen"]["documents"], tasks["chosen"]["shots"]) == (len(QUESTIONS), 0)
    assert found["student"]["settings"]["tasks"] == ["chosen", "written"]
    # The standard error of a mean of 0s and 1s.
    error = (right * (1 - right) / (len(QUESTIONS) - 1)) ** 0.5
    assert tasks["chosen"]["metrics"]["acc"]["stderr"] == pytest.approx(error)
    shown = f"{right:.4g} ± {error:.2g}"
    assert shown in result.stdout
    assert str(finished.evaluations / "lm_eval.json") in result.stdout
    table = Page(write_report(finished.path).read_text(encoding="utf-8")).tables["tasks"]
    assert table[0] == ["task: metric", "before", "student"]
    assert ["chosen: acc", "0.25", shown] in table
    assert ["chosen: documents", "9", "12"] in table


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, bool]]:
    """What the harness was given: the model, its revision, and whether it was there; its answer is the number of calls."""
    calls: list[tuple[str, str | None, bool]] = []

    def measure(model: str | Path, revision: str | None, *_: Any) -> dict[str, Any]:
        calls.append((str(model), revision, (Path(model) / "config.json").is_file()))
        return {"tasks": {"chosen": {"metrics": {"acc": {"value": float(len(calls))}}, "documents": 2}}}

    monkeypatch.setattr(harness, "measure", measure)
    return calls


TASKS = "evaluation.lm_eval.tasks=[chosen]"


def values(path: Path) -> dict[str, float]:
    return {name: each["tasks"]["chosen"]["metrics"]["acc"]["value"] for name, each in json.loads(path.read_text()).items()}


def test_a_recipes_student_is_measured_as_it_is_and_nothing_is_stored(
    finished: RunFolder, tmp_path: Path, measured: list[tuple[str, str | None, bool]]
) -> None:
    built = CliRunner().invoke(app, ["eval", "recipe.yaml", "--lm-eval", TASKS])
    assert built.exit_code == 0, built.output
    hub = [TASKS, "student.model=org/name", "student.revision=abc", "run.name=other"]
    named = CliRunner().invoke(app, ["eval", "recipe.yaml", "--lm-eval", *hub, "--student", str(finished.student)])
    assert named.exit_code == 0, named.output
    assert (measured[0][1:], measured[1:]) == (
        (None, True),
        [("org/name", "abc", False), (str(finished.student), None, True)],
    )
    assert "chosen: acc" in named.stdout
    assert not finished.evaluations.exists()
    assert not (tmp_path / "runs/other").exists()


def test_the_student_of_a_checkpoint_and_one_in_a_folder_get_results_of_their_own(
    finished: RunFolder, tmp_path: Path, measured: list[tuple[str, str | None, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised weights, which the harness's model cannot read, are measured as the values that they stand for."""
    asked: list[tuple[str, Path, int]] = []

    @contextlib.contextmanager
    def student_of_step(source: str, path: Path, step: int) -> Iterator[Path]:
        asked.append((source, path, step))
        yield finished.student

    monkeypatch.setattr("cluster.launch.student_of_step", student_of_step)
    quantize(finished.student, tmp_path / "small", "int8", None)
    result = call(finished, TASKS, "--step", "3", "--student", "small")
    assert result.exit_code == 0, result.output
    assert asked == [(str(finished.path), finished.path, 3)]
    plain = measured[1][0]
    assert [each[1:] for each in measured] == [(None, True)] * 2
    assert (measured[0][0], plain != "small", Path(plain).exists()) == (str(finished.student), True, False)
    assert values(finished.evaluations / "lm_eval.json") == {"step 3": 1.0, "small/": 2.0}
    refused = CliRunner().invoke(app, ["eval", "recipe.yaml", "--lm-eval", TASKS, "--step", "3"])
    assert refused.exit_code == 2
    assert "--step 3: recipe.yaml is a recipe; give a run folder or a run's URL" in refused.stderr


def test_results_of_a_run_at_a_url_join_those_that_lie_there(
    finished: RunFolder, tmp_path: Path, measured: list[tuple[str, str | None, bool]]
) -> None:
    stored = tmp_path / "bucket" / "trial"
    shutil.copytree(finished.path, stored)
    shutil.rmtree(finished.path)
    url = f"file://{stored}"
    for extra in ([], ["--student", str(stored / "student")]):
        result = CliRunner().invoke(app, ["eval", url, "--lm-eval", TASKS, *extra])
        assert result.exit_code == 0, result.output
        assert result.stdout.replace("\n", "").endswith(f"{url}/evaluations/lm_eval.json")
    assert [each[1:] for each in measured] == [(None, True)] * 3
    assert not Path(measured[0][0]).exists(), "the copy is deleted"
    assert values(stored / "evaluations/lm_eval.json") == {"student": 2.0, f"{stored}/student/": 3.0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "evaluation.lm_eval is not set"),
        (["evaluation.lm_eval.tasks=[]"], "evaluation.lm_eval.tasks"),
        (["evaluation.lm_eval.tasks=[a]", "--lm-eval-include", "nowhere"], "--lm-eval-include nowhere: no such folder"),
        (["evaluation.lm_eval.tasks=[broken]", "--lm-eval-include", "tasks"], "tasks=['broken']: cannot be loaded"),
        # A recipe of others names no folder whose files would be run.
        (["evaluation.lm_eval={tasks: [broken], include_path: tasks}"], "evaluation.lm_eval.include_path: unknown key"),
    ],
)
def test_what_cannot_be_measured_is_refused(finished: RunFolder, tmp_path: Path, settings: list[str], message: str) -> None:
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "missing.jsonl"}},
        "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
    }  # fmt: skip
    (tmp_path / "tasks" / "broken.yaml").write_text(yaml.safe_dump(task))
    result = call(finished, *settings)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (finished.evaluations / "lm_eval.json").exists()


def test_without_the_package_the_extra_is_named(finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    result = call(finished, "evaluation.lm_eval.tasks=[hellaswag]")
    assert result.exit_code == 2
    assert "the package lm_eval is not installed; pip install 'kdray[lm-eval]'" in result.stderr


def test_a_folder_of_tasks_without_the_harness_is_refused(finished: RunFolder) -> None:
    result = CliRunner().invoke(app, ["eval", str(finished.path), "--lm-eval-include", "."])
    assert result.exit_code == 2
    assert "--lm-eval-include .: no tasks are measured; add --lm-eval" in result.stderr


def test_results_that_are_none_are_refused_and_named(finished: RunFolder) -> None:
    finished.evaluations.mkdir()
    (finished.evaluations / "lm_eval.json").write_text('{"student": []}')
    result = CliRunner().invoke(app, ["report", str(finished.path)])
    assert result.exit_code == 2
    assert "lm_eval.json: no results of `kdray eval --lm-eval`" in result.stderr


def test_metrics_of_several_filters_are_told_apart() -> None:
    found = {
        "results": {"t": {"alias": "t", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "exact_match,none": 0.5,
                          "exact_match_stderr,none": "N/A", "other,none": float("nan")}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
    }  # fmt: skip
    task = harness._task("t", found)
    assert task["metrics"] == {"exact_match (strict)": {"value": 0.25, "stderr": 0.1}, "exact_match": {"value": 0.5}}
    assert harness.rows({"tasks": {"t": task}}) == {
        "t: exact_match (strict)": "0.25 ± 0.1", "t: exact_match": "0.5", "t: documents": "4",
    }  # fmt: skip
