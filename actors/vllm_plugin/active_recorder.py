"""Part that the recorders of both of vLLM's model runners share: what the worker extension needs of the one in its process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from actors.vllm_plugin.batch_recorder import BatchRecorder
from actors.vllm_plugin.row_statistics import RowStatistics


class ActiveRecorder:
    """Recorder of this process, connected to one of vLLM's model runners by a subclass."""

    active: ClassVar[ActiveRecorder | None] = None
    """The only recorder of this process; the worker extension returns its records."""

    batch: BatchRecorder
    runner: Any = None
    """vLLM's model runner: it has on the host which tokens a step processes."""

    def begin(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Make the recorder of the batch, and become the active one. Args: device: of the model's rows."""
        limits = vllm_config.additional_config["kdray"]
        statistics = RowStatistics(limits["teacher_top_k"], limits["student_top_k"], limits["record_hidden"])
        self.batch = BatchRecorder(statistics, torch.device(device), keeps_records=get_tensor_model_parallel_rank() == 0)
        ActiveRecorder.active = self

    def attach(self, runner: Any) -> None:
        """Take the model runner, before the first request. Raises: ValueError if the recorder cannot follow its batches."""
        self.runner = runner


def request_args(params: SamplingParams) -> Mapping[str, Any] | None:
    """The arguments that kdray's engine sent with a request; None for a request of another origin."""
    return (params.extra_args or {}).get("kdray")
