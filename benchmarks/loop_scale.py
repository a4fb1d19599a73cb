"""What the loop itself costs as replicas are added: `python -m benchmarks.loop_scale [REPLICAS ...]`.

The true loop, buffer, batching, metrics and ledger over stub engines: a replica holds 32 sequences of 64 tokens, each of which
takes two seconds, as a large teacher on a GPU would. Sequences of other replicas change nothing for it, so that its rate may
fall by the loop's own work alone. The batch grows with the replicas, as one would have it grow. Writes benchmarks/results/.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kdray.data.dataset import PromptStream
from kdray.loop import Distillation
from kdray.rollouts.draw import LoopSettings
from kdray.runs.ledger import Ledger
from kdray.types import Prompt, Rollout, SampleRequest, StepReport, TrainBatch

SLOTS, TOKENS, TOP_K, SECONDS = 32, 64, 32, 2.0
STEPS = 6
SPREAD = 0.25
"""Share by which the sequences' times differ, either way."""


class StubReplicas:
    """Replicas that take whoever comes next into a free slot; finished sequences are handed out ten times a second."""

    def __init__(self, replicas: int) -> None:
        self._free_at = [0.0] * (replicas * SLOTS)
        """When each slot is free again, a heap."""
        self._random = np.random.default_rng(0)
        ones = np.full(TOKENS, -1.0, np.float32)
        self._columns: dict[str, Any] = {
            "token_ids": np.arange(TOKENS, dtype=np.int32),
            "mixture_logprobs": ones,
            "student_logprobs": ones,
            "finish_reason": "stop",
            "teacher": "stub",
            "teacher_logprobs": ones,
            "support_ids": np.tile(np.arange(TOP_K, dtype=np.int32), (TOKENS, 1)),
            "support_logprobs": np.full((TOKENS, TOP_K), -4.0, np.float32),
            "tail_logprobs": ones,
        }

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        now = time.perf_counter()
        seconds = SECONDS * (1 + self._random.uniform(-SPREAD, SPREAD, len(requests)))
        ends = []
        for request, takes in zip(requests, seconds, strict=True):
            end = max(now, self._free_at[0]) + float(takes)
            heapq.heapreplace(self._free_at, end)
            ends.append((end, request))
        ends.sort(key=lambda item: item[0], reverse=True)
        while ends:
            await asyncio.sleep(0.1)
            now = time.perf_counter()
            finished = []
            while ends and ends[-1][0] <= now:
                finished.append(self._rollout(ends.pop()[1]))
            if finished:
                yield finished

    def _rollout(self, request: SampleRequest) -> Rollout:
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            student_versions=np.full(TOKENS, request.min_version, np.int32),
            alpha=request.alpha,
            **self._columns,
        )


class StubStudent:
    """Trains a batch in a tenth of a second."""

    async def train_step(self, batch: TrainBatch, text: Any = None, scheduled: Mapping[str, float] | None = None) -> StepReport:
        await asyncio.sleep(0.1)
        return StepReport(
            step=batch.step, loss=0.0, num_target_tokens=batch.num_target_tokens, grad_norm=0.0, learning_rate=0.0, seconds=0.1
        )

    async def publish(self, version: int) -> None: ...

    async def save_checkpoint(self, step: int) -> None: ...


class Quiet:
    def step(self, *given: Any) -> None: ...

    def samples(self, *given: Any) -> None: ...

    def event(self, *given: Any, **fields: Any) -> None: ...


def stub_settings(steps: int, batch_size: int, max_new_tokens: int = 64, max_staleness: int = 0) -> LoopSettings:
    """Settings of a loop over stubs, without checkpoints and evaluations."""
    return LoopSettings(
        seed=0,
        steps=steps,
        batch_size=batch_size,
        alpha=0.2,
        max_new_tokens=max_new_tokens,
        samples_per_prompt=1,
        max_staleness=max_staleness,
        checkpoint_every=0,
        evaluate_every=0,
    )


async def rate(replicas: int, folder: Path) -> dict[str, float]:
    """Rollouts a second of one replica, beside the rate that its slots allow."""
    batch = replicas * SLOTS
    settings = stub_settings(STEPS, batch, TOKENS, max_staleness=1)
    prompts = PromptStream([Prompt(index, np.arange(32, dtype=np.int32)) for index in range(1000)], 0)
    started, used = time.perf_counter(), time.process_time()
    await Distillation(
        settings,
        prompts,
        StubReplicas(replicas),
        None,
        StubStudent(),  # type: ignore[arg-type]
        Quiet(),  # type: ignore[arg-type]
        Ledger(folder / f"{replicas}.jsonl"),
    ).run()
    seconds = time.perf_counter() - started
    done = batch * STEPS
    return {
        "replicas": replicas,
        "rollouts_per_s": done / seconds,
        "rollouts_per_s_and_replica": done / seconds / replicas,
        "cpu_ms_per_rollout": 1000 * (time.process_time() - used) / done,
    }


def main() -> None:
    sizes = [int(each) for each in sys.argv[1:]] or [4, 64, 256]
    found = []
    with TemporaryDirectory() as folder:
        for replicas in sizes:
            found.append(asyncio.run(rate(replicas, Path(folder))))
            first = found[0]["rollouts_per_s_and_replica"]
            found[-1]["share_of_first"] = found[-1]["rollouts_per_s_and_replica"] / first
            print({key: round(value, 3) for key, value in found[-1].items()}, flush=True)
    target = Path("benchmarks/results/loop_scale.json")
    target.write_text(json.dumps({"date": datetime.now(UTC).date().isoformat(), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
