"""A whole run without Ray: the true loop, ledger, reporter, run folder and resume, over models small enough to be exact.

Teacher and student are tables of next-token logits by last token, in float64 and numpy alone; a training step follows the exact
gradient of the reverse KL at the sampled positions. A driver process that runs `main` may be killed at any moment and started
again, as `kdray run --resume` is.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from kdray.config import Config, load_config, parse_config
from kdray.data.dataset import Dataset, PromptStream, load_dataset
from kdray.loop import Distillation, Hooks
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.batching import shard
from kdray.rollouts.draw import LoopSettings
from kdray.rollouts.environments import in_environment
from kdray.rollouts.filters import Filters
from kdray.rollouts.schedules import Schedules
from kdray.rollouts.seeds import uniforms
from kdray.rollouts.training_digest import ShardRecord
from kdray.runs.checkpoints import (
    COMMITTED,
    FOLDER,
    begin,
    commit,
    folder_of,
    newest_checkpoint,
    prune_checkpoints,
    within,
)
from kdray.runs.folder import RunFolder
from kdray.runs.lease import STALE_AFTER_S, Lease, leased
from kdray.runs.ledger import Ledger
from kdray.runs.reporter import RunReporter
from kdray.runs.resume import final_counts, restore_run_state
from kdray.runs.storage import Storage
from kdray.runs.tracking.trackers import Trackers
from kdray.types import Rollout, SampleRequest, StepReport, TrainBatch, TrainedShard

EOS = 1
"""Of the task tokenizer."""
RATE = 2.0
"""Learning rate."""


def stub_config(output: Path, name: str = "stub", **sections: Any) -> Config:
    """A run of 40 steps on generated prompts, two samples each, some of which a filter leaves out."""
    tree: dict[str, Any] = {
        "run": {"name": name, "output": str(output), "seed": 5},
        "data": {"prompts": {"type": "task", "size": 48}, "heldout_size": 4},
        "student": {"model": {"type": "tiny"}},
        "teachers": {"toy": {"model": {"type": "tiny", "layers": 4}}},
        "rollout": {
            "alpha": 0.3,
            "max_new_tokens": 6,
            "samples_per_prompt": 2,
            "max_staleness": 0,
            "filters": {"distinct": True},
        },
        "training": {
            "steps": 40,
            "batch_size": 8,
            "checkpoint_every": 3,
            "keep_checkpoints": 2,
            "micro_batch_size": 8,
            "sft": {"steps": 0},
        },
    }
    return parse_config(tree | {key: tree.get(key, {}) | value for key, value in sections.items()})


class Tables:
    """The teacher, and the student's weights by version: logits [vocab, vocab] by last token."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        rng = np.random.default_rng(seed)
        # So that a response ends after a few tokens, and some are cut.
        ends = 4.0 * (np.arange(vocab_size) == EOS)
        self.teacher: Any = log_softmax(rng.normal(size=(vocab_size, vocab_size)) + ends)
        self.average: np.ndarray | None = None
        """The student's average, if that is the teacher."""
        self.student = rng.normal(size=(vocab_size, vocab_size)) + ends
        self.published: dict[int, np.ndarray] = {}

    def draw(self, request: SampleRequest, version: int) -> Rollout:
        """The request's rollout under one published version, with the teacher's columns."""
        logits, last = self.published[version], int(request.prompt_ids[-1])
        tokens: list[int] = []
        rows = []
        ends = {EOS, *request.stop_ids}
        while len(tokens) < request.max_new_tokens and (not tokens or last not in ends):
            log_p, log_q = self.teacher[last], log_softmax(logits[last])
            mixture = request.alpha * np.exp(log_p) + (1.0 - request.alpha) * np.exp(log_q)
            u = uniforms(np.array([request.seed], dtype=np.uint64), np.array([len(tokens)]))[0]
            cdf = np.cumsum(mixture)
            last = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
            tokens.append(last)
            kls = np.exp(log_q) @ (log_q - log_p), np.exp(log_p) @ (log_p - log_q)
            rows.append((np.log(mixture[last]), log_q[last], log_p[last], *kls))
        columns = np.array(rows, dtype=np.float32).T
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=np.array(tokens, dtype=np.int32),
            mixture_logprobs=columns[0],
            student_logprobs=columns[1],
            student_versions=np.full(len(tokens), version, dtype=np.int32),
            alpha=request.alpha,
            finish_reason=request.finish_reason(tokens, (EOS,)),
            teacher="toy",
            teacher_logprobs=columns[2],
            reverse_kl=columns[3],
            forward_kl=columns[4],
        )

    def gradient(self, shard: TrainBatch) -> tuple[np.ndarray, float]:
        """Gradient of the summed reverse KL at a shard's targets, and that sum."""
        rows, places = np.nonzero(shard.loss_mask)
        gradient, loss = np.zeros_like(self.student), 0.0
        for last in shard.token_ids[rows, places - 1]:
            log_q = log_softmax(self.student[last])
            difference = log_q - self.teacher[last]
            divergence = float(np.exp(log_q) @ difference)
            gradient[last] += np.exp(log_q) * (difference - divergence)
            loss += divergence
        return gradient, loss


