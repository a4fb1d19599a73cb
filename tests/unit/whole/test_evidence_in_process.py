"""The same cells without engines: what is drawn has the probability that is recorded, and every way trains on what it says."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from benchmarks import evidence_in_process as bench
from benchmarks.evidence import REGIMES, WAYS, Cell, Regime, few_labels
from kdray.config import load_config
from kdray.data.dataset import encode_answer, load_dataset

SMALL = (
    "data.prompts={type: task, tasks: [spelled_sum], difficulty: 4, size: 40, labelled: 16}",
    "data.heldout_size=8",
    "student.model.width=32",
    "teachers.sums.model.width=32",
    "teachers.sums.model.train={tasks: [spelled_sum], steps: 2, difficulty: 4, batch_size: 4}",
    "rollout.max_new_tokens=29",
    "training.steps=2",
    "training.warmup_steps=1",
    "training.batch_size=16",
    "training.sft={steps: 2, batch_size: 16, learning_rate: 1e-3}",
)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench, "MODELS", tmp_path)
    monkeypatch.setitem(REGIMES, "few labels", Regime("configs/spelled_sum.yaml", 28, SMALL, few_labels(16)))
    bench.bench_of.cache_clear()
    yield
    bench.bench_of.cache_clear()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_a_copy_of_the_same_student(way: str) -> None:
    shared = bench.bench_of("few labels", 3)
    before = [each.clone() for each in shared.start.parameters()]
    found = bench.summary_of(Cell(way, "few labels", 3))
    assert all(torch.equal(old, new) for old, new in zip(before, shared.start.parameters(), strict=True))
    assert found["after"]["reverse_kl"] != found["before"]["reverse_kl"]
    assert found["teacher"]["reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    if way == "SFT alone":
        # Two steps of sixteen answers, of 27 tokens and the end.
        assert found["trained_tokens"] == 2 * 16 * 28


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_what_is_drawn_has_the_probability_that_is_recorded(alpha: float) -> None:
    shared = bench.bench_of("few labels", 3)
    prompts = torch.randint(5, 40, (6, 10), generator=torch.Generator().manual_seed(0))
    # An end that is drawn early, so that some responses are shorter than others.
    end = int(bench.sample((shared.start, shared.teacher), prompts, torch.full((6, 1), alpha), 3, 1, -1).tokens[0, 2])
    drawn = bench.sample((shared.start, shared.teacher), prompts, torch.full((6, 1), alpha), 20, 1, end)
    assert drawn.mask.sum(1).min() <= 3 < drawn.tokens.shape[1]
    for row, mask in zip(drawn.tokens, drawn.mask, strict=True):
        assert end not in row[mask][:-1], "a response goes on behind its end"
    with torch.no_grad():
        q, p = (
            bench.rows_of(model, drawn.prompts, drawn.tokens).softmax(-1).gather(-1, drawn.tokens.unsqueeze(-1)).squeeze(-1)
            for model in (shared.start, shared.teacher)
        )
    for recorded, expected in ((drawn.student, q), (drawn.teacher, p), (drawn.mixture, alpha * p + (1.0 - alpha) * q)):
        torch.testing.assert_close(recorded[drawn.mask].exp(), expected[drawn.mask], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tail", "loops"), [([], 1.0), ([1], 1.0), ([9, 1], 0.0)], ids=["cut off", "ended", "got out"])
def test_a_loop_before_the_end_is_one_as_in_a_run(tail: list[int], loops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kdray.evaluation` looks for loops in what comes before the end of the sequence."""
    shared = bench.bench_of("few labels", 3)
    assert shared.tokenizer.eos_token_id == 1
    dataset = load_dataset(shared.config, shared.tokenizer)

    def sample(models: Any, prompts: torch.Tensor, *others: Any) -> bench.Responses:
        tokens = torch.tensor([[7] * 8 + tail] * len(prompts))
        said = torch.zeros(tokens.shape)
        return bench.Responses(prompts, tokens, tokens >= 0, said, said, said)

    monkeypatch.setattr(bench, "sample", sample)
    found = bench.measure(shared.start, shared.teacher, shared.config, dataset, shared.tokenizer)
    assert found["repetition"].value == loops
    assert found["truncated"].value == float(not tail)


def test_answers_stand_where_a_response_would() -> None:
    cell = Cell("SFT alone", "few labels", 3)
    config, tokenizer = load_config(cell.recipe, cell.settings), bench.task_tokenizer()
    prompts = load_dataset(config, tokenizer).train
    assert len(prompts) == 16
    given = bench.answers(prompts, tokenizer)
    for prompt, row, mask in zip(prompts, given.tokens, given.mask, strict=True):
        assert row[mask].tolist() == encode_answer(tokenizer, prompt).tolist()


def test_a_cell_that_has_its_file_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench, "commit_of_tree", lambda: "abc")
    cell = Cell("MiniLLM", "few labels", 3)
    bench.run_cell(cell, -1.0)
    assert not bench.RESULTS.exists(), "a cell was started after the time was up"
    bench.run_cell(cell, 1.0)
    (kept,) = bench.read(bench.RESULTS)
    assert (kept["way"], kept["seed"], kept["commit"]) == ("MiniLLM", 3, "abc")
    for name in ("before", "after", "teacher"):
        low, high = kept["intervals"][name]["step_match"]
        assert low <= kept[name]["step_match"] <= high
    monkeypatch.setattr(bench, "summary_of", lambda cell: pytest.fail("a finished cell was run again"))
    bench.run_cell(cell, 1.0)


