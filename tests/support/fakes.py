"""Stand-ins for the loop's collaborators: a next-token model small enough to enumerate, and fakes that check what they get.

Delays are counted in turns of the event loop, not in seconds, so that every interleaving is the same on every machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdray.data.dataset import PromptStream
from kdray.loop import Distillation, Hooks
from kdray.rollouts.draw import LoopSettings
from kdray.rollouts.mixture import draw, log_mixture
from kdray.rollouts.schedules import Schedules
from kdray.rollouts.seeds import uniforms
from kdray.runs.ledger import Ledger, Totals
from kdray.types import Prompt, Rollout, SampleRequest, StepReport, TrainBatch

VOCAB = 5
EOS = 4

Turns = Callable[[SampleRequest], int]


class BigramWorld:
    """A teacher and the versions of a student over 5 tokens: the next token depends on the last one alone."""

    def __init__(self, seed: int = 0, learns: bool = True) -> None:
        """Args: learns: whether the student's distribution changes from version to version."""
        generator = torch.Generator().manual_seed(seed)
        self._teacher = torch.randn(VOCAB, VOCAB, generator=generator).log_softmax(-1)
        self._student = torch.randn(VOCAB, VOCAB, generator=generator)
        self._learns = learns

    def teacher(self, last: int) -> torch.Tensor:
        """log p after token `last`, [VOCAB]."""
        return self._teacher[last]

    def student(self, last: int, version: int) -> torch.Tensor:
        """log q of a version after token `last`, [VOCAB]: a step closer to the teacher a version."""
        share = 1 - 0.7**version if self._learns else 0.0
        return torch.lerp(self._student[last], self._teacher[last], share).log_softmax(-1)

    def draw(self, request: SampleRequest, version: int, scored: bool) -> Rollout:
        """The request's rollout under one student version; with the teacher's columns if `scored`."""
        last, tokens, rows = int(request.prompt_ids[-1]), [], []
        while len(tokens) < request.max_new_tokens and last != EOS:
            p, q = self.teacher(last), self.student(last, version)
            m = log_mixture(p, q, torch.tensor([request.alpha]))
            u = uniforms(np.array([request.seed], dtype=np.uint64), np.array([len(tokens)]))
            last = int(draw(m[None], torch.from_numpy(u)))
            tokens.append(last)
            rows.append((m[last], q[last], (q.exp() * (q - p)).sum(), (p.exp() * (p - q)).sum()))
        columns = np.array(rows, dtype=np.float32).reshape(-1, 4).T
        rollout = Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=np.array(tokens, dtype=np.int32),
            mixture_logprobs=columns[0],
            student_logprobs=columns[1],
            student_versions=np.full(len(tokens), version, dtype=np.int32),
            alpha=request.alpha,
            finish_reason="stop" if last == EOS else "length",
        )
        return replace(self.score(rollout), reverse_kl=columns[2], forward_kl=columns[3]) if scored else rollout

    def score(self, rollout: Rollout) -> Rollout:
        """The rollout with this teacher's logprobs."""
        before = [int(rollout.prompt_ids[-1]), *rollout.token_ids[:-1]]
        logprobs = [float(self.teacher(int(b))[int(t)]) for b, t in zip(before, rollout.token_ids, strict=False)]
        return replace(rollout, teacher="toy", teacher_logprobs=np.array(logprobs, dtype=np.float32))


@dataclass
class History:
    """What happened, in order, and what it implies about the loop."""

    events: list[tuple[str, int]] = field(default_factory=list)
    published: int = 0
    requested: dict[int, SampleRequest] = field(default_factory=dict)
    num_trained: int = 0
    most_outstanding: int = 0
    """Most samples that were asked for and not yet trained, at any time."""
    running: set[int] = field(default_factory=set)
    """Samples being drawn or scored now; empty once everything has ended or was cancelled."""

    def add(self, kind: str, number: int) -> None:
        self.events.append((kind, number))

    def at(self, kind: str, number: int) -> int:
        """Position of an event."""
        return self.events.index((kind, number))


async def turns(number: int) -> None:
    """Let everybody else run this many times."""
    for _ in range(number):
        await asyncio.sleep(0)


def oldest_allowed(request: SampleRequest, published: int) -> int:
    """The replica that lags as far behind as its request permits."""
    return request.min_version


def newest(request: SampleRequest, published: int) -> int:
    """The replica that always holds the published weights."""
    return published