class StubRank:
    """A rank: its share of a step's gradient, its count of the updates, its own record of both."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.updates = 0

    def backward(self, shard: TrainBatch) -> tuple[np.ndarray, float]:
        """Gradient and loss of a shard, as sums."""
        self._record.add(shard)
        return self._tables.gradient(shard)

    def begin(self) -> None:
        self._record = ShardRecord()

    def apply(self) -> None:
        """Step the optimizer."""
        self.updates += 1
        self._record.applied()

    def told(self) -> TrainedShard:
        return self._record.shard(self.updates)


class StubSampler:
    """Draws by the version that is published when a request's turn comes; answers come in any order."""

    def __init__(self, tables: Tables, delay_s: Callable[[SampleRequest], float]) -> None:
        self._tables = tables
        self._delay_s = delay_s

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        waiting = [asyncio.create_task(self._one(request)) for request in requests]
        try:
            for ended in asyncio.as_completed(waiting):
                yield [await ended]
        finally:
            for task in waiting:
                task.cancel()

    async def _one(self, request: SampleRequest) -> Rollout:
        await asyncio.sleep(self._delay_s(request))
        return self._tables.draw(request, max(self._tables.published))


class StubStudent:
    """The group of two ranks: a table, its optimizer, and checkpoints as files."""

    def __init__(
        self,
        tables: Tables,
        folder: RunFolder,
        config: Config,
        pause: Callable[[], None],
        lease: Lease | None = None,
    ) -> None:
        """Args: pause: called between the parts of a save, where a kill would hurt; lease: looked at before it commits or
        deletes."""
        self._guard: Callable[[], None] = (lambda: None) if lease is None else lease.check_everywhere
        self._ticket = None if lease is None else lease.ticket
        self._mine = folder_of(None if lease is None else lease.owner)
        self._loaded = ""
        self._tables = tables
        self._folder = folder
        self._config = config
        self._pause = pause
        self.live: dict[str, Callable[[], Any]] = {}
        self.ranks = [StubRank(tables) for _ in range(2)]

    async def train_step(
        self, batch: TrainBatch, text: TrainBatch | None = None, scheduled: Mapping[str, float] | None = None
    ) -> StepReport:
        for rank in self.ranks:
            rank.begin()
        shards = [shard(batch, number, len(self.ranks)) for number in range(len(self.ranks))]
        loss = self.update(shards, batch.num_target_tokens)
        told = tuple(rank.told() for rank in self.ranks)
        targets = sum(each.num_target_tokens for each in told)
        return StepReport(batch.step, loss, targets, grad_norm=1.0, learning_rate=RATE, seconds=0.0, shards=told)

    def update(self, shards: Sequence[TrainBatch], targets: int) -> float:
        """One step of gradient descent on the mean reverse KL at the batch's targets; returns that mean before it."""
        gradients, losses = zip(*(rank.backward(given) for rank, given in zip(self.ranks, shards, strict=True)), strict=True)
        self._tables.student = self._tables.student - RATE * sum(gradients) / max(1, targets)
        for rank in self.ranks:
            rank.apply()
        return sum(losses) / max(1, targets)

    async def publish(self, version: int) -> None:
        oldest = version - self._config.rollout.max_staleness
        self._tables.published = {at: kept for at, kept in self._tables.published.items() if at >= oldest}
        self._tables.published[version] = self._tables.student

    async def save_checkpoint(self, step: int, name: str | None = None) -> None:
        await self._opened(step, name).commit()

    async def open_checkpoint(self, step: int) -> StubCheckpoint:
        return self._opened(step, None)

    def _opened(self, step: int, name: str | None) -> StubCheckpoint:
        storage, key = Storage.local(self._folder.path), f"checkpoints/{name or f'step-{step:06d}'}"
        wanted = begin(storage, key, self._mine, known=key == self._loaded)
        weights = io.BytesIO()
        np.save(weights, self._tables.student)
        counters = json.dumps([rank.updates for rank in self.ranks]).encode()
        files = {"student.npy": weights.getvalue(), "updates.json": counters}
        if self._tables.average is not None:
            average = io.BytesIO()
            np.save(average, self._tables.average)
            files["average.npy"] = average.getvalue()
        return StubCheckpoint(self, key if wanted else None, files, {"step": step} | {n: get() for n, get in self.live.items()})

    async def store(self, key: str | None, files: Mapping[str, bytes], progress: Mapping[str, Any]) -> None:
        """Write a checkpoint's files and its marker, with a turn for the steps beside it after each. Args: key: None if it is
        there already."""
        storage = Storage.local(self._folder.path)
        if key is not None:
            digests = {}
            for name, content in files.items():
                digests[name] = storage.write(f"{within(key, self._mine)}/{name}", content)
                self._pause()
                await asyncio.sleep(0.0)
            commit(storage, key, progress, [digests], self._mine, self._guard)
            self._pause()
        prune_checkpoints(storage, self._config.training.keep_checkpoints, self._guard)

    def restore(self, checkpoint: Path) -> None:
        files = files_of(checkpoint)
        self._loaded = f"checkpoints/{checkpoint.name}"
        self._tables.student = np.load(files / "student.npy")
        if (files / "average.npy").exists():
            self._tables.average = np.load(files / "average.npy")
        for rank, updates in zip(self.ranks, json.loads((files / "updates.json").read_bytes()), strict=True):
            rank.updates = updates


