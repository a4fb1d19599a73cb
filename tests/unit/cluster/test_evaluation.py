"""Evaluations of a run: the teacher beside the student, once, and the numbers of every response on disk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest

from cluster import evaluation
from cluster.evaluation import teacher_left_out
from kdray.config import Config, parse_config
from kdray.config.route import Route
from kdray.data.dataset import load_dataset
from kdray.errors import Interrupted, SignalError
from kdray.models.resolve import task_tokenizer
from kdray.runs.checkpoints import COMMITTED
from kdray.runs.context import Checked
from kdray.runs.folder import RunFolder, read_lines
from kdray.runs.report import write_report
from kdray.runs.results.draws import ratios, read_draws
from kdray.runs.verify import verify
from kdray.types import Rollout, SampleRequest
from tests.support.stub_run import EOS, stub_config
from tests.support.stub_runner import StubGroup, StubPool, StubRun


def config_of(tmp_path: Path, **sections: Any) -> Config:
    sections = {"training": {"steps": 6}, "data": {"heldout_size": 12}} | sections
    return stub_config(tmp_path, **sections)


def measured(folder: RunFolder) -> list[str]:
    return [line["name"] for line in read_lines(folder.events) if line["kind"] == "evaluation"]


async def test_the_teacher_is_measured_beside_the_student_with_its_draws(tmp_path: Path) -> None:
    config = config_of(tmp_path, evaluation={"control": True, "samples_per_prompt": 2})
    run = await StubRun(config)()
    folder = RunFolder(config.run_folder)
    assert measured(folder) == ["before", "teacher", "after", "control"]
    summary = json.loads(folder.summary.read_text())
    assert summary["teacher"]["prompts"] == 12.0
    assert summary["teacher_left_out"] is None
    assert {"exact_match", "pass_at_2", "response_tokens", "distinct_1"} <= set(summary["teacher"])
    assert not {"reverse_kl", "top_overlap"} & set(summary["teacher"]), "they compare the student with the teacher"
    # 12 prompts, two draws each: before and teacher have the same ones.
    asked = [request for request in run.pool.asked if request.max_new_tokens == config.rollout.max_new_tokens][:56]
    student, teacher = [[each for each in asked if each.alpha == alpha][-24:] for alpha in (0.0, 1.0)]
    assert [(each.prompt_id, each.seed) for each in student] == [(each.prompt_id, each.seed) for each in teacher]
    for name in ("before", "teacher", "after", "control"):
        draws = read_draws(folder.evaluations / f"{name}.parquet")
        assert len(draws) == 24
        known = {prompt.prompt_id: prompt.answer for prompt in load_dataset(config, task_tokenizer()).heldout}
        rows = pq.read_table(folder.samples / f"heldout-{name}.parquet").to_pylist()
        assert rows
        assert [row["reference"] for row in rows] == [known[row["prompt_id"]] for row in rows]
        assert all(row["reference"] for row in rows)
        numbers = {metric: ratio.value for metric, ratio in ratios(draws, config.evaluation.passes).items()}
        assert numbers == {metric: pytest.approx(summary[name][metric]) for metric in numbers}


async def test_an_environment_answers_in_every_measurement_and_in_training(tmp_path: Path, example_plugin: Path) -> None:
    asks = {"type": "hints", "marks": "abcdefghijklmnopqrstuvwxyz", "max_turns": 3, "max_reply_tokens": 1}
    config = config_of(tmp_path, rollout={"environment": asks})
    await StubRun(config)()
    folder = RunFolder(config.run_folder)
    for name in ("before", "teacher", "after"):
        rows = pq.read_table(folder.samples / f"heldout-{name}.parquet").to_pylist()
        assert any("environment" in row["writer"] for row in rows), name
        # What the environment wrote is no part of a length.
        drawn = {draw.prompt_id: draw.tokens for draw in read_draws(folder.evaluations / f"{name}.parquet")}
        for row in rows:
            assert (drawn[row["prompt_id"]] < len(row["token_ids"])) == ("environment" in row["writer"])
    assert sum(line.get("environment_tokens", 0.0) for line in read_lines(folder.metrics)) > 0.0
    assert verify(folder.path).problems == []


async def test_the_summary_holds_the_verdict_and_the_report_begins_with_it(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"evaluation": {"control": True}, "training": {"steps": 20}, "data": {"heldout_size": 40}}
    config = config_of(tmp_path, **sections)
    run = await StubRun(config)()
    folder = RunFolder(config.run_folder)
    summary = json.loads(folder.summary.read_text())
    assert {"before", "after", "teacher", "control"} == set(summary["intervals"])
    assert set(summary["differences"]) == {"after - before", "after - control"}
    for name, (low, high) in summary["intervals"]["after"].items():
        assert low <= summary["after"][name] <= high, name
    change = summary["differences"]["after - before"]["reverse_kl"]
    assert change["value"] == pytest.approx(summary["after"]["reverse_kl"] - summary["before"]["reverse_kl"])
    assert change["high"] < 0.0, "a table student that follows the exact gradient gets closer"
    # Neither table knows the task: no share of a gap between two that are always wrong.
    assert summary["gap_closed"]["reason"].startswith("no response to 40 held-out prompts is right")
    page = write_report(folder.path).read_text()
    assert page.index(summary["verdict"]) < page.index(">Results</h2>")
    again = StubRun(config_of(tmp_path, name="again", **sections))
    await again()
    assert again.summary["intervals"] == run.summary["intervals"], "the bootstrap has a seed of its own"


@pytest.mark.parametrize(("learns", "failures", "passes"), [(True, 4, True), (True, 5, False), (False, 1, False)])
async def test_a_teacher_that_learns_may_change_during_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learns: bool, failures: int, passes: bool
) -> None:
    """Its weights are new ones between sampling and scoring now and then; a teacher that is fixed has one chance."""
    left = [SignalError("log p of the same tokens differs")] * failures

    async def check(*_: Any) -> dict[str, float]:
        if left:
            raise left.pop()
        return {"prefill_gap": 0.0}

    monkeypatch.setattr(evaluation, "_check_signals", check)
    settings = SimpleNamespace(learns=learns, replays=False)
    checked = Mock(route=SimpleNamespace(teacher_reads="ids"), **{"dataset.heldout": []})
    checked.config.teachers = {"other": settings}
    checking = evaluation.check_signals(checked, SimpleNamespace(name="other"))  # type: ignore[arg-type]
    if passes:
        assert await checking == {"prefill_gap": 0.0}
    else:
        with pytest.raises(SignalError):
            await checking


async def test_a_resume_measures_neither_the_teacher_nor_the_student_before_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder = RunFolder(config.run_folder)
    with pytest.raises(Interrupted):
        await StubRun(config)(stop_at=3)
    assert measured(folder) == ["before", "teacher"]
    written = {path.name: path.stat().st_mtime_ns for path in folder.evaluations.iterdir()}
    resumed = await StubRun(config, resume=True)()
    assert measured(folder) == ["before", "teacher", "after"]
    assert {name: (folder.evaluations / name).stat().st_mtime_ns for name in written} == written
    assert not [request for request in resumed.pool.asked if request.alpha == 1.0 and request.max_new_tokens == 6][8:]
    whole = await StubRun(config_of(tmp_path, name="whole"))()
    for name in ("before", "teacher", "after"):
        assert resumed.summary[name] == whole.summary[name]


@pytest.mark.parametrize("max_staleness", [0, 1])
async def test_an_evaluation_beside_training_has_the_numbers_of_its_version(tmp_path: Path, max_staleness: int) -> None:
    """Replicas here always draw by the newest version: a student that is published during an evaluation changes its numbers."""
    config = config_of(tmp_path, rollout={"max_staleness": max_staleness}, evaluation={"every": 1})
    run = await StubRun(config)()
    lines = read_lines(RunFolder(config.run_folder).metrics)
    assert len(lines) == config.training.steps
    for line in lines:
        found = {name.removeprefix("heldout/"): value for name, value in line.items() if name.startswith("heldout/")}
        assert found == await run.alone(line["step"])
    assert len({line["heldout/reverse_kl"] for line in lines}) == len(lines)


async def test_the_student_is_written_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    sample, writes = StubPool.sample, asyncio.Event()

    async def slow(pool: StubPool, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        if requests[0].alpha == 0.0 and requests[0].min_version == config.training.steps:
            await asyncio.wait_for(writes.wait(), 20)
        async for part in sample(pool, requests):
            yield part

    async def export(group: StubGroup, folder: Path) -> None:
        writes.set()

    monkeypatch.setattr(StubPool, "sample", slow)
    monkeypatch.setattr(StubGroup, "export", export)
    run = await StubRun(config)()
    assert measured(RunFolder(config.run_folder)) == ["before", "teacher", "after"]
    assert run.summary["after"]["prompts"] == 12


async def test_every_checkpoint_records_what_the_run_reads(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(Interrupted):
        await StubRun(config)(stop_at=3)
    await StubRun(config, resume=True)()
    markers = list(config.run_folder.glob("checkpoints/step-*/COMMITTED.json"))
    assert len(markers) == 2
    for marker in markers:
        found = json.loads(marker.read_text())
        assert found["inputs"] == {"tokenizer": {"vocabulary": "abc"}}
        assert found["installation"] == {"host": "here"}


async def test_a_resume_that_ends_earlier_keeps_the_schedule_of_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a second resume: the checkpoint says what the schedule was laid out for."""
    phases: list[Any] = []
    start_phase = StubGroup.start_phase

    async def noted(self: StubGroup, phase: Any, checkpoint: Path | None = None) -> None:
        phases.append(phase)
        await start_phase(self, phase, checkpoint)

    monkeypatch.setattr(StubGroup, "start_phase", noted)
    lengths = [8, 6, 5]
    for start, (steps, stop_at) in enumerate(zip(lengths, (2, 4, None), strict=True)):
        config = config_of(tmp_path, training={"steps": steps, "schedule": "cosine"})
        run = StubRun(config, resume=start > 0)
        if stop_at is None:
            await run()
        else:
            with pytest.raises(Interrupted):
                await run(stop_at=stop_at)
    assert [phase.steps for phase in phases if phase.name == "distill"] == [8, 8, 8]
    assert run.summary["steps"] == 5
    assert verify(config.run_folder).problems == []