def test_cells_of_a_seed_that_would_begin_differently_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench, "commit_of_tree", lambda: "abc")
    bench.run_cell(Cell("MiniLLM", "few labels", 3), 1.0)
    (first,) = bench.RESULTS.iterdir()
    bench.run_cell(Cell("GKD", "few labels", 3), 1.0)
    kept = json.loads(first.read_text())
    kept["before"]["exact_match"] += 0.125
    first.write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match=r"begins at 0.0%, evidence-minillm-few-labels-3 at 12.5%"):
        bench.run_cell(Cell("SFT alone", "few labels", 3), 1.0)
    assert len(bench.read(bench.RESULTS)) == 2


@pytest.mark.parametrize(("age", "updates_before"), [(0, [0, 1, 2, 3, 4]), (2, [0, 0, 0, 1, 2]), (9, [0, 0, 0, 0, 0])])
def test_responses_are_as_old_as_staleness_lets_them_be(
    age: int, updates_before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("on-policy reverse KL", "few labels", 3)
    config = load_config(cell.recipe, [*cell.settings, "training.steps=5", f"rollout.max_staleness={age}"])
    shared, found, updates = bench.bench_of("few labels", 3), {}, 0
    written, step_of = bench.written, bench.Optimizer.step

    def write(models: Any, config: Any, dataset: Any, tokenizer: Any, step: int) -> bench.Responses:
        found[step] = updates
        return written(models, config, dataset, tokenizer, step)

    def update(self: bench.Optimizer, loss: torch.Tensor) -> None:
        nonlocal updates
        step_of(self, loss)
        updates += 1

    monkeypatch.setattr(bench, "written", write)
    monkeypatch.setattr(bench.Optimizer, "step", update)
    bench.distil(copy.deepcopy(shared.start), shared.teacher, config, load_dataset(config, shared.tokenizer), shared.tokenizer)
    assert (found, updates) == (dict(enumerate(updates_before)), 5)


def test_the_supervised_phase_ends_when_the_student_is_good_enough() -> None:
    cell = Cell("MiniLLM", "few labels", 3)
    config = load_config(cell.recipe, [*cell.settings, "training.sft.steps=35"])
    shared, asked = bench.bench_of("few labels", 3), []

    def enough(student: Any) -> bool:
        asked.append(next(student.parameters()).detach().clone())
        return len(asked) == 2

    student = copy.deepcopy(shared.start)
    bench.supervise(student, config, load_dataset(config, shared.tokenizer), shared.tokenizer, enough)
    assert len(asked) == 2
    assert torch.equal(asked[1], next(student.parameters()))
    assert not torch.equal(asked[0], asked[1])


@pytest.mark.parametrize(("reached", "steps"), [(4, 4), (8, 8)])
def test_an_even_start_is_the_student_that_first_has_the_share(
    reached: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (*SMALL, "training.sft={steps: 8, batch_size: 16, learning_rate: 1e-3}")
    monkeypatch.setitem(REGIMES, "even start", Regime("configs/spelled_sum.yaml", 28, small, few_labels(16), start=0.2))
    taken, step_of = 0, bench.Optimizer.step

    def update(self: bench.Optimizer, loss: torch.Tensor) -> None:
        nonlocal taken
        step_of(self, loss)
        taken += 1

    def measured(*_: Any) -> dict[str, Any]:
        return {"exact_match": SimpleNamespace(value=0.2 if taken >= reached else 0.19)}

    monkeypatch.setattr(bench.Optimizer, "step", update)
    monkeypatch.setattr(bench, "measure", measured)
    bench.bench_of("even start", 3)
    assert taken == steps


def test_a_seed_that_stays_below_the_share_has_no_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(REGIMES, "even start", Regime("configs/spelled_sum.yaml", 28, SMALL, few_labels(16), start=0.2))
    monkeypatch.setattr(sys, "argv", ["evidence_in_process", "--regime", "even start", "--seeds", "3", "4"])
    assert bench.main() == 0
    assert not bench.RESULTS.exists()
    assert capsys.readouterr().out.split("\n")[:2] == [f"seed {seed}: below 20% after 2 supervised steps" for seed in (3, 4)]


def test_the_start_of_runs_is_that_of_the_cells_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGIMES, "even start", Regime("configs/spelled_sum.yaml", 28, SMALL, few_labels(16), start=0.0))
    monkeypatch.setattr("benchmarks.evidence.STARTS", tmp_path / "starts")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["evidence_in_process", "--regime", "even start", "--seeds", "5", "--starts"])
    assert bench.main() == 0
    assert not bench.RESULTS.exists()
    folder = Cell("GKD", "even start", 5).start
    assert [path.name for path in (tmp_path / "starts").iterdir()] == [folder.name] == ["even-start-5"]
    kept = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for mine, theirs in zip(kept.parameters(), bench.bench_of("even start", 5).start.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == bench.task_tokenizer().get_vocab()
    assert kept.generation_config.eos_token_id == bench.task_tokenizer().eos_token_id
    monkeypatch.setattr(sys, "argv", ["evidence_in_process", "--seeds", "5", "--starts"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