class StubCheckpoint:
    """An open checkpoint; its files are written beside the next steps, from what the student was when it was opened."""

    def __init__(self, student: StubStudent, key: str | None, files: dict[str, bytes], progress: dict[str, Any]) -> None:
        self._student = student
        self._written = key, files, progress

    async def keep_files(self) -> None:
        await asyncio.sleep(0.0)

    async def commit(self) -> None:
        await self._student.store(*self._written)


def files_of(checkpoint: Path) -> Path:
    """Folder with a checkpoint's files, as its marker names it."""
    return checkpoint / str(json.loads((checkpoint / COMMITTED).read_bytes()).get(FOLDER, ""))


def main(config_path: Path, slow: bool = True, stale_after_s: float = STALE_AFTER_S) -> None:
    """Start the run that a config describes, or go on with it, as `cluster.launch.run` and `cluster.runner.Runner` do."""
    asyncio.run(drive(load_config(config_path), slow=slow, stale_after_s=stale_after_s))


async def drive(
    config: Config,
    slow: bool = False,
    dataset: Dataset | None = None,
    student_type: type[StubStudent] = StubStudent,
    stale_after_s: float = STALE_AFTER_S,
) -> dict[str, Any]:
    """The run. Args: slow: sleep where a kill would hurt, and let answers come in another order each time."""
    with leased(config, None, stale_after_s) as lease:
        return await _drive(config, slow, dataset, student_type, lease)


async def _drive(
    config: Config, slow: bool, dataset: Dataset | None, student_type: type[StubStudent], lease: Lease
) -> dict[str, Any]:
    tokenizer = task_tokenizer()
    resume = (config.run_folder / "config.yaml").is_file()
    found, _ = newest_checkpoint([Storage.local(config.run_folder)]) if resume else (None, [])
    folder = RunFolder.create(config, resume, found.step if found else 0, lease.check)
    trackers = Trackers(config, folder.path)
    reporter = RunReporter(
        folder, config.training.steps, Console(file=io.StringIO()), decode=tokenizer.decode, trackers=trackers
    )
    reporter.event("start", resumed_step=found.step if found else None)
    dataset = dataset or load_dataset(config, tokenizer)
    ledger, schedules = Ledger(folder.path / "ledger.jsonl", lease.check), Schedules.of(config)
    start_step, totals = restore_run_state(folder, ledger, schedules, config.training.steps, found.progress if found else None)
    tables = Tables(config.run.seed, len(tokenizer))
    haste = np.random.default_rng(time.time_ns())
    pause = (lambda: time.sleep(haste.uniform(0, 0.003))) if slow else (lambda: None)
    student = student_type(tables, folder, config, pause, lease)
    student.live = {"totals": lambda: asdict(totals), "schedules": schedules.state}
    if found:
        student.restore(config.run_folder / found.key)
    await student.publish(start_step)
    if found is None:
        await student.save_checkpoint(0)
    reporter.phase("distill", config.training.steps)
    assert config.rollout.filters is not None
    trained = {prompt.prompt_id: prompt for prompt in dataset.train}
    await Distillation(
        settings=LoopSettings.of(config),
        prompts=PromptStream(dataset.train, config.run.seed),
        sampler=in_environment(
            StubSampler(tables, (lambda request: haste.uniform(0, 0.004)) if slow else (lambda request: 0.0)),
            config.rollout.environment,
            tokenizer,
            len(tokenizer),
            dataset.train,
        ),
        scorer=None,
        student=student,
        reporter=reporter,
        ledger=ledger,
        totals=totals,
        schedules=schedules,
        hooks=Hooks(filters=Filters(config.rollout.filters, tokenizer.decode, dataset.grade, trained)),
        start_step=start_step,
    ).run()
    summary = final_counts(ledger, totals, config) | {
        "resumed_from_step": found.step if found else None,
        "dropped_prompts": dataset.dropped,
    }
    folder.write_summary(summary)
    reporter.finish(summary)
    reporter.event("finished", steps=config.training.steps)
    reporter.close()
    return summary


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(Path(sys.argv[1]))
