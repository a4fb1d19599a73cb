"""What a resume needs beside the weights: which checkpoint, and which samples were trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kdray.progress import COMMITTED, Ledger, fates, newest_checkpoint
from kdray.types import Rollout


def commit(checkpoints: Path, name: str, **progress: object) -> Path:
    folder = checkpoints / name
    folder.mkdir(parents=True)
    (folder / COMMITTED).write_text(json.dumps(progress))
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_newest_checkpoint_has_the_most_steps(tmp_path: Path) -> None:
    # Names sort the other way round, and the newest is not the last one written.
    newest = commit(tmp_path, "step-10", step=10, trained_tokens=123)
    commit(tmp_path, "step-9", step=9)
    commit(tmp_path, "step-2", step=2)
    assert newest_checkpoint(tmp_path) == (newest, {"step": 10, "trained_tokens": 123})


def test_newest_checkpoint_passes_over_folders_without_a_marker(tmp_path: Path) -> None:
    committed = commit(tmp_path, "step-3", step=3)
    (tmp_path / "step-8").mkdir()
    (tmp_path / "step-8" / "weights.bin").write_bytes(b"half")
    commit(tmp_path, ".step-9.partial", step=9)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == committed


@pytest.mark.parametrize("make", [True, False])
def test_newest_checkpoint_of_nothing(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "checkpoints"
    if make:
        (folder / "step-1").mkdir(parents=True)
    assert newest_checkpoint(folder) is None


def test_ledger_of_a_whole_run_has_nothing_lost_or_duplicated(path: Path) -> None:
    ledger = Ledger(path)
    for step in range(3):
        ledger.append(step + 1, list(range(step * 4, step * 4 + 4)))
    assert ledger.check(steps=3, batch_size=4) == (0, 0)


def test_ledger_counts_lost_and_duplicated(path: Path) -> None:
    ledger = Ledger(path)
    ledger.append(1, [0, 1, 1, 1])
    ledger.append(2, [4, 5, 0, 7])
    # Lost: 2, 3, 6. Duplicated: 1 twice more, 0 once more.
    assert ledger.check(steps=2, batch_size=4) == (3, 3)
    assert ledger.check(steps=3, batch_size=4) == (7, 3)


def test_ledger_without_a_file_has_everything_lost(path: Path) -> None:
    assert Ledger(path).check(steps=2, batch_size=3) == (6, 0)


def test_truncated_steps_can_be_trained_again(path: Path) -> None:
    ledger = Ledger(path)
    for step in range(4):
        ledger.append(step + 1, [2 * step, 2 * step + 1])
    ledger.truncate(2)
    assert ledger.check(steps=4, batch_size=2) == (4, 0)
    ledger.append(3, [4, 5])
    ledger.append(4, [6, 7])
    assert Ledger(path).check(steps=4, batch_size=2) == (0, 0)


def test_truncate_to_nothing_and_without_a_file(path: Path) -> None:
    Ledger(path).truncate(0)
    ledger = Ledger(path)
    ledger.append(1, [0])
    ledger.truncate(0)
    assert ledger.check(steps=1, batch_size=1) == (1, 0)


def test_a_torn_last_line_is_no_step_and_goes_with_a_truncate(path: Path) -> None:
    ledger = Ledger(path)
    ledger.append(1, [0, 1])
    with path.open("a") as file:
        file.write('{"step": 2, "sample_')
    assert ledger.check(steps=2, batch_size=2) == (2, 0)
    ledger.truncate(1)
    ledger.append(2, [2, 3])
    assert ledger.check(steps=2, batch_size=2) == (0, 0)


def rollout(sample_id: int, versions: list[int], teacher: str = "t") -> Rollout:
    ids = np.zeros(len(versions), np.int32)
    return Rollout(sample_id, 3, ids, ids, None, None, np.array(versions, np.int32), 1.0, "stop", teacher=teacher)


def test_fates_say_what_the_rollouts_say(path: Path) -> None:
    told = fates([rollout(0, [4, 3, 5]), rollout(1, [], teacher="")])
    assert told == {"prompt_ids": 3, "tokens": [3, 0], "oldest": [3, None], "newest": [5, None], "scored_by": ["t", ""]}
    Ledger(path).append(1, [0, 1], {1: "finished"}, told)
    assert json.loads(path.read_text()) == {"step": 1, "sample_ids": [0, 1], "dropped": {"finished": [1]}, **told}
