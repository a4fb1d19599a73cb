"""DeepSpeed with ZeRO, one instance per rank, inside an existing torch process group. Independent of Ray."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors.student.backend import Forward, Optimization, StudentBackend, Update
from actors.student.safe_load import tensors_alone
from kdray.config import DeepSpeedSettings, TrainingSettings
from kdray.errors import TrainingError

_TAG = "state"
"""DeepSpeed's tag for the only checkpoint of a folder."""


class DeepSpeedBackend(StudentBackend):
    """A rank of a DeepSpeed engine; the gradient accumulation boundary is set explicitly for each micro-batch."""

    def __init__(self, training: TrainingSettings) -> None:
        super().__init__(training)
        assert isinstance(training.backend, DeepSpeedSettings)
        self._settings = training.backend
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._engine: Any = None

    # ----------------------------------------------------------------------------------------------------- a phase

    @contextmanager
    def loading(self) -> Iterator[None]:
        """At stage 3, transformers loads each weight directly into its shards while its own record of the settings is alive."""
        _import_deepspeed()
        from transformers.integrations import HfDeepSpeedConfig

        sharded = HfDeepSpeedConfig(self._config()) if self._settings.zero_stage == 3 else None
        yield
        del sharded

    def start(self, module: torch.nn.Module, optimization: Optimization) -> None:
        optimizer = optimization.optimizer(module)
        self._engine, *_ = _import_deepspeed().initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=optimization.scheduler(optimizer),
            config=self._config(),
            dist_init_required=False,
        )

    def close(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
            gc.collect()

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def _config(self) -> dict[str, Any]:
        training = self.training
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            # The number of micro-batches of a step is determined by setting each boundary explicitly.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": training.gradient_clipping,
            "zero_optimization": {"stage": self._settings.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": training.precision == "bf16"},
            "steps_per_print": 10**9,
        }
        return _merge(config, self._settings.options)

    # ---------------------------------------------------------------------------------------------------- an update

    def forward_backward(self, loss: Callable[[Forward], torch.Tensor], last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss(self._engine), scale_wrt_gas=False)

    def step(self) -> Update:
        engine = self._engine
        learning_rate = float(engine.get_lr()[0])
        norm = self._plain_grad_norm()
        if norm is not None and not math.isfinite(norm):
            return Update(norm, learning_rate, applied=False)
        engine.step()
        return Update(float(engine.get_global_grad_norm()) if norm is None else norm, learning_rate, applied=True)

    def _plain_grad_norm(self) -> float | None:
        """Gradient norm before clipping, for the case that DeepSpeed has no optimizer of its own that reports it."""
        if self._settings.zero_stage or self.training.precision != "fp32":
            return None
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def evaluate(self, **inputs: Any) -> Any:
        with torch.no_grad():
            return self._engine(**inputs)

    # -------------------------------------------------------------------------------------------------- across ranks

    def reduce(self, values: Sequence[float]) -> list[float]:
        if not values:
            return []
        sums = torch.tensor(values, dtype=torch.float64).to(self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    # ------------------------------------------------------------------------------------------------------- weights

    def numel(self, parameter: torch.nn.Parameter) -> int:
        return getattr(parameter, "ds_numel", parameter.numel())

    def whole(self, parameters: Sequence[torch.nn.Parameter], device: torch.device | str) -> list[torch.Tensor]:
        sharded = self._settings.zero_stage == 3
        with _import_deepspeed().zero.GatheredParameters(list(parameters)) if sharded else nullcontext():
            if self.rank != 0:
                return []
            return [parameter.detach().to(device, copy=True).contiguous() for parameter in parameters]

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state=state)

    def load(self, folder: Path) -> dict[str, Any]:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        loaded = state = None
        if (folder / _TAG).is_dir():
            with tensors_alone(LossScaler, ZeroStageEnum, fragment_address):
                loaded, state = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if loaded is None or state is None:
            raise TrainingError(f"{folder}: DeepSpeed found no checkpoint for this number of ranks and ZeRO stage")
        return state


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # DeepSpeed would compile it at the first start on CPUs, for reductions that training never uses. A rank killed meanwhile
    # leaves torch's lock on it behind, for which every later rank of the machine would wait forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Merge `extra` over `base`, section by section."""
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
