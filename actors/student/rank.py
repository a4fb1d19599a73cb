"""Ray Train worker loop around one rank's `StudentTrainer`, which pulls commands from the group's mailbox.

Control is inverted: Ray Train owns the ranks and blocks until they end, so they fetch their work. Commands form a log; each
rank reads it by index and reports a result for every command. After a rank is lost Ray Train restarts the whole group, and the
ranks replay the log from the last committed checkpoint: the same batches in the same order, with results that nobody waits for
any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from actors.student.checkpoint_io import RankFiles
from actors.student.mailbox import Command
from actors.student.trainer import StudentTrainer
from actors.weights.sender import WeightServer
from kdray.checks.parity import LONG, SHORT
from kdray.config import TrainingSettings
from kdray.errors import StorageError, TrainingError
from kdray.models.saving import TokenizerSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RankConfig:
    """Configuration passed to every rank; picklable."""

    training: TrainingSettings
    vocab_size: int
    seed: int
    tokenizer: TokenizerSource
    mailbox: Any
    """Actor handle of the Mailbox."""
    weights: Any
    """Actor handle of the WeightStore (`actors.weights.store`)."""
    run_folder: Path
    """Absolute path."""
    storage: str | None = None
    """URL of the run in `run.storage`; None if the run has only its run folder."""
    parity_ids: tuple[int, ...] = ()
    """Token ids whose log q is published with every version, so that replicas can compare; empty leaves it out."""
    average: Any = None
    """Actor handle of the WeightStore of a teacher that is this student's average."""


def run_rank(given: dict[str, RankConfig]) -> None:
    """Ray Train's per-worker function: execute the commands of the mailbox until the stop command."""
    import torch

    config = given["config"]
    if config.training.gpus_per_rank == 0:
        torch.set_num_threads(max(1, int(config.training.cpus_per_rank)))
    trainer = StudentTrainer(config.training, config.vocab_size, config.seed)
    files = RankFiles(trainer, config.run_folder, config.storage)
    server = None
    if config.training.weight_transfer != "object_store" and trainer.rank == 0:
        server = WeightServer(config.training.weight_transfer, config.weights, config.training.sync_bucket_mib)
    try:
        run_log(config, trainer, files, server)
    finally:
        files.close()
        if server is not None:
            server.close()


def run_log(config: RankConfig, trainer: StudentTrainer, files: RankFiles, server: WeightServer | None) -> None:
    """Execute the log's commands in order, from the last committed checkpoint on, until the stop command."""
    mailbox, rank = config.mailbox, trainer.rank
    ray.get(mailbox.enter.remote(rank, ray.get_runtime_context().current_actor))
    index, phase, checkpoint = ray.get(mailbox.start.remote(rank))
    if phase is not None:
        files.start_phase(phase, None if checkpoint is None else Path(checkpoint))
        if config.training.weight_transfer != "object_store" and phase.loss is not None:
            # Replicas that start now request the version that was published before the checkpoint: distillation's versions are
            # its steps. No command of the log publishes it again.
            announce(trainer, trainer.steps_done, config, server)
    while True:
        try:
            command: Command = call_with_retry(lambda: mailbox.command.remote(index))  # noqa: B023 - called in this iteration
        except RayActorError:
            # The driver has removed the mailbox: the run is over, and a restart would not find it either.
            return
        try:
            result = execute(command, trainer, files, config, server)
        except (TrainingError, StorageError) as error:
            # A restart would fail in the same way: it is a result, not a lost rank.
            result = error
        try:
            call_with_retry(lambda: mailbox.answer.remote(index, rank, result))  # noqa: B023 - called in this iteration
        except RayActorError:
            return
        if command.kind == "stop":
            return
        index += 1


def call_with_retry(call: Callable[[], Any]) -> Any:
    """Result of an actor call, retried while the actor's node is temporarily unreachable. Raises: RayActorError."""
    while True:
        try:
            return ray.get(call())
        except ActorUnavailableError:
            time.sleep(_UNREACHABLE_S)


def execute(
    command: Command, trainer: StudentTrainer, files: RankFiles, config: RankConfig, server: WeightServer | None = None
) -> Any:
    """Execute a command, together with the other ranks. Returns: rank 0's result."""
    if command.kind == "phase":
        assert command.phase is not None
        files.start_phase(command.phase, None if command.checkpoint is None else Path(command.checkpoint))
    elif command.kind == "train":
        assert command.shards is not None
        text = None if command.text_shards is None else ray.get(command.text_shards[trainer.rank])
        return trainer.train_step(ray.get(command.shards[trainer.rank]), text, command.scheduled)
    elif command.kind == "publish":
        assert command.version is not None
        if config.training.weight_transfer == "object_store":
            _publish(trainer.weight_buckets(), command.version, config.weights, trainer.rank, _trained(trainer, config))
        else:
            announce(trainer, command.version, config, server)
    elif command.kind == "renew":
        assert command.version is not None
        assert command.decay is not None
        _publish(trainer.averaged_buckets(command.decay), command.version, config.average, trainer.rank)
    elif command.kind == "save":
        assert command.checkpoint is not None
        return files.save(Path(command.checkpoint), command.progress or {})
    elif command.kind == "export":
        assert command.folder is not None
        files.export(Path(command.folder), config.tokenizer, config.parity_ids[:SHORT])
    return None


def _trained(trainer: StudentTrainer, config: RankConfig) -> np.ndarray | None:
    """log q of the ids that replicas compare: all at the start of a phase or after a resume, a few after every update."""
    length = SHORT if trainer.has_trained else LONG
    ids = config.parity_ids[:length]
    return trainer.log_probabilities(ids) if len(ids) > 1 else None


def _publish(
    buckets: Iterator[dict[str, torch.Tensor]], version: int, weights: Any, rank: int, trained: np.ndarray | None = None
) -> None:
    """Send the weights to the store, bucket by bucket. Every rank takes part in gathering, rank 0 sends."""
    from safetensors.torch import save

    count = 0
    for bucket in buckets:
        if rank == 0:
            # Safetensors bytes: replicas write them to a file unchanged.
            data = np.frombuffer(save(bucket), dtype=np.uint8)
            ray.get(weights.put_bucket.remote(version, count, data))
        count += 1
    if rank == 0:
        ray.get(weights.commit.remote(version, count, trained))


def announce(trainer: StudentTrainer, version: int, config: RankConfig, server: WeightServer | None) -> None:
    """Announce a version that rank 0 sends to replicas on request. Every rank takes part in gathering."""
    if server is not None:
        server.withdraw()
    tensors: dict[str, torch.Tensor] = {}
    for bucket in trainer.weight_buckets(trainer.device):
        tensors |= bucket
    trained = _trained(trainer, config)
    if server is not None:
        server.publish(version, tensors)
        ray.get(config.weights.commit.remote(version, 0, trained))


_UNREACHABLE_S = 1.0
