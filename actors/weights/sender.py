"""Rank 0's side of weight transfers: a snapshot of the published version, and a process that sends it to replicas.

The sender is a separate process because a transfer whose other side has died can only be ended by killing it: vLLM's engines
wait without a deadline, and a communication kernel that waits on the training process's GPU context would block training. The
sender shares the snapshot (CUDA IPC on GPUs, shared memory on CPUs), and is killed with all its resources when a transfer
fails.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import ray
import torch
import torch.multiprocessing
from ray.exceptions import ActorUnavailableError, RayActorError

from actors.weights.transfer import Ask, Turn
from kdray.errors import TrainingError

logger = logging.getLogger(__name__)

TRAINER_INFO = {"nccl": "vllm.distributed.weight_transfer.nccl_engine:NCCLTrainerInitInfo"}
"""vLLM's trainer-side init info of each backend, by name."""

_WAIT_S = 0.5
_START_S = 300.0


class _Failed(Exception):
    """Failure of a single transfer."""


class WeightServer:
    """Serves rank 0's newest snapshot from a separate thread and process; training never waits for either."""

    def __init__(self, backend: str, store: Any, bucket_mib: float) -> None:
        """Args: backend: of vLLM's weight transfer; store: the TransferStore's handle; bucket_mib: bucket size, MiB."""
        self._backend = backend
        self._bucket_size = int(bucket_mib * 2**20)
        self._store = store
        self._published = threading.Condition()
        self._version = -1
        self._tensors: dict[str, torch.Tensor] = {}
        self._sent: dict[str, torch.Tensor] = {}
        """Tensors shared with the sender; they must live as long as it reads them."""
        self._sender: Any = None
        self._pipe: Connection | None = None
        self._broken: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="weight-server", daemon=True)
        self._thread.start()

    def publish(self, version: int, tensors: dict[str, torch.Tensor]) -> None:
        """Serve these weights from now on; a running transfer finishes with the version that it started with.

        Raises: TrainingError if the server has failed.
        """
        if self._broken is not None:
            raise TrainingError(f"rank 0 stopped serving weights: {type(self._broken).__name__}: {self._broken}")
        if torch.cuda.is_available():
            # They are read by another process.
            torch.cuda.synchronize()
        with self._published:
            self._version, self._tensors = version, tensors
            self._published.notify_all()

    def withdraw(self) -> None:
        """Stop serving and drop the snapshot until the next `publish`; only weights being sent are kept until then."""
        with self._published:
            self._version, self._tensors = -1, {}

    def close(self) -> None:
        """Stop serving for good; a replica in a transfer is not notified, since its run ends too."""
        self._closed = True
        self._end_sender()

    def _serve(self) -> None:
        entered = False
        while not self._closed:
            try:
                if not entered:
                    ray.get(self._store.enter.remote())
                    entered = True
                number, ask = ray.get(self._store.asked.remote())
                if self._closed:
                    return
                reason = None
                try:
                    self._transfer(number, ask)
                except (_Failed, OSError, EOFError) as error:
                    if self._closed:
                        return
                    reason = str(error) or "the sending process ended"
                    logger.warning("a transfer of weights failed: %s", reason)
                    # Its communicator is in an undefined state.
                    self._end_sender()
                ray.get(self._store.end.remote(number, reason))
            except ActorUnavailableError:
                # The driver's node is temporarily unreachable; a running transfer is restarted.
                self._end_sender()
                time.sleep(_WAIT_S)
            except RayActorError:
                # The run is over.
                self._end_sender()
                return
            except Exception as error:
                # Raised by the next publication.
                logger.exception("rank 0 stops serving weights")
                self._broken = error
                self._end_sender()
                return

    def _transfer(self, number: int, ask: Ask) -> None:
        """Send the newest snapshot to one replica. Raises: _Failed, or the errors of a broken pipe."""
        with self._published:
            # Restarted ranks first have to reach the version that was published before.
            self._published.wait_for(lambda: self._version >= ask.at_least)
            version, tensors = self._version, self._tensors
        pipe = self._pipe or self._start_sender(next(iter(tensors.values())).device)
        deadline = time.monotonic() + ask.timeout_s
        pipe.send(None if tensors is self._sent else tensors)
        self._sent = tensors
        pipe.send(ask.num_workers)
        ordered: Any = None
        while True:
            if ordered is not None and ray.wait([ordered], timeout=_WAIT_S)[0]:
                reason = ray.get(ordered)
                if reason is not None:
                    raise _Failed(reason)
                pipe.send(None)
                ordered = None
            if pipe.poll(0 if ordered is not None else _WAIT_S):
                kind, info = pipe.recv()
                if kind == "done":
                    return
                if kind == "failed":
                    raise _Failed(info)
                ordered = self._store.order.remote(number, Turn(kind, info, version))
            if time.monotonic() > deadline:
                raise _Failed(f"version {version} did not arrive within {ask.timeout_s:g} s")

    def _start_sender(self, device: torch.device) -> Connection:
        context = torch.multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        self._pipe = pipe
        address = ray.util.get_node_ip_address()
        arguments = (theirs, TRAINER_INFO[self._backend], address, device, self._bucket_size)
        self._sender = context.Process(target=send_weights, args=arguments, name="weight-sender", daemon=True)
        self._sender.start()
        # Closed here, so that the pipe ends with the process.
        theirs.close()
        if not pipe.poll(_START_S):
            raise _Failed(f"the sending process did not start within {_START_S:g} s")
        pipe.recv()
        return pipe

    def _end_sender(self) -> None:
        # Called from both threads.
        sender, self._sender = self._sender, None
        pipe, self._pipe = self._pipe, None
        self._sent = {}
        if sender is not None:
            sender.kill()
            sender.join()
        if pipe is not None:
            pipe.close()


# ---------------------------------------------------------------------------------------------------- the sender


def send_weights(pipe: Connection, trainer_info: str, address: str, device: torch.device, bucket_size: int) -> None:
    """Main loop of the sender process: for each transfer received by the pipe, open a communicator, send, close it.

    Args: trainer_info: class of vLLM's trainer-side init info, `module:name`; address: of this node; bucket_size: bytes.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.utils.network_utils import get_open_port

    from actors.weights.snapshot import snapshot

    module, name = trainer_info.split(":")
    info_class = getattr(importlib.import_module(module), name)
    source: Any = None
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            if (tensors := pipe.recv()) is not None:
                source = snapshot(tensors)
            num_workers = pipe.recv()
            info = info_class(
                master_address=address,
                master_port=get_open_port(),
                world_size=1 + num_workers,
                packed_buffer_size_bytes=bucket_size,
                rank=0,
            )
            try:
                engine = WeightTransferTrainerFactory.trainer_init(info, client=_Replica(pipe), source=source)
                engine.send_weights()
                engine.shutdown()
            except Exception as error:
                # Reported to rank 0, which ends this process.
                pipe.send(("failed", f"{type(error).__name__}: {error}"))
                continue
            pipe.send(("done", None))


class _Replica:
    """Replica in the role that vLLM's trainer engine expects (`VLLMWeightSyncClient`); calls are made one at a time."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask("connect", init_info)

    def start_weight_update(self) -> None:
        """No-op: part of `update_weights`."""

    def update_weights(self, update_info: Any) -> None:
        self._ask("receive", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """No-op: part of `update_weights`."""

    def _ask(self, kind: str, info: Any) -> None:
        self._pipe.send((kind, info))
        self._pipe.recv()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
