"""When samples are asked for, and what waiting for that costs: `python -m benchmarks.admission`.

The true loop, buffer, batching and ledger over a stub engine in virtual time, the same on every machine. The engine decodes a
token of every sequence that it runs per step, which takes `step_s` and `sequence_s` for each of them: a GPU's steps take
nearly the same time however many there are, a CPU's grow with them. It runs `slots` sequences, the others wait in the order
in which they were asked for, as with vLLM's `max_num_seqs`. Lengths are equal, or lognormal, so that a step's last answer
comes long after most of them.

Measured: the time from the publication that makes a sample admissible to the moment in which the engine has it, which no
other order of admission can make shorter; tokens a second; how unequal the times of steps are; and how much of it slots for
one batch or two change. Writes benchmarks/results/.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import measured, virtual_time
from benchmarks.loop_scale import Quiet, StubReplicas, stub_settings
from kdray.data.dataset import PromptStream
from kdray.loop import Distillation
from kdray.runs.ledger import Ledger
from kdray.types import Prompt, Rollout, SampleRequest, StepReport, TrainBatch

BATCH, STEPS = 32, 40
TRAIN_S = 1.0
"""Seconds of a training step: drawing a batch takes longer."""
SIGMA = 0.8
"""Of the lengths' logarithms."""
SETTINGS = stub_settings(STEPS, BATCH)


@dataclass(frozen=True)
class Engine:
    """Times of a decode step."""

    name: str
    step_s: float
    """Seconds of a step, however many sequences it has."""
    sequence_s: float
    """Seconds for each sequence on top."""

    def seconds(self, running: int) -> float:
        return self.step_s + self.sequence_s * running


ENGINES = (Engine("GPU: steps of one length", 0.032, 0.0), Engine("CPU: steps grow with the batch", 0.004, 0.001))


@dataclass
class Replicas(StubReplicas):
    """One such engine."""

    engine: Engine
    slots: int
    sigma: float
    clock: asyncio.AbstractEventLoop
    lags: list[float] = field(default_factory=list)
    """Seconds from the moment in which a sample was admissible to the one in which it was asked for."""
    admissible_at: dict[int, float] = field(default_factory=lambda: {0: 0.0})
    """When each version was published."""
    idle_s: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        super().__init__(1)
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._came = asyncio.Event()

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        # Tasks begin in their order; of bare coroutines asyncio makes a set first, whose order differs from run to run.
        for next_one in asyncio.as_completed([asyncio.ensure_future(self._draw(request)) for request in requests]):
            yield [await next_one]

    async def _draw(self, request: SampleRequest) -> Rollout:
        self.lags.append(self.clock.time() - self.admissible_at[request.min_version])
        length = int(np.clip(np.random.default_rng(request.sample_id).lognormal(3.5, self.sigma), 1, 512))
        ended = self.clock.create_future()
        self._waiting.append((length, ended))
        self._came.set()
        await ended
        self.tokens += length
        return self._rollout(request)

    async def decode(self) -> None:
        """Decode for ever."""
        running: list[tuple[int, asyncio.Future[None]]] = []
        while True:
            while self._waiting and len(running) < self.slots:
                running.append(self._waiting.pop(0))
            if not running:
                self._came.clear()
                started = self.clock.time()
                await self._came.wait()
                self.idle_s += self.clock.time() - started
                continue
            await asyncio.sleep(self.engine.seconds(len(running)))
            left = [(length - 1, ended) for length, ended in running]
            for length, ended in left:
                if not length:
                    ended.set_result(None)
            running = [each for each in left if each[0]]


@dataclass
class Ranks:
    """Train a batch in a given time; note when steps end."""

    replicas: Replicas
    ended: list[float] = field(default_factory=list)

    async def train_step(self, batch: TrainBatch, text: Any = None, scheduled: Mapping[str, float] | None = None) -> StepReport:
        await asyncio.sleep(TRAIN_S)
        self.ended.append(self.replicas.clock.time())
        targets = batch.num_target_tokens
        return StepReport(step=batch.step, loss=0.0, num_target_tokens=targets, grad_norm=0.0, learning_rate=0.0, seconds=0.0)

    async def publish(self, version: int) -> None:
        self.replicas.admissible_at[version] = self.replicas.clock.time()

    async def save_checkpoint(self, step: int) -> None: ...


async def measure(engine: Engine, slots: int, max_staleness: int, folder: Path, sigma: float = SIGMA) -> dict[str, float]:
    """Figures of a run, over its steps from the sixth on."""
    replicas = Replicas(engine, slots, sigma, asyncio.get_running_loop())
    ranks = Ranks(replicas)
    decoding = asyncio.create_task(replicas.decode())
    prompts = PromptStream([Prompt(index, np.arange(32, dtype=np.int32)) for index in range(1000)], 0)
    await Distillation(
        replace(SETTINGS, max_staleness=max_staleness),
        prompts,
        replicas,
        None,
        ranks,  # type: ignore[arg-type]
        Quiet(),  # type: ignore[arg-type]
        Ledger(folder / "ledger.jsonl"),
    ).run()
    decoding.cancel()
    with suppress(asyncio.CancelledError):
        await decoding
    times = np.diff(ranks.ended[4:])
    return {
        "tokens_per_s": replicas.tokens / ranks.ended[-1],
        "longest_lag_s": max(replicas.lags),
        "idle": replicas.idle_s / ranks.ended[-1],
        "step_s": float(times.mean()),
        "spread_of_steps": float(times.std() / times.mean()),
    }


def main() -> None:
    results = []
    for engine, sigma, max_staleness, slots in product(ENGINES, (0.0, SIGMA), (0, 1, 2), (BATCH, 2 * BATCH)):
        with TemporaryDirectory() as folder:
            found = virtual_time.run(measure(engine, slots, max_staleness, Path(folder), sigma))
        case = {"engine": engine.name, "sigma": sigma, "max_staleness": max_staleness, "slots": slots}
        results.append(case | found)
        print(*case.values(), *(f"{name}={value:.3f}" for name, value in found.items()))
    measured.write("admission", [], {"batch": BATCH, "steps": STEPS, "results": results})


if __name__ == "__main__":
    main()
