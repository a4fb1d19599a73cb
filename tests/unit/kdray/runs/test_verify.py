"""`kdray verify`: a good run is proved, and every way of spoiling one of its files is found and named."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from kdray.runs.verify import verify
from tests.support.stub_run import drive, stub_config

BATCH, STEPS = 8, 9

Line = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = stub_config(tmp_path_factory.mktemp("runs"), training={"steps": STEPS}, rollout={"max_staleness": 1})
    asyncio.run(drive(config))
    return config.run_folder


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


def kinds(run: Path) -> set[str]:
    return {kind for kind, _ in verify(run).problems}


def change(run: Path, name: str, how: Callable[[list[Line]], Any]) -> None:
    """Rewrite a file of lines after `how` changed the list of them."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    how(lines)
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_object(run: Path, name: str, **values: Any) -> None:
    stored = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(stored | values))


def test_a_good_run_is_proved(run: Path) -> None:
    proof = verify(run)
    assert (proof.state, proof.problems, proof.notes) == ("finished", [], [])
    facts = dict(proof.facts)
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    left_out = sum(len(ids) for line in ledger for ids in line.get("dropped", {}).values())
    assert left_out, "the run should leave something out"
    assert facts["samples"].startswith(f"{STEPS * BATCH},")
    assert facts["trained"].startswith(f"{STEPS * BATCH - left_out},")
    assert facts["scored"] == f"{STEPS * BATCH} by toy"
    assert facts["tokens trained"] == str(json.loads((run / "summary.json").read_text())["trained_tokens"])


def swap(lines: list[Line]) -> None:
    """Two samples change places between steps."""
    lines[2]["sample_ids"][0], lines[3]["sample_ids"][0] = lines[3]["sample_ids"][0], lines[2]["sample_ids"][0]


def spread(line: Line, name: str) -> list[Any]:
    """A column with one entry a sample, however it was written."""
    if not isinstance(line[name], list):
        line[name] = [line[name]] * BATCH
    return line[name]


def put(line: Line, name: str, at: int, value: Any) -> None:
    spread(line, name)[at] = value


def with_rule(line: Line, rule: str, sample_ids: list[int]) -> None:
    line.setdefault("dropped", {})[rule] = sample_ids


def first_left_out(lines: list[Line]) -> tuple[Line, str]:
    line = next(line for line in lines if "dropped" in line)
    return line, next(iter(line["dropped"]))


def forget_dropped(lines: list[Line]) -> None:
    first_left_out(lines)[0].pop("dropped")


def drop_twice(lines: list[Line]) -> None:
    line, rule = first_left_out(lines)
    line["dropped"][rule].append(line["dropped"][rule][0])


def drop_of_another_step(lines: list[Line]) -> None:
    line, rule = first_left_out(lines)
    line["dropped"][rule].append((line["step"] % STEPS) * BATCH)


def rename_rule(lines: list[Line]) -> None:
    line, rule = first_left_out(lines)
    line["dropped"]["mood"] = line["dropped"].pop(rule)


LEDGER: list[tuple[str, str, Callable[[list[Line]], Any]]] = [
    ("lost", "a sample is missing", lambda lines: lines[4]["sample_ids"].pop()),
    ("twice", "a sample stands twice in its step", lambda lines: lines[4]["sample_ids"].append(4 * BATCH)),
    ("twice", "a step stands twice", lambda lines: lines.append(lines[-1])),
    ("gap", "a step is missing", lambda lines: lines.pop(3)),
    ("gap", "the last step is missing", lambda lines: lines.pop()),
    ("lost", "the last step is missing, and so are its samples", lambda lines: lines.pop()),
    ("order", "two steps change places", lambda lines: lines.insert(2, lines.pop(5))),
    ("misplaced", "two samples change places", swap),
    ("batch_size", "a batch is short", lambda lines: lines[0]["sample_ids"].pop(0)),
    ("beyond", "a step after the last", lambda lines: lines.append(lines[-1] | {"step": STEPS + 1})),
    ("lost", "one sample in another's place", lambda lines: lines[1]["sample_ids"].__setitem__(0, 9_999)),
    ("unreadable", "ids that are texts", lambda lines: lines[1].update(sample_ids=["a"])),
    ("unreadable", "no step", lambda lines: lines[1].pop("step")),
    ("unreadable", "rules that are a list", lambda lines: lines[1].update(dropped=[1])),
    ("rule", "a rule that the config has not", rename_rule),
    ("tokens", "what was left out counts as trained", forget_dropped),
    ("tokens", "a trained sample counts as left out", lambda lines: with_rule(lines[0], "finished", list(range(BATCH)))),
    ("tokens", "another number of trained tokens", lambda lines: lines[3].update(trained_tokens=1)),
    ("twice", "left out twice", drop_twice),
    ("dropped", "left out of a step that it is no part of", drop_of_another_step),
    ("staleness", "drawn by a version that is too old", lambda lines: put(lines[6], "oldest", 0, 1)),
    ("staleness", "drawn by a version that was not there yet", lambda lines: put(lines[6], "newest", 0, 7)),
    ("staleness", "newest before oldest", lambda lines: (put(lines[6], "oldest", 0, 6), put(lines[6], "newest", 0, 5))),
    ("versions", "tokens that no version drew", lambda lines: put(lines[6], "oldest", 0, None)),
    ("metrics", "a response of another length", lambda lines: put(lines[5], "tokens", 1, 40)),
    ("prompts", "siblings of two prompts", lambda lines: put(lines[5], "prompt_ids", 1, 47)),
    ("prompts", "another prompt", lambda lines: lines[5]["prompt_ids"].reverse()),
    ("outcomes", "a line without versions", lambda lines: lines[5].pop("oldest")),
    ("outcomes", "a column that is short", lambda lines: spread(lines[5], "tokens").pop()),
    ("outcomes", "a version that is a text", lambda lines: lines[5].update(newest="5")),
]


