"""What a resume needs beside the weights: which checkpoint, and which samples were trained."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdray.errors import DataError
from kdray.runs.checkpoints import (
    COMMITTED,
    Committed,
    NotWhole,
    begin,
    checkpoint_at,
    clear,
    commit,
    discard,
    drop_checkpoints,
    folder_of,
    newest_checkpoint,
    prune_checkpoints,
)
from kdray.runs.ledger import Ledger, sample_outcomes
from kdray.runs.storage import Storage
from kdray.types import Rollout

WEIGHTS = b"weights of rank 0"
OPTIMIZER = b"state of rank 1"


def checkpoint(run: Path, name: str, **progress: object) -> Path:
    """A checkpoint of two ranks, as they write it."""
    storage = Storage.local(run)
    parts = [
        {"state/model.pt": storage.write(f"checkpoints/{name}/state/model.pt", WEIGHTS)},
        {"state/optimizer.pt": storage.write(f"checkpoints/{name}/state/optimizer.pt", OPTIMIZER)},
    ]
    commit(storage, f"checkpoints/{name}", progress, parts)
    return run / "checkpoints" / name


def newest(run: Path) -> tuple[Committed | None, list[NotWhole]]:
    return newest_checkpoint([Storage.local(run)])


def steps(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_the_marker_lists_every_file_with_size_digest_and_rank(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "step-000004", step=4, trained_tokens=9)
    marker = json.loads((folder / COMMITTED).read_text())
    assert marker == {
        "step": 4,
        "trained_tokens": 9,
        "files": {
            "state/model.pt": {"size": 17, "sha256": hashlib.sha256(WEIGHTS).hexdigest(), "rank": 0},
            "state/optimizer.pt": {"size": 15, "sha256": hashlib.sha256(OPTIMIZER).hexdigest(), "rank": 1},
        },
    }


def test_newest_checkpoint_has_the_most_steps(tmp_path: Path) -> None:
    # Names sort the other way round, and the newest is not the last one written.
    checkpoint(tmp_path, "step-10", step=10, trained_tokens=123)
    checkpoint(tmp_path, "step-9", step=9)
    checkpoint(tmp_path, "step-2", step=2)
    found, passed_over = newest(tmp_path)
    assert found is not None
    assert (found.key, found.progress, found.step) == ("checkpoints/step-10", {"step": 10, "trained_tokens": 123}, 10)
    assert passed_over == []


def test_of_two_storages_the_most_steps_count_and_then_the_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for run, held in ((first, (2, 6)), (second, (6, 8))):
        run.mkdir()
        for step in held:
            checkpoint(run, f"step-{step}", step=step)
    places = [Storage.local(first), Storage.local(second)]
    found, _ = newest_checkpoint(places)
    assert found is not None
    assert (found.step, found.storage) == (8, places[1])
    (second / "checkpoints" / "step-8" / COMMITTED).unlink()
    for order in (places, places[::-1]):
        found, _ = newest_checkpoint(order)
        assert found is not None
        assert (found.step, found.storage) == (6, order[0])


def test_newest_checkpoint_passes_over_folders_without_a_marker(tmp_path: Path) -> None:
    checkpoint(tmp_path, "step-3", step=3)
    (checkpoint(tmp_path, "step-8", step=8) / COMMITTED).unlink()
    checkpoint(tmp_path, ".step-9.partial", step=9)
    checkpoint(tmp_path, "sft")
    found, passed_over = newest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert passed_over == []


@pytest.mark.parametrize("make", [True, False])
def test_newest_checkpoint_of_nothing(tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    assert newest(tmp_path) == (None, [])


def _list(folder: Path, files: dict[str, object]) -> None:
    (folder / COMMITTED).write_text(json.dumps({"step": 7, "files": files}))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: _flip(folder / "state/optimizer.pt"), r"state/optimizer\.pt does not hold what was written \(sha256 "),
        (lambda folder: (folder / "state/model.pt").write_bytes(b"half"), r"state/model\.pt has 4 bytes, 17 were written"),
        (lambda folder: (folder / "state/model.pt").unlink(), r"state/model\.pt is missing"),
        (lambda folder: (folder / COMMITTED).write_text("{"), r"COMMITTED\.json lists|not valid JSON"),
        (lambda folder: (folder / COMMITTED).write_text('{"step": 7}'), r"COMMITTED\.json lists no files"),
        (
            lambda folder: _list(folder, {"../../../etc/x": {"size": 1, "sha256": "", "rank": 0}}),
            r"lists '\.\./\.\./\.\./etc/x'",
        ),
        (lambda folder: _list(folder, {"/etc/x": {"size": 1, "sha256": "", "rank": 0}}), r"lists '/etc/x'"),
        (lambda folder: _list(folder, {"state/model.pt": {"size": 17, "sha256": ""}}), r"lists 'state/model\.pt'"),
        (lambda folder: _list(folder, {"state/model.pt": 17}), r"lists 'state/model\.pt'"),
        (lambda folder: (folder / COMMITTED).write_text('{"files": {}}'), r"COMMITTED\.json names no step"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_an_older_whole_one_used(tmp_path: Path, damage, reason: str) -> None:
    for step in (3, 5):
        checkpoint(tmp_path, f"step-{step}", step=step)
    damage(checkpoint(tmp_path, "step-7", step=7))
    found, (bad,) = newest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert bad.key == "checkpoints/step-7"
    assert re.search(reason, bad.reason), bad.reason
    # Taken off, it is no obstacle: not looked at again, written anew when its step comes, and pushing out no whole one.
    discard(bad)
    assert newest(tmp_path)[1] == []
    prune_checkpoints(Storage.local(tmp_path), keep=2)
    assert steps(tmp_path) == {"step-3", "step-5"}


def test_where_none_is_whole_the_run_is_not_begun_anew(tmp_path: Path) -> None:
    for step in (3, 5):
        _flip(checkpoint(tmp_path, f"step-{step}", step=step) / "state/model.pt")
    with pytest.raises(DataError, match=r"no checkpoint of the run is whole: .*step-5: state/model\.pt .*step-3: .*run\.name"):
        newest(tmp_path)


def test_pruning_keeps_the_newest_and_removes_what_was_torn(tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        checkpoint(tmp_path, f"step-{step}", step=step)
    (checkpoint(tmp_path, "step-12", step=12) / COMMITTED).unlink()
    checkpoint(tmp_path, "sft")
    prune_checkpoints(Storage.local(tmp_path), keep=2)
    assert steps(tmp_path) == {"step-10", "step-11", "sft"}


def test_pruning_leaves_what_is_torn_while_nothing_is_committed(tmp_path: Path) -> None:
    (checkpoint(tmp_path, "step-0", step=0) / COMMITTED).unlink()
    prune_checkpoints(Storage.local(tmp_path), keep=1)
    assert steps(tmp_path) == {"step-0"}


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
    told = sample_outcomes([rollout(0, [4, 3, 5]), rollout(1, [], teacher="")])
    digest = told.pop("responses_sha256")
    assert told == {"prompt_ids": 3, "tokens": [3, 0], "oldest": [3, None], "newest": [5, None], "scored_by": ["t", ""]}
    turns = replace(rollout(0, [4, -1, 5]), writer=np.array([0, 4, 0], np.int8))
    context = replace(rollout(1, [-1]), writer=np.array([4], np.int8))
    of_turns = sample_outcomes([turns, context])
    assert (of_turns["tokens"], of_turns["oldest"], of_turns["newest"]) == ([2, 0], [4, None], [5, None])
    # A length before each response, both as 32 little-endian bits.
    assert digest == hashlib.sha256(struct.pack("<5i", 3, 0, 0, 0, 0)).hexdigest()
    Ledger(path).append(1, [0, 1], {1: "finished"}, told)
    assert json.loads(path.read_text()) == {"step": 1, "sample_ids": [0, 1], "dropped": {"finished": [1]}, **told}


def test_checkpoints_of_supervised_phases_have_their_place_in_the_run(tmp_path: Path) -> None:
    """Those of the warm-up are before every step, those of the control behind them."""

    def found() -> str:
        newest_one = newest(tmp_path)[0]
        assert newest_one is not None
        return newest_one.key.removeprefix("checkpoints/")

    for done in (9, 10, 11):
        checkpoint(tmp_path, f"sft-{done:06d}", step=0, phase_step=done)
    assert found() == "sft-000011"
    prune_checkpoints(Storage.local(tmp_path), 2)
    assert steps(tmp_path) == {"sft-000010", "sft-000011"}
    with pytest.raises(
        DataError, match=r"the run has none but of a supervised phase \(sft-000010, sft-000011\), which only --resume"
    ):
        checkpoint_at([Storage.local(tmp_path)], 9)
    for step in (0, 3, 20):
        checkpoint(tmp_path, f"step-{step:06d}", step=step)
    assert found() == "step-000020"
    for done in (3, 6, 9):
        checkpoint(tmp_path, f"control-{done:06d}", step=20, phase_step=done)
    (checkpoint(tmp_path, "control-000012", step=20, phase_step=12) / COMMITTED).unlink()
    assert found() == "control-000009"
    prune_checkpoints(Storage.local(tmp_path), 2)
    assert steps(tmp_path) == {"step-000003", "step-000020", "control-000006", "control-000009"}
    with pytest.raises(DataError, match="there are those of 3, 20$"):
        checkpoint_at([Storage.local(tmp_path)], 9)
    drop_checkpoints(Storage.local(tmp_path), "control")
    assert steps(tmp_path) == {"step-000003", "step-000020"}


def test_a_driver_s_own_files_are_those_that_its_marker_names(tmp_path: Path) -> None:
    storage, key = Storage.local(tmp_path), "checkpoints/step-000004"
    assert begin(storage, key, folder_of("a" * 32))
    mine, other = folder_of("a" * 32), folder_of("b" * 32)
    parts = [{"x.pt": storage.write(f"{key}/{mine}/x.pt", WEIGHTS)}]
    storage.write(f"{key}/{other}/x.pt", b"late")
    commit(storage, key, {"step": 4}, parts, mine)
    clear(storage, key, mine)
    assert set(storage.list(key)) == {f"{key}/{COMMITTED}", f"{key}/by-aaaaaaaaaaaa/x.pt"}
    found, bad = newest(tmp_path)
    assert (found and found.progress, bad) == ({"step": 4}, [])
    assert not begin(storage, key, mine), "from a replay"
    assert not begin(storage, key, other, known=True), "it was resumed from"
    assert begin(storage, key, other), "another student"
    assert newest(tmp_path)[0] is not None, "it stays whole until then"
    storage.write(f"{key}/{COMMITTED}", json.dumps({"step": 4, "folder": "../..", "files": {}}).encode())
    with pytest.raises(DataError, match="which is no folder of a checkpoint"):
        newest(tmp_path)
