"""Batches since the last checkpoint: on disk once all ranks have trained them, and whole when they are replayed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.student.kept_batches import KeptBatches, read_batch, write_batch
from actors.student.mailbox import Command, Mailbox
from actors.student.trainer import Phase
from kdray.errors import TrainingError
from kdray.types import TrainBatch
from tests.support.local_actors import reference

PHASE = Phase("distill", "base", None, None, 1e-4, 20)


def batch(step: int, rank: int = 0) -> TrainBatch:
    random = np.random.default_rng([step, rank])
    ids = random.integers(0, 99, (4, 6)).astype(np.int32)
    return TrainBatch(
        step,
        np.arange(4, dtype=np.int64),
        ids,
        np.full(4, 6, np.int32),
        ids > 50,
        17,
        {
            "mixture_logprobs": random.random((4, 6)).astype(np.float32),
            "support_ids": random.integers(-1, 9, (4, 6, 3)).astype(np.int32),
            "teacher_hidden": random.random((4, 6, 2)).astype(np.float16),
        },
        ("teacher/a/staleness_0", "teacher/a/staleness_1"),
    )


def assert_same(found: TrainBatch, wanted: TrainBatch) -> None:
    assert (found.step, found.num_target_tokens, found.groups) == (wanted.step, wanted.num_target_tokens, wanted.groups)
    arrays = {name: getattr(wanted, name) for name in ("sample_ids", "token_ids", "lengths", "loss_mask")}
    assert found.columns.keys() == wanted.columns.keys()
    for name, value in (arrays | wanted.columns).items():
        own = found.columns[name] if name in wanted.columns else getattr(found, name)
        assert own.dtype == value.dtype, name
        np.testing.assert_array_equal(own, value)


def test_a_batch_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_batch(tmp_path / "x", batch(3))
    assert_same(read_batch(tmp_path / "x"), batch(3))


def test_a_damaged_batch_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    kept = KeptBatches(tmp_path)
    kept.put(4, [batch(1)], None)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match="continue with --resume, which draws it again"):
        kept.get(4, 0)


def references(*batches: TrainBatch) -> Any:
    return [reference(each) for each in batches]


async def train(mailbox: Mailbox, step: int, text: bool = False) -> int:
    """A step of two ranks, whose shards are on disk when this returns."""
    shards = references(batch(step, 0), batch(step, 1))
    index = await mailbox.post(Command("train", shards=shards, text_shards=shards[::-1] if text else None))
    for rank in range(2):
        await mailbox.answer(index, rank, "trained")
    keeping = mailbox._keeping
    assert keeping is not None
    await keeping
    return index


async def test_ranks_that_restart_train_the_same_batches_from_disk(scratch: Path) -> None:
    mailbox = Mailbox(2, on_disk=True)
    await mailbox.post(Command("phase", phase=PHASE))
    steps = {await train(mailbox, step, text=step == 2): step for step in (1, 2, 3)}
    for index, step in steps.items():
        command = await mailbox.command(index)
        assert (command.shards, command.text_shards, command.kept) == (None, None, index), "the object store is free of them"
        for rank in range(2):
            shard, text = await mailbox.shards(index, rank)
            assert_same(shard, batch(step, rank))
            if step == 2:
                assert text is not None
                assert_same(text, batch(step, 1 - rank))
            else:
                assert text is None
    files = files_in(scratch)
    assert len(files) == 8
    assert await mailbox.kept_bytes() == sum(path.stat().st_size for path in files)
    await mailbox.close()
    assert everything_in(scratch) == []


async def test_a_checkpoint_forgets_what_came_before_it(scratch: Path) -> None:
    mailbox = Mailbox(2, on_disk=True)
    await mailbox.post(Command("phase", phase=PHASE))
    for step in (1, 2):
        await train(mailbox, step)
    save = await mailbox.post(Command("save", checkpoint="step-2"))
    for rank in range(2):
        await mailbox.answer(save, rank, "saved")
    assert await mailbox.kept_bytes() == 0
    assert not files_in(scratch)
    index = await train(mailbox, 3)
    assert await mailbox.start(0) == (index, PHASE, "step-2")
    assert_same((await mailbox.shards(index, 1))[0], batch(3, 1))


async def test_a_slow_disk_holds_training_up(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no more than two batches are ever in the object store."""
    mailbox = Mailbox(2, on_disk=True)
    await mailbox.post(Command("phase", phase=PHASE))
    written = asyncio.Event()

    async def wait(*_: object) -> None:
        await written.wait()

    monkeypatch.setattr(mailbox, "_keep", wait)
    index = await mailbox.post(Command("train", shards=references(batch(1), batch(1, 1))))
    for rank in range(2):
        await mailbox.answer(index, rank, "trained")
    # The new weights do not wait for it.
    assert await mailbox.post(Command("publish", version=1)) == index + 1
    following = asyncio.ensure_future(mailbox.post(Command("train")))
    await asyncio.sleep(0.01)
    assert not following.done()
    written.set()
    assert await following == index + 2


async def test_a_full_disk_leaves_a_batch_in_the_object_store(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("actors.student.kept_batches.write_batch", full)
    mailbox = Mailbox(2, on_disk=True)
    await mailbox.post(Command("phase", phase=PHASE))
    command = await mailbox.command(await train(mailbox, 1))
    assert command.shards is not None
    assert [kind for kind, _ in await mailbox.news(0)] == ["batches_not_kept"]


def files_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


def everything_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("actors.weights.scratch._own", {})
    return tmp_path
