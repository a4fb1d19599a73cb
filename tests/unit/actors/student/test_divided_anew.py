"""Checkpoints of DeepSpeed that another number of ranks wrote, or another ZeRO stage: the same curve goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.student.trainer import StudentTrainer
from kdray.errors import TrainingError
from kdray.rollouts.batching import shard
from kdray.types import TrainBatch
from tests.unit.actors.student.test_backend_contract import VOCAB, batch_of, phase_of, started, training_of, weights_of

pytestmark = pytest.mark.filterwarnings("ignore")

NEAR = {"fp32": 2e-6, "bf16": 2e-2}
"""Largest difference after two further updates: ranks add their gradients up in another order."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_model(folder: Path, layers: int = 2) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=VOCAB,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def start(model: Path, stage: int, precision: str = "fp32", ranks: int = 1) -> StudentTrainer:
    backend = {"type": "deepspeed", "zero_stage": stage}
    return started(training_of(backend, precision=precision, ranks=ranks), phase_of(model))


def go_on(trainer: StudentTrainer, rank: int = 0, ranks: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and learning rates of steps 3 and 4, and the weights after them."""
    reports = [trainer.train_step(dealt(step, rank, ranks)) for step in (3, 4)]
    numbers = [number for each in reports for number in (each.loss, each.grad_norm, each.learning_rate)]
    return numbers, weights_of(trainer)


def dealt(step: int, rank: int, ranks: int) -> TrainBatch:
    return shard(batch_of(step), rank, ranks)


def assert_near(found: tuple[list[float], dict[str, torch.Tensor]], truth: Any, near: float) -> None:
    assert found[0] == pytest.approx(truth[0], abs=near, rel=near)
    assert found[1].keys() == truth[1].keys()
    for name, tensor in truth[1].items():
        torch.testing.assert_close(found[1][name].float(), tensor.float(), atol=near, rtol=near, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 3), (3, 1), (1, 0)])
def test_another_stage_continues_the_curve(
    process_group: None, model: Path, tmp_path: Path, before: int, after: int, precision: str
) -> None:
    first = start(model, before, precision)
    for step in (1, 2):
        first.train_step(batch_of(step))
    first.save(tmp_path)
    saved = weights_of(first)
    truth = go_on(first)
    first.close()
    second = start(model, after, precision)
    assert second.backend.reads_every_rank(tmp_path)
    second.load(tmp_path)
    loaded = weights_of(second)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert (second.steps_done, second.backend.updates) == (2, 2)
    assert_near(go_on(second), truth, NEAR[precision])
    # What it writes is a checkpoint of its own layout.
    (tmp_path / "again").mkdir()
    second.save(tmp_path / "again")
    assert not second.backend.reads_every_rank(tmp_path / "again")
    second.close()


def as_one_of_two(rank: int, model: Path, folder: Path) -> None:
    """Two ranks at stage 3, of odd shares, go on from one rank's checkpoint, and write their own in its middle."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for stage in (3, 2):
        trainer = start(model, stage, ranks=2)
        trainer.load(folder / "one")
        (folder / f"two-{stage}").mkdir(exist_ok=True)
        trainer.save(folder / f"two-{stage}")
        found = go_on(trainer, rank, 2)
        if rank == 0:
            torch.save(found, folder / f"found-{stage}.pt")
        trainer.close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_other_ranks_continue_the_curve(process_group: None, model: Path, tmp_path: Path) -> None:
    one = start(model, 2)
    for step in (1, 2):
        one.train_step(batch_of(step))
    (tmp_path / "one").mkdir()
    one.save(tmp_path / "one")
    truth = go_on(one)
    one.close()
    torch.multiprocessing.spawn(as_one_of_two, (model, tmp_path), nprocs=2)
    for stage in (3, 2):
        assert_near(torch.load(tmp_path / f"found-{stage}.pt"), truth, NEAR["fp32"])
        again = start(model, 0)
        again.load(tmp_path / f"two-{stage}")
        assert_near(go_on(again), truth, NEAR["fp32"])
        again.close()


def test_files_that_are_missing_or_of_another_student_are_named(process_group: None, model: Path, tmp_path: Path) -> None:
    first = start(model, 2)
    first.save(tmp_path)
    first.close()
    larger = start(write_model(tmp_path / "larger", layers=3), 0)
    with pytest.raises(TrainingError, match=r"no checkpoint of this student: model\.layers\.2\.\S+ is not in it"):
        larger.load(tmp_path)
    larger.close()
    next(tmp_path.glob("state/*optim_states.pt")).unlink()
    second = start(model, 0)
    with pytest.raises(TrainingError, match=r"has the optimizer states of ranks \[\], not of all 1"):
        second.load(tmp_path)
    second.close()