@pytest.mark.parametrize(("kind", "what", "how"), LEDGER, ids=[what for _, what, _ in LEDGER])
def test_a_spoiled_ledger_is_found(run: Path, kind: str, what: str, how: Callable[[list[Line]], Any]) -> None:
    change(run, "ledger.jsonl", how)
    assert kind in kinds(run)


METRICS: list[tuple[str, str, Callable[[list[Line]], Any]]] = [
    ("gap", "a line is missing", lambda lines: lines.pop(2)),
    ("gap", "the last line is missing", lambda lines: lines.pop()),
    ("twice", "a line stands twice", lambda lines: lines.insert(3, lines[3])),
    ("order", "two lines change places", lambda lines: lines.insert(2, lines.pop(5))),
    ("beyond", "a step that the ledger has not", lambda lines: lines.append(lines[-1] | {"step": STEPS + 1})),
    ("staleness", "staler than allowed", lambda lines: lines[2].update(staleness_max=2.0)),
    ("metrics", "another staleness", lambda lines: lines[5].update(staleness_max=lines[5]["staleness_max"] - 0.5)),
    ("metrics", "another length", lambda lines: lines[5].update(response_tokens=1e3)),
    ("metrics", "a number that is none", lambda lines: lines[5].update(response_tokens="many")),
    ("metrics", "another share left out", lambda lines: lines[5].update(filtered=0.123)),
    ("metrics", "a staleness that is a text", lambda lines: lines[5].update(staleness_max="1")),
    ("unreadable", "no step", lambda lines: lines[5].pop("step")),
]


@pytest.mark.parametrize(("kind", "what", "how"), METRICS, ids=[what for _, what, _ in METRICS])
def test_spoiled_metrics_are_found(run: Path, kind: str, what: str, how: Callable[[list[Line]], Any]) -> None:
    change(run, "metrics.jsonl", how)
    assert kind in kinds(run)


SUMMARY = {
    "steps": 8,
    "prompts_consumed": 1,
    "trained_tokens": 1,
    "tokens_generated": 1,
    "lost_samples": 1,
    "duplicated_samples": 1,
    "resumed_from_step": 3,
    "dropped_prompts": 2,
}


@pytest.mark.parametrize("key", SUMMARY)
def test_a_summary_that_disagrees_is_found(run: Path, key: str) -> None:
    change_object(run, "summary.json", **{key: SUMMARY[key]})
    (problem,) = verify(run).problems
    assert problem[0] == "summary"
    assert key in problem[1]


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("missing", "ledger.jsonl", None),
        ("missing", "metrics.jsonl", None),
        ("missing", "events.jsonl", None),
        ("summary", "summary.json", None),
        ("summary", "summary.json", b"{"),
        ("summary", "summary.json", b"[]"),
        ("unreadable", "ledger.jsonl", b"\x00\xff\n"),
        ("unreadable", "ledger.jsonl", b'{"step": 1, "sample\n'),
        ("unreadable", "metrics.jsonl", b"[1]\n"),
        ("unreadable", "events.jsonl", b"nonsense\n"),
        ("checkpoint", "checkpoints/step-000006/COMMITTED.json", b"{}"),
        ("checkpoint", "checkpoints/step-000006/COMMITTED.json", b"\x80"),
    ],
)
def test_a_file_that_is_missing_or_no_file_of_a_run_is_found(run: Path, kind: str, name: str, content: bytes | None) -> None:
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    assert kind in kinds(run)


@pytest.mark.parametrize(("key", "value"), [("prompts_consumed", 7), ("trained_tokens", 0), ("tokens_generated", 3)])
def test_a_checkpoint_whose_totals_disagree_is_found(run: Path, key: str, value: int) -> None:
    marker = run / "checkpoints/step-000006/COMMITTED.json"
    totals = json.loads(marker.read_text())["totals"]
    change_object(marker.parent, marker.name, totals=totals | {key: value})
    (problem,) = verify(run).problems
    assert problem[0] == "checkpoint"
    assert key in problem[1]