@dataclass
class FakeSampler:
    """Draws every request by itself; yields in the order they end."""

    world: BigramWorld
    history: History
    delay: Turns = lambda request: 1
    version: Callable[[SampleRequest, int], int] = newest
    scored: bool = True
    failures: Mapping[int, Exception] = field(default_factory=dict)
    """Sample id -> what is raised instead of its rollout."""

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        for request in requests:
            assert request.sample_id not in self.history.requested, f"sample {request.sample_id} asked for twice"
            assert request.min_version <= self.history.published, "asked for before its version was published"
            self.history.requested[request.sample_id] = request
            self.history.add("draw", request.sample_id)
        outstanding = len(self.history.requested) - self.history.num_trained
        self.history.most_outstanding = max(self.history.most_outstanding, outstanding)
        tasks = {asyncio.create_task(self._one(request)) for request in requests}
        try:
            while tasks:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                yield [task.result() for task in done]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, request: SampleRequest) -> Rollout:
        self.history.running.add(request.sample_id)
        try:
            version = self.version(request, self.history.published)
            assert request.min_version <= version <= self.history.published
            await turns(self.delay(request))
            if request.sample_id in self.failures:
                raise self.failures[request.sample_id]
            self.history.add("drawn", request.sample_id)
            return self.world.draw(request, version, self.scored)
        finally:
            self.history.running.remove(request.sample_id)


@dataclass
class FakeScorer:
    """Scores by prefill, one rollout after the other."""

    world: BigramWorld
    history: History
    name: str = "toy"
    delay: Callable[[Rollout], int] = lambda rollout: 1
    seconds: float = 0.0
    failures: Mapping[int, Exception] = field(default_factory=dict)
    silent: bool = False
    """Whether it ends without an answer."""

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        for rollout in rollouts:
            assert rollout.teacher_logprobs is None, f"sample {rollout.sample_id} was scored already"
            self.history.running.add(rollout.sample_id)
            try:
                await turns(self.delay(rollout))
                await asyncio.sleep(self.seconds)
                if rollout.sample_id in self.failures:
                    raise self.failures[rollout.sample_id]
            finally:
                self.history.running.remove(rollout.sample_id)
            if not self.silent:
                yield [self.world.score(rollout)]


@dataclass
class FakeStudent:
    """A group of ranks that checks every batch: its step, its sample ids, its shapes, its counts."""

    history: History
    batch_size: int
    steps_done: int = 0
    turns_per_step: int = 3
    failures: Mapping[int, Exception] = field(default_factory=dict)
    """Step (from 1) -> what its train_step raises."""
    trained: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """(sample id, step from 0, prompt ids, response ids), in the order of training."""
    batches: list[TrainBatch] = field(default_factory=list)
    texts: list[TrainBatch | None] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    told: Callable[[], Collection[int]] = tuple
    """Returns the steps whose lines are written."""
    turns_per_file: int = 1
    turns_per_commit: int = 1
    lost_commits: Mapping[int, Exception] = field(default_factory=dict)
    """Step -> what the commit of its open checkpoint raises."""

    async def train_step(
        self, batch: TrainBatch, text: TrainBatch | None = None, scheduled: Mapping[str, float] | None = None
    ) -> StepReport:
        step = self.steps_done
        self.history.add("train", step)
        self._check(batch, step)
        await turns(self.turns_per_step)
        if batch.step in self.failures:
            raise self.failures[batch.step]
        self.batches.append(batch)
        self.texts.append(text)
        for row, sample_id in enumerate(batch.sample_ids):
            tokens, mask = batch.token_ids[row, : batch.lengths[row]], batch.loss_mask[row, : batch.lengths[row]]
            self.trained.append((int(sample_id), step, tuple(tokens[~mask].tolist()), tuple(tokens[mask].tolist())))
        self.steps_done += 1
        self.history.num_trained += len(batch.sample_ids)
        self.history.add("trained", step)
        return StepReport(batch.step, 0.5, batch.num_target_tokens, grad_norm=1.0, learning_rate=1e-3, seconds=0.1)

    def _check(self, batch: TrainBatch, step: int) -> None:
        assert batch.step == step + 1
        assert self.history.published == step, "trained before the last version was published"
        first = step * self.batch_size
        np.testing.assert_array_equal(batch.sample_ids, np.arange(first, first + self.batch_size))
        shape = (self.batch_size, int(batch.lengths.max()))
        assert batch.token_ids.shape == batch.loss_mask.shape == shape
        assert batch.num_target_tokens == batch.loss_mask.sum()
        for name in ("mixture_logprobs", "student_logprobs", "teacher_logprobs"):
            assert batch.columns[name].shape == shape
            assert (batch.columns[name][batch.loss_mask] < 0).all()
            assert (batch.columns[name][~batch.loss_mask] == 0).all()

    async def publish(self, version: int) -> None:
        assert version == self.steps_done
        await turns(1)
        self.history.published = version
        self.history.add("publish", version)

    async def save_checkpoint(self, step: int) -> None:
        assert step == self.steps_done, "a checkpoint names the step that the weights are at"
        await turns(2)
        self.saved.append(step)

    async def open_checkpoint(self, step: int) -> FakeCheckpoint:
        assert step == self.steps_done, "a checkpoint names the step that the weights are at"
        await turns(2)
        self.history.add("opened", step)
        return FakeCheckpoint(self, step)


