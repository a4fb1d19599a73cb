"""Memory, bandwidth and arithmetic of accelerators by Ray's type names: data sheets, dense bfloat16 (else float16)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """A single GPU."""

    memory_gib: float
    tflops: float
    """Peak dense half-precision arithmetic, TFLOP/s."""
    bandwidth_gb_s: float
    """Memory bandwidth, GB/s."""


# Types with several memory sizes are listed with the smallest.
ACCELERATORS = {
    "V100": Accelerator(16, 125, 900),
    "T4": Accelerator(15, 65, 320),
    "A10G": Accelerator(22, 70, 600),
    "L4": Accelerator(22, 121, 300),
    "L40S": Accelerator(44, 362, 864),
    "A100": Accelerator(39, 312, 1555),
    "A100-40G": Accelerator(39, 312, 1555),
    "A100-80G": Accelerator(79, 312, 2039),
    "H100": Accelerator(79, 989, 3350),
    "H200": Accelerator(139, 989, 4800),
    "H20": Accelerator(95, 148, 4000),
    "B200": Accelerator(178, 2250, 8000),
}

NOMINAL_CORE = Accelerator(0.0, 0.05, 10.0)
"""A CPU core, of which nothing is known: parts of a run on cores of one kind are compared by it, and its rates never shown."""
