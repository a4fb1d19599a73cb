"""vLLM's dense weight-transfer engine with gloo where it has NCCL, so that it runs on CPUs; known in processes that import it.

Only the communicator differs: names, shapes, order, threads and calls are those of vLLM's NCCL engine.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
)

from actors.vllm_plugin.worker_extension import WorkerExtension
from tests.support.gloo_settings import FAULT

# Longer than any test: what ends a transfer early is kdray.
_NEVER = timedelta(hours=1)


def _group(info: Any, rank: int) -> Any:
    return stateless_init_torch_distributed_process_group(
        info.master_address, info.master_port, rank, info.world_size, "gloo", timeout=_NEVER
    )


def _broadcast(group: Any, tensor: torch.Tensor) -> None:
    group.broadcast(tensor, 0).wait()


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    backend: ClassVar[str] = "gloo"


class GlooTrainer(NCCLTrainerWeightTransferEngine):
    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> GlooTrainer:
        engine = cls(client=client, source=source, packed=False)
        worker = NCCLWeightTransferInitInfo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank_offset=1,
            world_size=init_info.world_size,
        )
        with ThreadPoolExecutor(max_workers=1) as pool:
            told = pool.submit(client.init_weight_transfer_engine, worker_init_payload(worker))
            engine.model_update_group = _group(init_info, 0)
            told.result()
        return engine

    def _broadcast(self, source: Any, meta: Any) -> None:
        for _, tensor in self._checked_iter(source, meta):
            _broadcast(self.model_update_group, tensor.contiguous())

    def shutdown(self) -> None:
        self.model_update_group = None


class GlooReceiver(NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info: Any) -> None:
        self.model_update_group = _group(init_info, self.parallel_config.rank + init_info.rank_offset)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            _broadcast(self.model_update_group, weight)
            self.model.load_weights([(name, weight)])
            _fail_if_told()

    def shutdown(self) -> None:
        self.model_update_group = None


def _fail_if_told() -> None:
    told = os.environ.get(FAULT)
    if told is not None and Path(told).exists():
        fault = Path(told).read_text()
        Path(told).unlink()
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)


class GlooExtension(WorkerExtension):
    """kdray's, in a worker that knows gloo: vLLM loads it by its name, and with it this module."""


WeightTransferEngineFactory.register_engine("gloo", GlooReceiver)
WeightTransferTrainerFactory.register_engine("gloo", GlooTrainer)
