"""Ray Train worker loop around one rank's `StudentTrainer`, which pulls commands from the group's mailbox.

Control is inverted: Ray Train owns the ranks and blocks until they end, so they fetch their work. Commands form a log; each
rank reads it by index and reports a result for every command. After a rank is lost Ray Train restarts the whole group, and the
ranks replay the log from the last committed checkpoint: the same batches in the same order, with results that nobody waits for
any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from actors.freed_memory import keep_returning
from actors.student.checkpoints.rank_files import RankFiles
from actors.student.mailbox import Command
from actors.student.trainer import StudentTrainer
from actors.weights.publisher import Publisher
from actors.weights.sender import WeightServer
from kdray.checks.parity import LONG, SHORT, TrainedLogprobs
from kdray.config import TrainingSettings
from kdray.config.secret_files import set_secrets
from kdray.errors import StorageError, TrainingError
from kdray.models.saving import TokenizerSource
from kdray.runs.lease import Ticket
from kdray.types import TrainBatch

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


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
    lease: Ticket | None = None
    """Lease of the run whose rank this is; None if there is none."""
    parity_ids: tuple[int, ...] = ()
    """Token ids whose log q is published with every version, so that replicas can compare; empty leaves it out."""
    average: Any = None
    """Actor handle of the WeightStore of a teacher that is this student's average."""
    secrets: Mapping[str, Path] = field(default_factory=dict)
    """Files with the values of environment variables that ranks need, by the variable's name."""


def run_rank(given: dict[str, RankConfig]) -> None:
    """Ray Train's per-worker function: execute the commands of the mailbox until the stop command."""
    import torch

    config = given["config"]
    set_secrets(config.secrets)
    keep_returning()
    if config.training.gpus_per_rank == 0:
        torch.set_num_threads(max(1, int(config.training.cpus_per_rank)))
    trainer = StudentTrainer(config.training, config.vocab_size, config.seed)
    # As it happens: an outage of minutes is known before the command that it holds up has ended.
    files = RankFiles(
        trainer,
        config.run_folder,
        config.storage,
        config.lease,
        lambda retry: config.mailbox.tell.remote("storage_retry", retry),
    )
    outlet = Outlet(config, trainer)
    try:
        run_log(config, trainer, files, outlet)
    finally:
        files.close()
        outlet.close()


def run_log(config: RankConfig, trainer: StudentTrainer, files: RankFiles, outlet: Outlet) -> None:
    """Execute the log's commands in order, from the last committed checkpoint on, until the stop command."""
    mailbox, rank = config.mailbox, trainer.rank
    context = ray.get_runtime_context()
    ray.get(mailbox.enter.remote(rank, context.current_actor, context.get_node_id()))
    index, phase, checkpoint = ray.get(mailbox.start.remote(rank))
    if phase is not None:
        files.start_phase(phase, None if checkpoint is None else Path(checkpoint))
        # Replicas that start now request what was published before the checkpoint. No command of the log publishes it again,
        # and the objects of the ranks before are lost.
        if config.average is not None and (phase.loss is not None or trainer.has_average()):
            # Before the student's version that it belongs to, as in every step.
            outlet.renew(trainer.steps_done, decay=1.0)
        if phase.loss is not None:
            # Distillation's versions are its steps.
            outlet.publish(trainer.steps_done)
    while True:
        try:
            command: Command = call_with_retry(lambda: mailbox.command.remote(index))  # noqa: B023 - called in this iteration
        except RayActorError:
            # The driver has removed the mailbox: the run is over, and a restart would not find it either.
            return
        try:
            result = execute(command, trainer, files, config, outlet)
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


def execute(command: Command, trainer: StudentTrainer, files: RankFiles, config: RankConfig, outlet: Outlet) -> Any:
    """Execute a command, together with the other ranks. Returns: rank 0's result."""
    if command.kind not in ("train", "publish", "renew", "open", "commit"):
        # A restart from a checkpoint publishes nothing that came before it; from an open one, the version that it holds.
        outlet.flush()
    if command.kind == "phase":
        assert command.phase is not None
        files.start_phase(command.phase, None if command.checkpoint is None else Path(command.checkpoint))
    elif command.kind == "train":
        return trainer.train_step(*_shards(command, trainer.rank, config.mailbox), command.scheduled)
    elif command.kind == "publish":
        assert command.version is not None
        return outlet.publish(command.version)
    elif command.kind == "renew":
        assert command.version is not None
        assert command.decay is not None
        outlet.renew(command.version, command.decay)
    elif command.kind == "save":
        assert command.checkpoint is not None
        return files.save(Path(command.checkpoint), command.progress or {})
    elif command.kind == "open":
        assert command.checkpoint is not None
        files.open(Path(command.checkpoint), command.progress or {}, lambda: config.mailbox.note_stored.remote(trainer.rank))
    elif command.kind == "commit":
        return files.commit()
    elif command.kind == "export":
        assert command.folder is not None
        files.export(Path(command.folder), config.tokenizer, config.parity_ids[:SHORT])
    return None


