"""Trial of weights that rank 0 sends from its device into an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from actors.serving.spec import EngineSpec
from actors.weights.sender import TRAINER_INFO, send_weights
from kdray.models.random_models import EOS, VOCAB, RandomModel

_IDS = tuple(np.random.default_rng(7).integers(3, VOCAB, size=64).tolist())
_BUCKET = 64 * 2**20


@dataclass(frozen=True)
class EngineTransfer:
    """Trial of `training.weight_transfer`: a new student from this process's device into an engine, as rank 0 sends it."""

    backend: str = "nccl"
    gpus: int = 2
    """The engine's, and rank 0's."""
    only_on_gpus: bool = True
    tolerance: float = 1e-3
    """Nats a token."""
    engine: Mapping[str, Any] | None = None
    """Further fields of the engine's spec."""

    async def run(self, folder: Path) -> dict[str, Any]:
        """Returns: `ok`; the largest gap of log q after the transfer, how far log q moved, in nats; seconds."""
        from actors.serving.engine import TeacherEngine
        from cluster.diagnosis.exactness import log_probabilities_of_ids

        old, new = (RandomModel("llama", 64, 2, seed=seed).write(folder / f"student-{seed}") for seed in (2, 3))
        spec = EngineSpec(
            role="mixture",
            model=str(RandomModel("llama", 128, 3, seed=1).write(folder / "teacher")),
            student=str(old),
            vocab_size=VOCAB,
            stop_ids=(EOS,),
            max_model_len=200,
            teacher="t",
            dtype="float32",
            kv_cache_gib=0.1,
            max_num_seqs=8,
            gpu_memory_utilization=0.3,
            weight_transfer=self.backend,
        )
        engine = TeacherEngine(replace(spec, **(self.engine or {})))
        # The engine takes the first GPU.
        device = torch.device("cuda:1" if torch.cuda.is_available() else "cpu")
        tensors = {name: each.to(device) for name, each in load_file(new / "model.safetensors").items()}
        try:
            await engine.start()
            before = await engine.log_probabilities(_IDS)
            began = time.perf_counter()
            await _transfer(engine, tensors, self.backend, device)
            seconds = time.perf_counter() - began
            after = await engine.log_probabilities(_IDS)
        finally:
            await engine.close()
        gap = float(np.abs(after - log_probabilities_of_ids(str(new), _IDS)).max())
        moved = float(np.abs(after - before).mean())
        return {"ok": gap <= self.tolerance < moved, "updated": gap, "moved": moved, "seconds": seconds}


async def _transfer(engine: Any, tensors: dict[str, torch.Tensor], backend: str, device: torch.device) -> None:
    """Send tensors to an engine as its version 1, by the process that rank 0 sends with. Raises: RuntimeError if it fails."""
    context = torch.multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    arguments = (theirs, TRAINER_INFO[backend], "127.0.0.1", device, _BUCKET)
    sender = context.Process(target=send_weights, args=arguments, daemon=True)
    sender.start()
    theirs.close()
    try:
        # "ready"
        await asyncio.to_thread(pipe.recv)
        pipe.send(tensors)
        pipe.send(engine.num_workers)
        while True:
            kind, info = await asyncio.to_thread(pipe.recv)
            if kind == "done":
                return
            if kind == "failed":
                raise RuntimeError(info)
            if kind == "connect":
                await engine.connect_student(info)
            else:
                await engine.receive_student(info, 1)
            pipe.send(None)
    finally:
        sender.kill()
        sender.join()
        pipe.close()
