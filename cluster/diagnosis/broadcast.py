"""Trial of the links between devices: a broadcast, by NCCL or gloo, whose values are checked.

Its processes are started anew and import this module, so that it imports little.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Broadcast:
    """Trial of a broadcast from the first device to all others: NCCL between GPUs, gloo between two processes on CPUs."""

    mib: int = 64
    """Size of a tensor."""
    tensors: int = 4
    gpus: int = 2
    """GPUs that it needs, where vLLM computes on GPUs."""
    only_on_gpus: bool = False

    async def run(self, folder: Path) -> dict[str, Any]:
        """Returns: `ok`, the number of devices, GB/s to each of them, and tensors that arrived with other values."""
        backend, world = ("nccl", torch.cuda.device_count()) if torch.cuda.is_available() else ("gloo", 2)
        out = folder / "broadcast.json"
        arguments = (world, backend, str(folder / "meeting"), self.mib * 2**18, self.tensors, str(out))
        torch.multiprocessing.spawn(_take_part, arguments, nprocs=world)
        found = json.loads(out.read_text(encoding="utf-8"))
        return {"ok": found["wrong"] == 0, "devices": world} | found


def _take_part(rank: int, world: int, backend: str, meeting: str, numbers: int, tensors: int, out: str) -> None:
    """One process of a broadcast; rank 0 writes the result. Args: meeting: path of a file that does not exist yet."""
    from torch import distributed

    device = torch.device(f"cuda:{rank}" if backend == "nccl" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, f"file://{meeting}", _TIMEOUT, world, rank)
    seconds, wrong = 0.0, 0
    # The first round includes what is made once.
    for turn in range(2):
        values = [float(turn * tensors + index + 1) for index in range(tensors)]
        buckets = [torch.full((numbers,), value if rank == 0 else 0.0, device=device) for value in values]
        distributed.barrier()
        began = time.perf_counter()
        for bucket in buckets:
            distributed.broadcast(bucket, 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()
        seconds = time.perf_counter() - began
        wrong += sum(not bool((bucket == value).all()) for bucket, value in zip(buckets, values, strict=True))
    count = torch.tensor([wrong], device=device)
    distributed.all_reduce(count)
    if rank == 0:
        found = {"GB/s": 4 * numbers * tensors / seconds / 1e9, "wrong": int(count)}
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()