def _shards(command: Command, rank: int, mailbox: Any) -> tuple[TrainBatch, TrainBatch | None]:
    """A rank's shard of a batch, and of its pretraining text."""
    if command.kept is not None:
        index = command.kept
        found: tuple[TrainBatch, TrainBatch | None] = call_with_retry(lambda: mailbox.shards.remote(index, rank))
        return found
    assert command.shards is not None
    text = None if command.text_shards is None else ray.get(command.text_shards[rank])
    return ray.get(command.shards[rank]), text


class Outlet:
    """Publication of the student's weights to replicas. Every rank takes part in gathering them, rank 0 sends."""

    def __init__(self, config: RankConfig, trainer: StudentTrainer) -> None:
        self._config = config
        self._trainer = trainer
        self._server: WeightServer | None = None
        publisher: Publisher | None = None
        average: Publisher | None = None
        # One for both: a replica that has a version of the student finds the average that belongs to it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weight-publisher")
        if trainer.rank == 0 and config.training.weight_transfer != "object_store":
            self._server = WeightServer(config.training.weight_transfer, config.weights, config.training.sync_bucket_mib)
        if trainer.rank == 0 and config.training.weight_transfer == "object_store":
            publisher = Publisher(config.weights, self._thread, config.training.sync_full_every)
        if trainer.rank == 0 and config.average is not None:
            average = Publisher(config.average, self._thread, config.training.sync_full_every)
        self._student, self._average = Channel(trainer, publisher), Channel(trainer, average)

    def publish(self, version: int) -> int:
        """Publish the weights as they are now. Through the object store, they may arrive after this returns.

        Returns: bytes of the published tensors, on rank 0.
        """
        if self._config.training.weight_transfer == "object_store":
            trained = self._trained()
            return self._student.send(
                version, lambda fixed: self._trainer.weight_buckets(fixed=fixed, reuse=not fixed), trained
            )
        return self._announce(version)

    def renew(self, version: int, decay: float) -> None:
        """Update the average of the weights, and publish it. Args: decay: share of the average that is kept."""
        # Without an average they are the present weights, whose log q is at hand.
        trained = self._trained() if decay == 0 else None
        self._average.send(version, lambda fixed: self._trainer.averaged_buckets(decay, fixed), trained)

    def flush(self) -> None:
        """Return once everything is published. Raises: the error of a version that did not arrive."""
        for channel in (self._student, self._average):
            channel.flush()

    def close(self) -> None:
        """Stop sending."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._server is not None:
            self._server.close()

    def _announce(self, version: int) -> int:
        """Announce a version that rank 0 sends to replicas on request."""
        if self._server is not None:
            self._server.withdraw()
        tensors: dict[str, torch.Tensor] = {}
        for bucket in self._trainer.weight_buckets(self._trainer.device):
            tensors |= bucket
        trained = self._trained()
        if self._server is not None:
            self._server.publish(version, tensors)
            ray.get(self._config.weights.commit.remote(version, trained=trained))
        return sum(tensor.nbytes for tensor in tensors.values())

    def _trained(self) -> TrainedLogprobs | None:
        """log q of the ids that replicas compare: all at the start of a phase or after a resume, a few after every update."""
        length = SHORT if self._trainer.has_trained else LONG
        ids = self._config.parity_ids[:length]
        return self._trainer.log_probabilities(ids) if len(ids) > 1 else None


Buckets = Iterator[dict[str, "torch.Tensor"]]


class Channel:
    """Weights on their way to one store, on every rank: all take part in gathering them, and rank 0 sends.

    Weights that no update changes are sent once, and again after a replica could not fetch a version, or a phase began: they
    stay in the object store, and every version refers to them.
    """

    def __init__(self, trainer: StudentTrainer, publisher: Publisher | None) -> None:
        """Args: publisher: rank 0's; None on the others, whose buckets are empty."""
        self._trainer = trainer
        self._publisher = publisher
        self._held: Any = None
        """Phase and names of the fixed weights that were sent; the same on all ranks."""

    def send(self, version: int, buckets: Callable[[bool], Buckets], trained: TrainedLogprobs | None) -> int:
        """Publish a version. Args: buckets: gathers the fixed weights, or all others; trained: as for `Publisher.publish`.

        Returns: bytes of the whole version, on rank 0.
        """
        fixed = self._trainer.fixed
        belongs = self._trainer.phases_started, fixed.names
        anew = belongs != self._held
        if anew and fixed.joined is not None and self._publisher is not None:
            logger.warning("every version is sent whole, since the student's files hold %s in one tensor", fixed.joined)
        if not anew and fixed.names:
            anew = self._trainer.gather(self._publisher is not None and self._publisher.lost())[0]
        size = fixed.nbytes

        def counted() -> Buckets:
            nonlocal size
            for bucket in buckets(False):
                size += sum(tensor.nbytes for tensor in bucket.values())
                yield bucket

        held, others = buckets(True) if anew else None, counted()
        if self._publisher is not None:
            self._publisher.publish(version, others, trained, held)
        else:
            for _ in chain(held or (), others):
                pass
        self._held = belongs
        return size

    def flush(self) -> None:
        """Return once everything is published. Raises: the error of a version that did not arrive."""
        if self._publisher is not None:
            self._publisher.flush()


_UNREACHABLE_S = 1.0
