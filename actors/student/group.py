"""StudentGroup over a Ray Train TorchTrainer: a call reaches every rank, and a failure of any rank fails the call."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from actors.background_call import in_daemon_thread
from actors.driver_actor import on_driver_node
from actors.student.checkpoints.rank_files import Saved
from actors.student.lost_ranks import draining_nodes
from actors.student.mailbox import Command, Mailbox
from actors.student.rank import RankConfig, run_rank
from actors.student.trainer import Phase
from kdray.config import TrainingSettings
from kdray.errors import KdrayError, NoRoomForRanks, TrainingError
from kdray.models.saving import TokenizerSource
from kdray.rollouts.batching import shard
from kdray.runs.lease import Ticket
from kdray.types import StepReport, TrainBatch


@dataclass
class StudentGroup:
    """The student's ranks as a unit (`kdray.interfaces.Student`). Call `start` first, and `close` last in any case."""

    training: TrainingSettings
    vocab_size: int
    seed: int
    tokenizer: TokenizerSource
    weights: Any
    """Actor handle of the WeightStore that versions are published to."""
    checkpoints: Path
    """`checkpoints/` of the run folder; one subfolder each."""
    storage: Path
    """Folder for Ray Train's own state; used only by the driver."""
    average: Any = None
    """Actor handle of the WeightStore of a teacher that is this student's average; None if there is none."""
    stored: str | None = None
    """URL of the run in `run.storage`, to which checkpoints and exports then go; None for the run folder itself."""

    lease: Ticket | None = None
    """Lease under which checkpoints and exports are written; None if there is none."""

    parity_ids: tuple[int, ...] = ()
    """Token ids on which replicas compare the student with the trainer's; empty if they do not."""

    secrets: Mapping[str, Path] = field(default_factory=dict)
    """Files with the values of environment variables that ranks need, by the variable's name."""

    on_event: Callable[..., None] = lambda kind, **fields: None
    """Called with events of the ranks: kind, and fields by name."""

    def __post_init__(self) -> None:
        # Ranks work in folders of their own.
        self.checkpoints = self.checkpoints.absolute()
        self._mailbox: Any = None
        self._fit: asyncio.Future[Any] | None = None
        self._published_bytes: int | None = None
        self._telling: asyncio.Task[None] | None = None
        self._looked_at = -_NOTICES_EVERY_S
        self._leaving: set[str] = set()
        """Nodes of ranks that are about to be taken away."""
        self._commands: dict[str, float] = {}
        """Running commands, and when they were given."""

    async def start(self) -> None:
        """Start the ranks; returns at once, and the first call waits until they are up."""
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        from actors.student.lost_ranks import LostRanks

        training = self.training
        self._mailbox = on_driver_node(Mailbox, max_concurrency=1000).remote(
            training.ranks, training.max_restarts, on_disk=True
        )
        use_gpu = training.gpus_per_rank > 0
        resources = {"CPU": training.cpus_per_rank, **training.resources}
        if use_gpu:
            resources["GPU"] = training.gpus_per_rank
        trainer = TorchTrainer(
            run_rank,
            train_loop_config={
                "config": RankConfig(
                    training=training,
                    vocab_size=self.vocab_size,
                    seed=self.seed,
                    tokenizer=self.tokenizer,
                    mailbox=self._mailbox,
                    weights=self.weights,
                    run_folder=self.checkpoints.parent,
                    storage=self.stored,
                    lease=self.lease,
                    average=self.average,
                    parity_ids=self.parity_ids,
                    secrets=self.secrets,
                )
            },
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=training.ranks,
                use_gpu=use_gpu,
                resources_per_worker=resources,
                accelerator_type=training.accelerator_type,
                label_selector=training.labels or None,
                placement_strategy=training.placement.upper(),
            ),
            run_config=ray.train.RunConfig(
                name="student",
                storage_path=str(self.storage.absolute()),
                # Ray Train counts failures over the whole life of a group. The mailbox knows what counts as progress.
                failure_config=ray.train.FailureConfig(max_failures=-1),
                callbacks=[LostRanks(self._mailbox)],
            ),
        )
        self._fit = in_daemon_thread(trainer.fit)
        self._telling = asyncio.create_task(self._tell())

    @property
    def mailbox(self) -> Any:
        """Actor handle of the Mailbox; None before the start."""
        return self._mailbox

    async def _tell(self) -> None:
        """Pass on the mailbox's events, as they come, as long as it lives."""
        told, failing = 0, False
        while True:
            try:
                news = await self._mailbox.news.remote(told)
            except ActorDiedError:
                # A lost mailbox is told by the commands.
                return
            except Exception as error:
                # Ray may not reach it for a moment; for how long at most, the watch over the run's actors decides.
                if not failing:
                    self.on_event("watch_failed", watched="the mailbox of the ranks", reason=repr(error)[:500])
                failing = True
                await asyncio.sleep(_RETRY_S)
                continue
            failing = False
            for kind, fields in news:
                self.on_event(kind, **fields)
            told += len(news)

    async def close(self, timeout_s: float = 30.0) -> None:
        """Wait for the ranks to end by themselves, for at most `timeout_s`."""
        if self._fit is None:
            return
        if not self._fit.done():
            # Not waited for: the mailbox itself may stand still.
            self._mailbox.post.remote(Command("stop"))
            await asyncio.wait({self._fit}, timeout=timeout_s)
        if self._telling is not None:
            self._telling.cancel()
        if self._fit.done() and not self._fit.cancelled():
            # Retrieved, so that asyncio does not report it as never retrieved: the call that met a failure has already raised
            # it.
            self._fit.exception()
        with contextlib.suppress(RayActorError, TimeoutError):
            # What it leaves on the disk otherwise is swept by the next process that looks there.
            await asyncio.wait_for(_awaited(self._mailbox.close.remote()), _CLOSE_S)
        # Ranks that did not end lose their mailbox, and end then.
        ray.kill(self._mailbox)

    async def start_phase(self, phase: Phase, checkpoint: Path | None = None) -> None:
        """Start a phase with a fresh optimizer and the phase's own weights, or with a checkpoint written by the same phase."""
        await self._call(Command("phase", phase=phase, checkpoint=None if checkpoint is None else str(checkpoint)))

    async def train_step(
        self, batch: TrainBatch, text: TrainBatch | None = None, scheduled: Mapping[str, float] | None = None
    ) -> StepReport:
        report: StepReport = await self._call(
            Command(
                "train",
                shards=self._shards(batch),
                text_shards=None if text is None else self._shards(text),
                scheduled=dict(scheduled or {}),
            )
        )
        gap = await self.weights.largest_gap.remote()
        measured = {"parity_gap": gap, "published_bytes": self._published_bytes}
        if self.training.sends_parts and (sent := await self.weights.sent.remote()) is not None:
            measured |= sent.metrics()
        return replace(report, metrics=report.metrics | {name: value for name, value in measured.items() if value is not None})

    def _shards(self, batch: TrainBatch) -> Sequence[ray.ObjectRef]:
        world_size = self.training.ranks
        return [ray.put(shard(batch, rank, world_size)) for rank in range(world_size)]

    async def publish(self, version: int) -> None:
        self._published_bytes = await self._call(Command("publish", version=version))
        if self.training.weight_transfer != "object_store":
            for reason in await self.weights.take_failures.remote():
                self.on_event("transfer_failed", reason=reason)

    async def renew(self, version: int, decay: float) -> None:
        """Update the average of the student's weights, and publish it as a teacher's: decay 1 leaves it unchanged."""
        await self._call(Command("renew", version=version, decay=decay))

    async def save_checkpoint(self, step: int, progress: dict[str, Any] | None = None, name: str | None = None) -> Saved:
        """Write a checkpoint. Args: name: of its folder; None is that of a step."""
        folder = self.checkpoints / (name or f"step-{step:06d}")
        return await self._call(Command("save", checkpoint=str(folder), progress={"step": step, **(progress or {})}))

    async def open_checkpoint(self, step: int, progress: dict[str, Any]) -> None:
        """Have every rank write its state to a folder of its own, which `commit_checkpoint` completes beside other commands."""
        folder = self.checkpoints / f"step-{step:06d}"
        await self._call(Command("open", checkpoint=str(folder), progress={"step": step, **progress}))

    async def commit_checkpoint(self) -> Saved:
        """Complete the open checkpoint, once the files of all ranks are stored; none stops training before that."""
        assert self._fit is not None
        stored = asyncio.ensure_future(_awaited(self._mailbox.stored.remote()))
        # Longer than that, the ranks wait for it themselves, and count as stuck after the same time again.
        limit = self.training.stuck_after_s
        await asyncio.wait({stored, self._fit}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        stored.cancel()
        saved: Saved = await self._call(Command("commit"))
        return saved

    async def export(self, folder: Path) -> None:
        """Write the student as a Hugging Face folder; an absolute path, since ranks work in folders of their own."""
        await self._call(Command("export", folder=str(folder)))

    async def holds_too_much(self) -> bool:
        """True if the batches since the last checkpoint take all the disk that they may (`training.replay_gib`)."""
        held: int = await self._mailbox.kept_bytes.remote()
        return held >= self.training.replay_gib * _GIB

    async def leaving(self) -> list[int]:
        """Ranks whose node the cluster will take away, as it does a spot instance; every notice is told once."""
        if (now := time.monotonic()) - self._looked_at < _NOTICES_EVERY_S:
            return []
        self._looked_at = now
        nodes, drained = await self._mailbox.nodes.remote(), await in_daemon_thread(draining_nodes)
        leaving = drained & set(nodes.values()) - self._leaving
        self._leaving |= leaving
        return sorted(rank for rank, node in nodes.items() if node in leaving)

    async def restarts(self) -> int:
        """Number of times that the ranks were restarted after one was lost."""
        return await self._mailbox.restarts.remote()

    def awaits_ranks(self) -> bool:
        """True while no rank has started yet, and some still may; blocks."""
        assert self._fit is not None
        return not self._fit.done() and not ray.get(self._mailbox.num_entered.remote())

    def waits_for(self) -> list[str]:
        """Commands that the ranks have not finished, a line each."""
        now = time.monotonic()
        return [f"the student ranks, to finish `{kind}` since {now - since:.0f} s" for kind, since in self._commands.items()]

    async def _call(self, command: Command) -> Any:
        """Post a command and wait for its result, or for the end of the ranks, whichever comes first."""
        self._commands[command.kind] = time.monotonic()
        try:
            return await self._result(command)
        finally:
            self._commands.pop(command.kind, None)

    async def _result(self, command: Command) -> Any:
        assert self._fit is not None
        index = await self._mailbox.post.remote(command)
        answer = asyncio.ensure_future(_awaited(self._mailbox.result.remote(index)))
        setting = "stuck_loading_after_s" if command.kind in ("phase", "export") else "stuck_after_s"
        patience: float = getattr(self.training, setting)
        left, killed = patience, False
        while True:
            done, _ = await asyncio.wait({answer, self._fit}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if done:
                break
            # Ranks that restart, or replay the work of a lost one, are not stuck.
            silent = await self._mailbox.silent_s.remote()
            left = patience - silent
            if left <= 0:
                if killed and not await self._mailbox.heard_since_kill.remote():
                    raise NoRoomForRanks(
                        f"the student ranks did not start again within training.{setting}={patience:g}: no node may have "
                        "room for them any more (kdray plan says what they need); continue with --resume once there is"
                    )
                self.on_event("ranks_stuck", order=command.kind, silent_s=round(silent, 1))
                await self._mailbox.kill_ranks.remote()
                left, killed = patience, True
        if not answer.done():
            answer.cancel()
            raise TrainingError(f"the student ranks ended during `{command.kind}`: {_reason(self._fit)}")
        result = answer.result()
        if isinstance(result, KdrayError):
            raise result
        return result


async def _awaited(reference: Any) -> Any:
    return await reference


_CLOSE_S = 10.0
_NOTICES_EVERY_S = 2.0
_RETRY_S = 1.0
_GIB = 2**30


def _reason(fit: asyncio.Future[Any]) -> str:
    if fit.cancelled():
        return "cancelled"
    error = fit.exception()
    if error is None:
        return "they stopped without an error"
    if (stopped := getattr(error, "controller_failure", None)) is not None:
        # `LostRanks` says why.
        return str(stopped)
    failures = getattr(error, "worker_failures", None) or {}
    parts = [f"rank {rank}: {failure}" for rank, failure in sorted(failures.items())]
    return "; ".join(parts) or str(error)
