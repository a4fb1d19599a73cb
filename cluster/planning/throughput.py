"""Throughput of each role, tokens per second: modelled from arithmetic and memory bandwidth, or measured in an earlier run.

The model is a roofline: a decode step reads all weights and the running sequences' KV cache once, and takes 2 FLOP per
parameter and token; training takes 6 (8 with recomputation). Both reach a fraction of the peak, as well-tuned systems do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from cluster.planning.accelerators import Accelerator
from cluster.planning.memory import Lengths, ModelShape
from kdray.runs.lines.streams import raw_lines, stream

DECODE_EFFICIENCY = 0.6
"""Assumed fraction of peak bandwidth or arithmetic in decoding and prefill."""
TRAINING_EFFICIENCY = 0.35
"""Assumed model FLOP utilisation of training."""


def sampling_rate(
    models: Sequence[ModelShape], gpu: Accelerator, gpus: int, sequences: int, lengths: Lengths, element: int
) -> float:
    """Response tokens per second of a replica that evaluates all `models` at every token, with `sequences` running."""
    flops = gpus * gpu.tflops * 1e12 * DECODE_EFFICIENCY
    bandwidth = gpus * gpu.bandwidth_gb_s * 1e9 * DECODE_EFFICIENCY
    step_s = 0.0
    for model in models:
        held = sequences * (lengths.prompt + lengths.response / 2) * gpus * model.kv_bytes(element, gpus)
        step_s += max((model.parameters * element + held) / bandwidth, 2 * model.parameters * sequences / flops)
        # Every response token includes its share of the prompt's prefill.
        step_s += 2 * model.parameters * sequences * lengths.prompt / lengths.response / flops
    return sequences / step_s


def scoring_rate(models: Sequence[ModelShape], gpu: Accelerator, gpus: int, lengths: Lengths) -> float:
    """Response tokens per second that a replica scores by prefill."""
    flops = gpus * gpu.tflops * 1e12 * DECODE_EFFICIENCY
    parameters = sum(model.parameters for model in models)
    return flops / (2 * parameters * (lengths.prompt + lengths.response) / lengths.response)


def training_rate(model: ModelShape, gpu: Accelerator, ranks: int, lengths: Lengths, gradient_checkpointing: bool) -> float:
    """Response tokens per second that the ranks train on together."""
    flops = ranks * gpu.tflops * 1e12 * TRAINING_EFFICIENCY
    each = (8 if gradient_checkpointing else 6) * model.parameters
    return flops / (each * (lengths.prompt + lengths.response) / lengths.response)


@dataclass(frozen=True)
class Measured:
    """Rates measured by a run."""

    training: float
    """Response tokens per second of the ranks while training."""
    supply: float
    """Response tokens per second from the replicas; a lower bound if the ranks never waited."""
    waits: float
    """Share of the time that the trainer waited for samples or scores."""
    replicas: float


class RateLine(msgspec.Struct):
    """Line of metrics.jsonl, of which only the rates are of interest."""

    tokens_per_s: float | None
    response_tokens: float
    wait_rollout_s: float
    wait_teacher_s: float
    teacher_replicas: float


def measured(path: Path, batch_size: int) -> Measured:
    """Compute rates from a file of metrics, a line at a time, without the first quarter, in which engines warm up.

    Raises: ValueError if there are fewer than four steps; DataError naming the line that cannot be read.
    """
    steps = sum(1 for _ in raw_lines(path))
    if steps < 4:
        raise ValueError(f"{steps} steps are too few to measure; at least 4 are needed")
    tokens = seconds = waiting = replicas = 0.0
    lines = 0
    for line, _ in islice(stream(path, RateLine), steps // 4, None):
        if not line.tokens_per_s:
            continue
        lines += 1
        tokens += line.response_tokens * batch_size
        seconds += line.response_tokens * batch_size / line.tokens_per_s
        waiting += line.wait_rollout_s + line.wait_teacher_s
        replicas += line.teacher_replicas
    if not lines:
        raise ValueError("no step trained a token")
    return Measured(tokens / max(1e-9, seconds - waiting), tokens / seconds, waiting / seconds, replicas / lines)
