"""The Ray Train worker loop around one DeepSpeed rank, and the mailbox it pulls its orders from.

Control is inverted: Ray Train owns the ranks and blocks until they end, so they fetch what to do. Orders form a log; each
rank walks it by index and answers every order. After a rank is lost Ray Train restarts the whole group, and the ranks walk
the log again from the last committed checkpoint: the same batches, the same order, answers that nobody waits for any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from actors.student.checkpoint_io import RankFiles
from actors.student.engine import StudentEngine
from actors.student.mailbox import Order
from actors.weights.sender import WeightServer
from kdray.config import TrainingSettings
from kdray.errors import StorageError, TrainingError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RankConfig:
    """What every rank is given; picklable."""

    training: TrainingSettings
    vocab_size: int
    seed: int
    tokenizer: str
    mailbox: Any
    """Actor handle of the Mailbox."""
    weights: Any
    """Actor handle of the WeightStore (`actors.weights.store`)."""
    run_folder: Path
    """Absolute."""
    storage: str | None = None
    """URL of the run in `run.storage`; None where it has the run folder alone."""
    average: Any = None
    """Actor handle of the WeightStore of a teacher that is this student's average."""


def run_rank(given: dict[str, RankConfig]) -> None:
    """Ray Train's per-worker function: walk the mailbox until it says stop."""
    import torch

    config = given["config"]
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(config.training.cpus_per_rank)))
    engine = StudentEngine(config.training, config.vocab_size, config.seed)
    files = RankFiles(engine, config.run_folder, config.storage)
    server = None
    if config.training.weight_transfer != "object_store" and engine.rank == 0:
        server = WeightServer(config.training.weight_transfer, config.weights, config.training.sync_bucket_mib)
    try:
        _walk(config, engine, files, server)
    finally:
        files.close()
        if server is not None:
            server.close()


def _walk(config: RankConfig, engine: StudentEngine, files: RankFiles, server: WeightServer | None) -> None:
    mailbox, rank = config.mailbox, engine.rank
    ray.get(mailbox.enter.remote(rank, ray.get_runtime_context().current_actor))
    index, phase, checkpoint = ray.get(mailbox.start.remote(rank))
    if phase is not None:
        files.start_phase(phase, None if checkpoint is None else Path(checkpoint))
        if config.training.weight_transfer != "object_store" and phase.loss is not None:
            # Replicas that start now ask for the version that was published before the checkpoint: distillation's versions are
            # its steps. No order of the log publishes it again.
            _offer(engine, engine.steps_done, config.weights, server)
    while True:
        try:
            order: Order = _asked(lambda: mailbox.order.remote(index))  # noqa: B023 - asked within the turn
        except RayActorError:
            # The driver took the mailbox away: the run is over, and a restart would find nobody either.
            return
        try:
            result = _obey(order, engine, files, config, server)
        except (TrainingError, StorageError) as error:
            # A restart would meet it again: it is an answer, not a lost rank.
            result = error
        try:
            _asked(lambda: mailbox.answer.remote(index, rank, result))  # noqa: B023 - asked within the turn
        except RayActorError:
            return
        if order.kind == "stop":
            return
        index += 1


def _asked(call: Callable[[], Any]) -> Any:
    """The mailbox's answer, asked for again while the driver's node is out of reach for a moment. Raises: RayActorError."""
    while True:
        try:
            return ray.get(call())
        except ActorUnavailableError:
            time.sleep(_UNREACHABLE_S)


def _obey(order: Order, engine: StudentEngine, files: RankFiles, config: RankConfig, server: WeightServer | None = None) -> Any:
    if order.kind == "phase":
        assert order.phase is not None
        files.start_phase(order.phase, None if order.checkpoint is None else Path(order.checkpoint))
    elif order.kind == "train":
        assert order.shards is not None
        text = None if order.text_shards is None else ray.get(order.text_shards[engine.rank])
        return engine.train_step(ray.get(order.shards[engine.rank]), text, order.scheduled)
    elif order.kind == "publish":
        assert order.version is not None
        if config.training.weight_transfer == "object_store":
            _publish(engine.weight_buckets(), order.version, config.weights, engine.rank)
        else:
            _offer(engine, order.version, config.weights, server)
    elif order.kind == "renew":
        assert order.version is not None
        assert order.decay is not None
        _publish(engine.averaged_buckets(order.decay), order.version, config.average, engine.rank)
    elif order.kind == "save":
        assert order.checkpoint is not None
        return files.save(Path(order.checkpoint), order.progress or {})
    elif order.kind == "export":
        assert order.folder is not None
        files.export(Path(order.folder), config.tokenizer)
    return None


def _publish(buckets: Iterator[dict[str, torch.Tensor]], version: int, weights: Any, rank: int) -> None:
    """Send the weights to the store, bucket by bucket. Every rank takes part in the gathering, rank 0 sends."""
    import numpy as np
    from safetensors.torch import save

    count = 0
    for bucket in buckets:
        if rank == 0:
            # Safetensors bytes: replicas write them to a file as they are.
            data = np.frombuffer(save(bucket), dtype=np.uint8)
            ray.get(weights.put_bucket.remote(version, count, data))
        count += 1
    if rank == 0:
        ray.get(weights.commit.remote(version, count))


def _offer(engine: StudentEngine, version: int, weights: Any, server: WeightServer | None) -> None:
    """Let replicas know of a version that rank 0 sends to those who ask. Every rank takes part in the gathering."""
    if server is not None:
        server.withdraw()
    tensors: dict[str, torch.Tensor] = {}
    for bucket in engine.weight_buckets(engine.device):
        tensors |= bucket
    if server is not None:
        server.publish(version, tensors)
        ray.get(weights.commit.remote(version, 0))


_UNREACHABLE_S = 1.0