@dataclass
class FakeCheckpoint:
    """An open checkpoint, which takes as long to complete as its student says."""

    student: FakeStudent
    step: int

    async def keep_files(self) -> None:
        assert self.step in self.student.told(), "the files lack the line of the checkpoint's step"
        assert max(self.student.told()) == self.step, "the files have lines that the checkpoint does not"
        await turns(self.student.turns_per_file)
        assert max(self.student.told()) == self.step, "a line was added to files that are being sent"

    async def commit(self) -> None:
        await turns(self.student.turns_per_commit)
        if self.step in self.student.lost_commits:
            raise self.student.lost_commits[self.step]
        self.student.history.add("committed", self.step)
        self.student.saved.append(self.step)


class FakeReporter:
    """Keeps what it is told; steps must follow each other."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.sampled: dict[int, list[Rollout]] = {}

    def step(self, report: StepReport, metrics: Mapping[str, float]) -> None:
        assert not self.metrics or report.step == max(self.metrics) + 1
        assert all(np.isfinite(value) for value in metrics.values())
        self.metrics[report.step] = dict(metrics)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def samples(self, rollouts: Sequence[Rollout], step: int) -> None:
        self.sampled[step] = list(rollouts)


def make_prompts(number: int = 7) -> list[Prompt]:
    """Distinct prompts of different lengths; none ends in EOS."""
    return [
        Prompt(prompt_id=10 + index, token_ids=np.array([index % VOCAB] * (index % 3) + [index % EOS, 1], dtype=np.int32))
        for index in range(number)
    ]


class Rig:
    """A run of the loop over fakes. Change a part, then `await rig.run()`; whatever comes of it, no task may be left."""

    def __init__(self, folder: Path, start_step: int = 0, learns: bool = True, **settings: Any) -> None:
        defaults = {"seed": 3, "steps": 6, "batch_size": 4, "alpha": 0.3, "max_new_tokens": 6, "samples_per_prompt": 2}
        cadence = {"max_staleness": 1, "checkpoint_every": 0, "evaluate_every": 0}
        self.settings = LoopSettings(**(defaults | cadence | settings))
        self.start_step = start_step
        self.world = BigramWorld(learns=learns)
        batch_size = self.settings.batch_size
        self.history = History(published=start_step)
        self.sampler = FakeSampler(self.world, self.history)
        self.scorer: FakeScorer | None = None
        self.student = FakeStudent(self.history, batch_size, steps_done=start_step)
        self.reporter = FakeReporter()
        self.student.told = lambda: self.reporter.metrics
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.totals = Totals()
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    async def run(self, schedules: Schedules | None = None, **hooks: Any) -> None:
        """Args: hooks: of `kdray.loop.Hooks`."""
        before = asyncio.all_tasks()
        prompts = PromptStream(make_prompts(), self.settings.seed)
        distillation = Distillation(
            self.settings,
            prompts,
            self.sampler,
            self.scorer,
            self.student,
            self.reporter,
            self.ledger,
            self.totals,
            schedules=schedules,
            hooks=Hooks(**hooks),
            stop=self.stop,
            hurry=self.hurry,
            start_step=self.start_step,
        )
        try:
            await distillation.run()
        finally:
            # Cancelled tasks need a turn to notice.
            await turns(5)
            left = asyncio.all_tasks() - before
            for task in left:
                task.cancel()
            assert not left, f"tasks left behind: {left}"
            assert not self.history.running, f"samples still being drawn or scored: {self.history.running}"