async def test_a_run_that_an_earlier_version_began_is_resumed_without_the_teachers_score(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder = RunFolder(config.run_folder)
    with pytest.raises(Interrupted):
        await StubRun(config)(stop_at=3)
    for marker in folder.checkpoints.glob(f"*/{COMMITTED}"):
        content = json.loads(marker.read_text())
        del content["teacher"]
        marker.write_text(json.dumps(content))
    for path in folder.evaluations.iterdir():
        path.unlink()
    resumed = await StubRun(config, resume=True)()
    assert resumed.summary["teacher"] is None
    assert resumed.summary["teacher_left_out"] == "it was not measured when the run began"
    assert measured(folder) == ["before", "teacher", "after"], "that of the first start, and no other"


TWO = {name: {"model": {"type": "tiny", "layers": 4}} for name in ("a", "b")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"rollout": {"sampler": "student", "alpha": 0.0}}, None),
        ({"evaluation": {"teacher": False}}, "evaluation.teacher is false"),
        ({"teachers": {"toy": {"type": "self"}}, "rollout": {"data_share": 0.5}, "loss": {"type": "jsd"}}, None),
        (
            {"teachers": {"toy": {"type": "self", "every": 2}}, "rollout": {"data_share": 0.5}, "loss": {"type": "jsd"}},
            "teacher toy changes during the run",
        ),
        (
            {
                "teachers": {"toy": {"type": "openai", "base_url": "http://host/v1", "model": "m"}},
                "loss": {"type": "sequence"},
                "rollout": {"alpha": 1.0},
            },
            "teacher toy returns text only",
        ),
        (
            {"teachers": {"toy": {"type": "capture", "path": "x"}}, "loss": {"type": "forward_kl"}, "rollout": {"alpha": 1.0}},
            "teacher toy replays recorded answers",
        ),
        (
            {"rollout": {"program": {"type": "direct"}, "alpha": 1.0}, "loss": {"type": "sequence"}},
            "the teacher answers through its program, which is measured instead",
        ),
        (
            {
                "teachers": {"toy": {"model": {"type": "tiny"}, "prompt_template": "{answer} {prompt}"}},
                "rollout": {"sampler": "student", "alpha": 0.0},
                "loss": {"type": "forward_kl"},
            },
            "the teacher reads prompts of its own (prompt_template)",
        ),
        ({"teachers": TWO, "rollout": {"teachers": {"type": "route", "weights": {"a": 1.0, "b": 1.0}}}}, None),
        (
            {"teachers": TWO, "rollout": {"teachers": {"type": "ensemble"}, "sampler": "student", "alpha": 0.0}},
            "the target of an ensemble is computed, and no model answers with it",
        ),
    ],
)
def test_a_teacher_that_cannot_answer_the_prompts_as_they_are_is_left_out(
    tmp_path: Path, changes: dict[str, Any], reason: str | None
) -> None:
    plain = parse_config(
        {
            "run": {"name": "x", "output": str(tmp_path)},
            "data": {"prompts": {"type": "task", "size": 48}, "heldout_size": 4},
            "student": {"model": {"type": "tiny"}},
            "teachers": {"toy": {"model": {"type": "tiny"}}},
            "training": {"batch_size": 16, "sft": {"steps": 0}},
        }
        | changes
    )
    tokenizer = task_tokenizer()
    checked = Checked(plain, tokenizer, load_dataset(plain, tokenizer), len(tokenizer), (EOS,), Route.of(plain))
    assert teacher_left_out(checked) == reason
