"""Process group of this process alone, as DeepSpeed finds one in a Ray Train worker; trainers end with their test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actors.student.trainer import Phase, StudentTrainer


@pytest.fixture(autouse=True)
def _close_trainers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what a test leaves open: at ZeRO stage 3 each keeps a bucket of 2 GB, and no process forks with many of them."""
    started: list[StudentTrainer] = []
    start = StudentTrainer.start_phase

    def start_phase(self: StudentTrainer, phase: Phase) -> None:
        started.append(self)
        start(self, phase)

    monkeypatch.setattr(StudentTrainer, "start_phase", start_phase)
    yield
    for trainer in started:
        trainer.close()


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default group; it stays until the process ends, since DeepSpeed keeps the first one that it sees."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        if not torch.distributed.is_initialized():
            meeting = tmp_path_factory.mktemp("group") / "file"
            torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
        yield