def test_another_seed_gives_other_prompts(run: Path) -> None:
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 5", "seed: 6"))
    assert kinds(run) == {"prompts"}


# ------------------------------------------------------------------------------------------ runs that have not ended


def cut_to(run: Path, ledger: int, metrics: int) -> None:
    """What a kill leaves after so many lines."""
    change(run, "ledger.jsonl", lambda lines: lines.__delitem__(slice(ledger, None)))
    change(run, "metrics.jsonl", lambda lines: lines.__delitem__(slice(metrics, None)))
    change(run, "events.jsonl", lambda lines: lines.pop())
    (run / "summary.json").unlink()


def test_a_run_that_was_killed_between_the_files_of_a_step_is_sound(run: Path) -> None:
    cut_to(run, 7, 6)
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"step": 8, "sam')
    proof = verify(run)
    assert (proof.state, proof.problems) == ("unfinished", [])
    assert ("run", f"unfinished, 7 of {STEPS} steps") in proof.facts
    assert any("step-000009 is ahead of the ledger" in note for note in proof.notes)


@pytest.mark.parametrize(("resumed", "sound"), [(3, True), (4, False), (None, False)])
def test_a_resume_that_was_killed_while_it_took_lines_back_is_sound(run: Path, resumed: int | None, sound: bool) -> None:
    cut_to(run, 7, 3)
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "start", "resumed_step": resumed}) + "\n")
    assert kinds(run) == (set() if sound else {"gap"})


@pytest.mark.parametrize("lines", [0, 1])
def test_a_run_that_was_killed_before_its_second_step_is_sound(run: Path, lines: int) -> None:
    cut_to(run, lines, 0)
    (run / "metrics.jsonl").unlink()
    if not lines:
        (run / "ledger.jsonl").unlink()
    proof = verify(run)
    assert (proof.state, proof.problems) == ("unfinished", [])
    (run / "events.jsonl").unlink()
    assert verify(run).problems == []


def test_a_ledger_that_is_gone_is_missed_in_a_run_that_goes_on(run: Path) -> None:
    cut_to(run, 7, 7)
    (run / "ledger.jsonl").unlink()
    assert kinds(run) == {"missing", "beyond"}


@pytest.mark.parametrize(("ledger", "metrics"), [(7, 5), (6, 7)])
def test_no_kill_leaves_the_files_further_apart(run: Path, ledger: int, metrics: int) -> None:
    cut_to(run, ledger, metrics)
    assert kinds(run) & {"gap", "beyond"}


@pytest.mark.parametrize(
    ("event", "state"),
    [("interrupted", "interrupted"), ("stopped", "interrupted"), ("failed", "failed"), ("start", "unfinished")],
)
def test_says_how_a_run_ended(run: Path, event: str, state: str) -> None:
    cut_to(run, 7, 7)
    change(run, "events.jsonl", lambda lines: lines.append({"kind": event, "resumed_step": 6}))
    proof = verify(run)
    assert (proof.state, proof.problems) == (state, [])


def test_a_summary_from_before_the_last_start_is_not_the_runs(run: Path) -> None:
    """A run that goes on with more steps has the old summary in its folder until it ends."""
    change(run, "events.jsonl", lambda lines: lines.append({"kind": "start", "resumed_step": 9}))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"  steps: {STEPS}\n", f"  steps: {STEPS + 5}\n"))
    proof = verify(run)
    assert (proof.state, proof.problems) == ("unfinished", [])


def test_prompts_that_are_elsewhere_are_a_note(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("  model:\n    type: tiny", "  model: org/elsewhere\n  was:\n    type: tiny", 1)
    )
    text = (run / "config.yaml").read_text()
    start = text.index("  was:")
    (run / "config.yaml").write_text(text[:start] + text[text.index("  revision", start) :])
    proof = verify(run)
    assert proof.problems == []
    assert "student.model=org/elsewhere is no folder on this machine" in proof.notes[0]


def test_a_ledger_of_an_older_version_proves_its_samples(run: Path) -> None:
    change(
        run,
        "ledger.jsonl",
        lambda lines: [line.pop(key) for line in lines for key in set(line) - {"step", "sample_ids", "dropped"}],
    )
    proof = verify(run)
    assert proof.problems == []
    assert "older version" in proof.notes[0]


# -------------------------------------------------------------------------------------------------------- the command


def call(run: Path) -> Any:
    return CliRunner().invoke(app, ["verify", str(run)])


def test_exit_codes(run: Path, tmp_path: Path) -> None:
    done = call(run)
    assert done.exit_code == 0
    assert "each with one outcome" in done.stdout
    change(run, "ledger.jsonl", lambda lines: [line["sample_ids"].pop() for line in lines])
    done = call(run)
    assert done.exit_code == 1
    assert "lost: sample 7, of step 1, has no outcome" in done.stderr
    # A list of nine is cut; how many there are is told.
    assert "lost: 4 more" in done.stderr
    done = call(tmp_path)
    assert done.exit_code == 2
    assert "not a run folder" in done.stderr
