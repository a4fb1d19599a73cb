"""Blocks of ledger lines say what their lines say one by one: nothing wrong is overlooked in them, whatever it is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growth import plant
from kdray.runs import verify as module
from kdray.runs.verification import blocks
from kdray.runs.verify import Proof, verify

STEPS, BATCH = 60, 32
TRIALS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("planted"), STEPS, BATCH)


@pytest.fixture(autouse=True)
def prompts_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = module._dataset(module.load_saved_config(run / "config.yaml"))
    monkeypatch.setattr(module, "_dataset", lambda config: found)
    # Several blocks, and a last one that is shorter.
    monkeypatch.setattr(blocks, "SAMPLES", 16 * BATCH)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Proof]:
    def prove(run: Path) -> Proof:
        with monkeypatch.context() as patch:
            patch.setattr(module._Ledger, "take", lambda self, raw: False)
            return verify(run)

    return prove


def test_a_sound_run_is_proved_by_blocks_alone(
    run: Path, one_by_one: Callable[[Path], Proof], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = one_by_one(run)

    def never(self: Any, line: Any) -> None:
        raise AssertionError("a line was looked at alone")

    monkeypatch.setattr(module._Ledger, "add", never)
    proof = verify(run)
    assert proof == wanted
    assert proof.problems == []
    assert dict(proof.facts)["left out"] == "12 by distinct"
    assert dict(proof.facts)["ranks"] == "2, whose own records were compared in 60 of 60 steps"


def change(value: Any, dice: random.Random) -> Any:
    """Another value, of the same kind or none."""
    if isinstance(value, list) and value:
        at = dice.randrange(len(value))
        how = dice.choice(["change", "change", "leave out", "repeat", "swap"])
        if how == "change":
            return [*value[:at], change(value[at], dice), *value[at + 1 :]]
        if how == "swap":
            other = dice.randrange(len(value))
            found = list(value)
            found[at], found[other] = found[other], found[at]
            return found
        return value[:at] + value[at + 1 :] if how == "leave out" else [*value[:at], value[at], *value[at:]]
    if isinstance(value, dict) and value:
        key = dice.choice(sorted(value))
        return {**value, key: change(value[key], dice)}
    if isinstance(value, str) and value:
        at = dice.randrange(len(value))
        return value[:at] + dice.choice("0f A") + value[at + 1 :]
    return dice.choice([0, 1, -1, 2, 3, 63, STEPS, None, "no", [], [0, 1], 2**40, 2**62, 2**63, 2**70, 1.5, True])


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_changed_in_a_line_is_told_as_by_lines_alone(
    run: Path, one_by_one: Callable[[Path], Proof], tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    path, told = run / "ledger.jsonl", 0
    whole = path.read_bytes()
    try:
        for _ in range(TRIALS // 4):
            lines = [json.loads(line) for line in whole.splitlines()]
            for _ in range(dice.choice([1, 1, 2])):
                at = dice.randrange(len(lines))
                how = dice.choice(["value"] * 8 + ["key", "line", "twice", "order"])
                if how == "value":
                    lines[at] = change(lines[at], dice)
                elif how == "key":
                    del lines[at][dice.choice(sorted(lines[at]))]
                elif how == "line":
                    del lines[at]
                elif how == "twice":
                    lines.insert(at, lines[at])
                else:
                    dice.shuffle(lines)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            wanted = one_by_one(run)
            assert verify(run) == wanted
            told += bool(wanted.problems)
    finally:
        path.write_bytes(whole)
    assert told > TRIALS / 8, "hardly anything was wrong in these"


def assert_found(ledger: Path, lines: list[dict[str, Any]], one_by_one: Callable[[Path], Proof]) -> None:
    """Something is wrong with the run if the ledger has these lines, and blocks say the same as lines one by one."""
    whole = ledger.read_bytes()
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        proof = verify(ledger.parent)
        assert proof == one_by_one(ledger.parent)
        assert proof.problems
    finally:
        ledger.write_bytes(whole)


@pytest.mark.parametrize("what", ["samples", "digest", "targets", "updates"])
def test_a_rank_that_trained_something_else_is_found(run: Path, one_by_one: Callable[[Path], Proof], what: str) -> None:
    """Two ranks that trained each other's, so that all sums are right."""
    path = run / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    one, other = lines[20]["trained"]
    if what in ("targets", "updates"):
        one[what], other[what] = one[what] + 1, other[what] - 1
    else:
        one[what], other[what] = other[what], one[what]
    assert_found(path, lines, one_by_one)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_range_that_is_no_pair_is_found(run: Path, one_by_one: Callable[[Path], Proof], length: int) -> None:
    """Of three numbers, the first two would be the right samples."""
    path = run / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    ranges = [part for line in lines for record in line["trained"] for part in record["samples"] if isinstance(part, list)]
    ranges[0][:] = [*ranges[0], ranges[0][1]][:length]
    assert_found(path, lines, one_by_one)
