"""How the cost of a step grows with lengths, teachers, replicas and ranks: `python -m benchmarks.step_growth [SCALE]`.

One figure for each, as CPU time for what a step has of it, at the largest size over the smallest: 1 where nothing but the
work itself grows.

lengths    training a token of a sequence of so many tokens, at equal tokens a step: attention grows with the length
teachers   the driver's routing of a rollout among so many teachers, and an ensemble's combination for each of its answers
replicas   the driver's loop, buffer, batches and ledger for a rollout, as replicas and the batch with them are added
ranks      the driver's cutting of a batch into so many shards, and the share of positions that are padding then

SCALE (1.0) makes everything smaller, to see that it works. Writes benchmarks/results/.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from actors.student.trainer import Phase, StudentTrainer
from benchmarks import loop_scale, measured
from benchmarks.loop_scale import TOKENS, StubReplicas
from kdray.config import MiniLLMLoss, TinyModel, TrainingSettings, parse_config
from kdray.interfaces import Availability
from kdray.models.resolve import build_tiny_model
from kdray.rollouts.batching import rollouts_to_batch, shard
from kdray.rollouts.draw import draw_scored
from kdray.teachers.team import TeacherTeam
from kdray.types import Prompt, Rollout, SampleRequest, TrainBatch

LENGTHS = (64, 256, 1024, 4096)
STEP_TOKENS = 8192
TEACHERS = (1, 2, 4, 8)
REPLICAS = (4, 32, 128)
RANKS = (1, 8, 64)
VOCAB, TOP_K = 99, 16
REPEATS = 5


def rollout(number: int, prompt: int, length: int, teacher: str = "stub") -> Rollout:
    """A rollout of random tokens with the columns of a recorded one."""
    random = np.random.default_rng(number)
    column = np.full(length, -2.0, np.float32)
    ids = np.stack([random.permutation(VOCAB)[:TOP_K] for _ in range(min(length, 64))]).astype(np.int32)
    return Rollout(
        sample_id=number,
        prompt_id=number,
        prompt_ids=random.integers(3, VOCAB, prompt).astype(np.int32),
        token_ids=random.integers(3, VOCAB, length).astype(np.int32),
        mixture_logprobs=column,
        student_logprobs=column,
        student_versions=np.zeros(length, np.int32),
        alpha=0.2,
        finish_reason="length",
        teacher=teacher,
        teacher_logprobs=column,
        support_ids=np.resize(ids, (length, TOP_K)),
        support_logprobs=np.full((length, TOP_K), -4.0, np.float32),
        tail_logprobs=column,
    )


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of this process for a call, the least of several: what else the machine does only adds to it."""
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def lengths(scale: float) -> dict[str, float]:
    """Seconds of training a thousand tokens, by the length of their sequences."""
    found, tokens = {}, int(STEP_TOKENS * scale)
    with TemporaryDirectory() as folder:
        shape = TinyModel(type="tiny", layers=4, width=128, seed=1, max_positions=max(LENGTHS))
        model = build_tiny_model(shape, Path(folder) / "student")
        for length in (each for each in LENGTHS if each <= tokens):
            rows = tokens // length
            sizes = {"batch_size": rows, "micro_batch_size": rows, "sft": {"batch_size": rows}}
            values: dict[str, Any] = {**sizes, "backend": {"type": "torch"}}
            trainer = StudentTrainer(TrainingSettings.model_validate(values), VOCAB, 0)
            trainer.start_phase(Phase("distill", str(model), None, MiniLLMLoss(), 1e-4, 100))
            batch = rollouts_to_batch([rollout(number, 8, length - 8) for number in range(rows)], 1)

            def step(trainer: StudentTrainer = trainer, batch: TrainBatch = batch) -> None:
                trainer.train_step(batch)

            step()
            found[str(length)] = cpu_seconds(step) / tokens * 1000
            trainer.close()
    return found


class Teacher:
    """A teacher that answers at once with columns made before."""

    def __init__(self, name: str, answers: Sequence[Rollout]) -> None:
        self.name = name
        self.availability = Availability()
        self._answers = [replace(each, teacher=name) for each in answers]

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        yield [self._answers[request.sample_id] for request in requests]

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        scored = []
        for each in rollouts:
            answer = self._answers[each.sample_id]
            asked = np.empty((TOKENS, 0), np.int32) if each.support_ids is None else each.support_ids
            ids = np.concatenate([asked, answer.support_ids if top_k else asked[:, :0]], axis=1)
            logprobs = np.full(ids.shape, -4.0, np.float32)
            columns = {"teacher_logprobs": answer.teacher_logprobs, "tail_logprobs": answer.tail_logprobs}
            scored.append(replace(each, teacher=self.name, support_ids=ids, support_logprobs=logprobs, **columns))
        yield scored


