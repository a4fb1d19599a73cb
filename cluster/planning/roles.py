"""A role of the run as planned, and the GPUs that it may be placed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planning.accelerators import ACCELERATORS, NOMINAL_CORE, Accelerator
from cluster.planning.memory import GIB, EngineMemory, RankMemory
from cluster.planning.placement import ACCELERATOR_LABEL, Bundle, Node

GPU_MEMORY = "memory of a GPU, GiB"
"""Stored among a described node's resources; Ray has no resource of this name."""


@dataclass(frozen=True)
class Role:
    """A role of the run, as planned."""

    bundle: Bundle
    nodes: dict[str, int]
    """Description of a node kind -> bundles there."""
    memory: EngineMemory | RankMemory
    memory_limit: float | None
    """Memory of a GPU, bytes; None if unknown (or the role runs on CPUs)."""
    rate: float | None
    """Response tokens per second of the whole role; None if its hardware is unknown. On CPUs, of nominal cores: only ratios
    between such roles mean anything."""
    does: str

    @property
    def on_cpus(self) -> bool:
        return not self.bundle.resources.get("GPU")

    @property
    def memory_bytes(self) -> float:
        """Memory of each bundle."""
        return self.memory.total if isinstance(self.memory, RankMemory) else self.memory.needed + self.memory.kv_room


def cores(bundle: Bundle) -> Accelerator:
    """The cores of one bundle on CPUs, as nominal hardware."""
    count = bundle.resources.get("CPU", 0.0) or 1.0
    return Accelerator(0.0, count * NOMINAL_CORE.tflops, count * NOMINAL_CORE.bandwidth_gb_s)


def weakest_gpu(hosts: Sequence[Node]) -> tuple[Accelerator | None, float | None]:
    """The slowest GPU among these nodes and the smallest memory of one, in bytes; None if a type is unknown."""
    gpus = [ACCELERATORS.get(node.labels.get(ACCELERATOR_LABEL, "")) for node in hosts]
    known = [gpu for gpu in gpus if gpu is not None]
    slowest = min(known, key=lambda gpu: gpu.tflops) if known and len(known) == len(gpus) else None
    memories = [
        node.resources.get(GPU_MEMORY) or (None if gpu is None else gpu.memory_gib)
        for node, gpu in zip(hosts, gpus, strict=True)
    ]
    given = [memory for memory in memories if memory is not None]
    return slowest, min(given) * GIB if given and len(given) == len(memories) else None
