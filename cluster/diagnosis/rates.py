"""Rates of a machine: arithmetic and memory of its device, and tokens per second of an engine that holds two small models."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from actors.serving.spec import EngineSpec
from cluster.planning.accelerators import ACCELERATORS
from cluster.planning.memory import ModelShape, engine_memory
from kdray.models.random_models import VOCAB, RandomModel
from kdray.types import SampleRequest

PLAN_WITHIN = 0.2
"""Share by which `kdray plan` may be off."""
_MIN_S = 0.5
"""Shortest time over which a rate is measured."""


@dataclass(frozen=True)
class Throughput:
    """Trial of speed: an engine that samples from the mixture, at several numbers of sequences."""

    sizes: tuple[int, ...] = (1, 8, 64)
    """Sequences at once."""
    new_tokens: int = 64
    gpus: int = 0
    """GPUs that it needs."""
    only_on_gpus: bool = False

    async def run(self, folder: Path) -> dict[str, Any]:
        """Returns: `ok` if the KV cache has the size of the plan; response tokens per second at each size; of the device,
        TFLOP/s and GB/s, and their shares of the data sheet's if it is known.
        """
        from actors.serving.engine import TeacherEngine

        spec = EngineSpec(
            role="mixture",
            model=str(RandomModel("llama", 512, 8, seed=1).write(folder / "teacher")),
            student=str(RandomModel("llama", 128, 4, seed=2).write(folder / "student")),
            vocab_size=VOCAB,
            stop_ids=(),
            max_model_len=2 * self.new_tokens,
            teacher="t",
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            kv_cache_gib=0.5,
            max_num_seqs=max(self.sizes),
            gpu_memory_utilization=0.3,
        )
        engine = TeacherEngine(spec)
        found: dict[str, Any] = {}
        try:
            await engine.start()
            share = engine.kv_tokens / planned_kv_tokens(spec)
            found |= {"ok": abs(share - 1) <= PLAN_WITHIN, "KV cache, tokens / planned": share}
            for size in self.sizes:
                # The first pass at a size includes what is made once.
                for _ in range(2):
                    began = time.perf_counter()
                    async for _ in engine.sample(_requests(size, self.new_tokens)):
                        pass
                found[f"tokens/s at {size}"] = size * self.new_tokens / (time.perf_counter() - began)
        finally:
            await engine.close()
        return found | device_rates()


def planned_kv_tokens(spec: EngineSpec) -> int:
    """Tokens in the KV cache of an engine on this machine, as `kdray plan` counts them."""
    models = [ModelShape.of(AutoConfig.from_pretrained(each, trust_remote_code=False)) for each in (spec.model, spec.student)]
    on_gpu = torch.cuda.is_available()
    limit = torch.cuda.mem_get_info()[1] if on_gpu else 0
    return engine_memory(
        models,
        2 if spec.dtype == "bfloat16" else 4,
        1,
        spec.max_num_seqs,
        spec.max_num_batched_tokens,
        limit * spec.gpu_memory_utilization,
        None if on_gpu else spec.kv_cache_gib * 2**30,
        "GPU" if on_gpu else "CPU",
    ).kv_tokens


def device_rates() -> dict[str, float]:
    """Arithmetic and memory bandwidth of this process's device: TFLOP/s and GB/s, and shares of the data sheet's."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    tflops = 2 * size**3 / _seconds(lambda: matrix @ matrix, device) / 1e12
    source = torch.empty(2**28 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Every byte is read and written.
    bandwidth = 2 * source.numel() / _seconds(lambda: target.copy_(source), device) / 1e9
    found = {"TFLOP/s": tflops, "GB/s": bandwidth}
    name = torch.cuda.get_device_name() if on_gpu else ""
    # The longest name first: A100-80G before A100.
    for kind in sorted(ACCELERATORS, key=len, reverse=True):
        if kind in name:
            found["TFLOP/s, share of peak"] = tflops / ACCELERATORS[kind].tflops
            found["GB/s, share of peak"] = bandwidth / ACCELERATORS[kind].bandwidth_gb_s
            break
    return found


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Mean duration of `work`, after one call that is not counted."""
    work()
    _wait(device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < _MIN_S:
        for _ in range(4):
            work()
        _wait(device)
        calls += 4
    return (time.perf_counter() - began) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _requests(count: int, new_tokens: int) -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, VOCAB, size=(count, 16)).astype(np.int32)
    return [SampleRequest(index, index, prompts[index], 0.2, index + 1, new_tokens) for index in range(count)]