def teachers(scale: float, way: str) -> dict[str, float]:
    """Milliseconds of the driver for a rollout: routed, or for each of its answers in an ensemble."""
    count = max(8, int(256 * scale))
    prompts = [Prompt(number, np.arange(8, dtype=np.int32), "text") for number in range(count)]
    found = {}
    for number in TEACHERS:
        # One teacher has no team.
        if number == 1:
            continue
        names = [f"t{index}" for index in range(number)]
        sharing = {"type": "ensemble"} if way == "ensemble" else {"type": "route", "weights": dict.fromkeys(names, 1.0)}
        tree = {
            "run": {"name": "growth"},
            "student": {"model": {"type": "tiny"}},
            "teachers": {name: {"model": {"type": "tiny"}} for name in names},
            "rollout": {"teachers": sharing},
            "loss": {"type": "forward_kl"},
        }
        answers = [rollout(index, 8, TOKENS) for index in range(count)]
        team = TeacherTeam(parse_config(tree), [Teacher(name, answers) for name in names], prompts, VOCAB)
        requests = [SampleRequest(index, index, prompts[index].token_ids, 0.2, index, TOKENS) for index in range(count)]

        async def read(team: TeacherTeam = team, requests: list[SampleRequest] = requests) -> None:
            async for _ in draw_scored(team, team if way == "ensemble" else None, requests):
                pass

        spent = cpu_seconds(lambda read=read: asyncio.run(read()))  # type: ignore[misc]
        found[str(number)] = 1000 * spent / count / (number if way == "ensemble" else 1)
    return found


def replicas(scale: float) -> dict[str, float]:
    """Milliseconds of the driver for a rollout."""
    found = {}
    for number in REPLICAS:
        with TemporaryDirectory() as folder:
            figures = asyncio.run(loop_scale.rate(max(2, int(number * scale)), Path(folder)))
        found[str(number)] = figures["cpu_ms_per_rollout"]
    return found


def ranks(scale: float) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of the driver for a row of a batch that is cut into shards, and the share of positions that are padding."""
    count = max(128, int(4096 * scale))
    stub = StubReplicas(1)
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        request = SampleRequest(number, number, np.arange(random.integers(4, 64), dtype=np.int32), 0.2, number, TOKENS)
        rows.append(stub._rollout(request))
    batch = rollouts_to_batch(rows, 1)
    spent, padding = {}, {}
    for number in RANKS:
        spent[str(number)] = 1e6 * cpu_seconds(lambda n=number: [shard(batch, rank, n) for rank in range(n)]) / count  # type: ignore[misc]
        shards = [shard(batch, rank, number) for rank in range(number)]
        padding[str(number)] = 1.0 - sum(int(each.lengths.sum()) for each in shards) / sum(
            each.token_ids.size for each in shards
        )
    return spent, padding


def growth(figures: dict[str, float]) -> float:
    """The largest size's figure over the smallest's."""
    values = list(figures.values())
    return values[-1] / values[0]


def main() -> None:
    scale = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    cut, padding = ranks(scale)
    found = {
        "lengths": {"unit": "CPU s for 1,000 trained tokens", "by_size": lengths(scale)},
        "teachers routed": {"unit": "CPU ms of the driver for a rollout", "by_size": teachers(scale, "route")},
        "teachers in an ensemble": {"unit": "CPU ms of the driver for an answer", "by_size": teachers(scale, "ensemble")},
        "replicas": {"unit": "CPU ms of the driver for a rollout", "by_size": replicas(scale)},
        "ranks": {"unit": "CPU us of the driver for a row", "by_size": cut, "padding": padding},
    }
    for name, each in found.items():
        each["growth"] = growth(each["by_size"])  # type: ignore[arg-type]
        sizes = ", ".join(f"{size}: {value:.3g}" for size, value in each["by_size"].items())  # type: ignore[union-attr]
        print(f"{name} ({each['unit']}): {sizes}; largest over smallest {each['growth']:.2f}")
    measured.write("step_growth", ("torch", "numpy"), {"scale": scale, "growth": found})


if __name__ == "__main__":
    main()
