"""Checkpoints as the driver has them written: their numbers, their progress, and a teacher that is renewed with the student."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.checkpointing import Checkpoint, CheckpointedStudent, Numbering, Renewal
from kdray.runs.checkpoints import commit
from kdray.runs.folder import RunFolder
from kdray.runs.storage import Storage


class Ranks:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def renew(self, version: int, decay: float) -> None:
        self.asked.append(("renew", version, decay))

    async def publish(self, version: int) -> None:
        self.asked.append(("publish", version))

    async def open_checkpoint(self, step: int, progress: dict[str, Any]) -> None:
        self.asked.append(("open", step, progress))

    async def commit_checkpoint(self) -> Any:
        self.asked.append(("commit",))
        return SimpleNamespace(bytes=1, write_s=0.0, store_s=0.0)

    async def save_checkpoint(self, step: int, progress: dict[str, Any], name: str | None = None) -> Any:
        self.asked.append(("save", step, progress) if name is None else ("save", step, progress, name))
        return SimpleNamespace(bytes=1, write_s=0.0, store_s=0.0)


def student(tmp_path: Path, ranks: Any, **changes: Any) -> CheckpointedStudent:
    given: dict[str, Any] = {
        "stored": None,
        "keep": 2,
        "progress": {},
        "live": {},
        "renewal": None,
        "on_event": lambda kind, **fields: None,
        "guard": lambda: None,
    }
    return CheckpointedStudent(ranks, RunFolder(tmp_path), **given | changes)


@pytest.mark.parametrize(
    ("leaving", "full", "urgency", "reason"),
    [
        ([1], True, "now", {"reason": "preemption", "ranks": [1]}),
        ([], True, "soon", {"reason": "training.replay_gib"}),
        ([], False, None, None),
    ],
)
async def test_a_checkpoint_comes_early_before_a_node_is_taken_away(
    tmp_path: Path, leaving: list[int], full: bool, urgency: str | None, reason: dict[str, Any] | None
) -> None:
    async def answer(value: Any) -> Any:
        return value

    told: list[tuple[str, dict[str, Any]]] = []
    ranks = SimpleNamespace(leaving=lambda: answer(leaving), holds_too_much=lambda: answer(full))
    found = student(tmp_path, ranks, on_event=lambda kind, **fields: told.append((kind, fields)))
    assert await found.should_save_early() == urgency
    assert told == ([] if reason is None else [("checkpoint_early", reason)])


async def test_a_stop_takes_the_rest_of_the_step_and_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("cluster.checkpointing.time", SimpleNamespace(monotonic=lambda: clock[0]))
    expected: list[float] = []

    class Slow(Ranks):
        async def train_step(self, *given: Any) -> Any:
            clock[0] += 20.0
            expected.append(pace.time_to_stop())
            clock[0] += 40.0

        async def save_checkpoint(self, step: int, progress: dict[str, Any], name: str | None = None) -> Any:
            clock[0] += 9.0
            return await super().save_checkpoint(step, progress, name)

        async def open_checkpoint(self, step: int, progress: dict[str, Any]) -> None:
            clock[0] += 3.0

        async def commit_checkpoint(self) -> Any:
            clock[0] += 7.0
            expected.append(pace.time_to_stop())
            return await super().commit_checkpoint()

    saving = student(tmp_path, Slow())
    pace = saving.pace
    assert pace.time_to_stop() == 0.0, "before the first step nothing is known"
    await saving.train_step(None)  # type: ignore[arg-type]
    assert pace.time_to_stop() == 0.0
    await saving.save_checkpoint(1)
    assert pace.time_to_stop() == 9.0
    await saving.train_step(None)  # type: ignore[arg-type]
    assert expected == [0.0, 49.0]
    opened = await saving.open_checkpoint(2)
    await opened.keep_files()
    clock[0] += 500.0  # an evaluation
    await opened.commit()
    assert expected[2:] == [9.0 + 9.0], "a stop in the middle of it waits for it, and writes another one"
    assert pace.time_to_stop() == 3.0 + 7.0


@pytest.mark.parametrize("done", [0, 1, 7])
def test_numbers_beyond_distillation_never_meet_its_own(done: int) -> None:
    numbers = Numbering(steps=10, finetune_steps=5)
    assert numbers.finetune_checkpoint(done) == 11 + done
    assert numbers.finetune_done(numbers.finetune_checkpoint(done)) == done
    assert (numbers.finetuned_version, numbers.control_version) == (11, 12)
    assert (numbers.last_checkpoint, numbers.last_version) == (16, 11)
    without = Numbering(steps=10, finetune_steps=0)
    assert (without.last_checkpoint, without.last_version) == (10, 10)


async def test_a_teacher_is_renewed_before_the_version_that_belongs_to_it(tmp_path: Path) -> None:
    ranks = Ranks()
    following = student(tmp_path, ranks, renewal=Renewal(every=2, decay=0.9))
    for version in (1, 2, 3):
        await following.publish(version)
    assert ranks.asked == [("publish", 1), ("renew", 2, 0.9), ("publish", 2), ("publish", 3)]
    alone = Ranks()
    await student(tmp_path, alone).publish(2)
    assert alone.asked == [("publish", 2)]


async def test_progress_is_what_holds_when_a_checkpoint_is_written(tmp_path: Path) -> None:
    ranks, progress, tokens = Ranks(), {"stage": "distill"}, [0]
    saving = student(tmp_path, ranks, progress=progress, live={"tokens": lambda: tokens[0]})
    progress["stage"] = "finetune"
    tokens[0] = 5
    await saving.save_checkpoint(3)
    assert ranks.asked == [("save", 3, {"stage": "finetune", "tokens": 5})]


async def test_an_open_checkpoint_keeps_the_progress_of_its_step_and_sends_the_files_before_its_commit(tmp_path: Path) -> None:
    ranks, tokens, told = Ranks(), [5], []

    def send() -> int:
        ranks.asked.append(("send",))
        return 7

    for step in range(3):
        commit(Storage.local(tmp_path), f"checkpoints/step-{step:06d}", {"step": step}, [])
    guarded: list[int] = []
    saving = student(
        tmp_path,
        ranks,
        live={"tokens": lambda: tokens[0]},
        stored=SimpleNamespace(send=send, storage=Storage.local(tmp_path)),
        on_event=lambda kind, **fields: told.append((kind, fields)),
        guard=lambda: guarded.append(len(ranks.asked)),
    )
    opened = await saving.open_checkpoint(3)
    tokens[0] = 6
    await opened.keep_files()
    await opened.commit()
    assert ranks.asked == [("open", 3, {"tokens": 5}), ("send",), ("commit",)]
    assert guarded == [0, 2, 3, 3], "before it is opened, committed, and another's marker and files are deleted"
    ((kind, fields),) = told
    assert (kind, fields["step"], fields["files_bytes"], fields["bytes"]) == ("stored", 3, 7, 1)


def test_a_checkpoint_tells_its_place_in_the_run() -> None:
    within = Checkpoint(Path("checkpoints/sft-000250"), {"step": 0, "stage": "sft", "phase_step": 250})
    assert (within.step, within.within) == (0, {"phase": "sft", "phase_step": 250})
    old = Checkpoint(Path("checkpoints/step-000004"), {"step": 4})
    assert (old.stage, old.within) == ("distill", {})


async def test_a_checkpoint_in_a_phase_has_its_name_and_event(tmp_path: Path) -> None:
    ranks, told = Ranks(), []
    saving = student(tmp_path, ranks, progress={"stage": "sft"}, on_event=lambda kind, **fields: told.append((kind, fields)))
    await saving.save_in_phase("sft", 250, step=0)
    assert ranks.asked == [("save", 0, {"stage": "sft", "phase_step": 250}, "sft-000250")]
    assert told == [("checkpoint", {"step": 0, "phase": "sft", "phase_step": 250})]
