"""DeepSpeed with ZeRO, one instance per rank, inside an existing torch process group. Independent of Ray."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors.student.backend import (
    Forward,
    Optimization,
    StudentBackend,
    Update,
    keep_learning_rates,
    training_device,
    uses_fused_optimizer,
)
from actors.student.backends.zero_shards import Layout, ZeroShards, first_file, restore
from actors.student.checkpoints.safe_load import plain_values, tensors_only
from actors.student.features import parameter_groups
from actors.weights.copies import CopyBuffers
from kdray.config import DeepSpeedSettings, TrainingSettings
from kdray.errors import TrainingError

_TAG = "state"
"""DeepSpeed's tag for the only checkpoint of a folder."""
_ABSENT = object()


class DeepSpeedBackend(StudentBackend):
    """A rank of a DeepSpeed engine; the gradient accumulation boundary is set explicitly for each micro-batch.

    With `training.precision=bf16` the gradients of micro-batches are added in float32, unless `training.backend.options` says
    otherwise; the sum of each micro-batch's over ranks is in bfloat16 at ZeRO stages 2 and 3.
    """

    def __init__(self, training: TrainingSettings) -> None:
        super().__init__(training)
        assert isinstance(training.backend, DeepSpeedSettings)
        self._settings = training.backend
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._on = training_device(training)
        self._engine: Any = None
        self._has_gradient = False

    # ----------------------------------------------------------------------------------------------------- a phase

    @contextmanager
    def loading(self) -> Iterator[None]:
        """At stage 3, transformers loads each weight directly into its shards while its own record of the settings is alive."""
        _import_deepspeed(self._on)
        from transformers.integrations import HfDeepSpeedConfig

        sharded = HfDeepSpeedConfig(self._config()) if self._settings.zero_stage == 3 else None
        yield
        del sharded

    def start(self, module: torch.nn.Module, optimization: Optimization) -> None:
        # An offloaded optimizer is stepped on the CPU by torch's fused kernel: DeepSpeed's own would have to be compiled first.
        fused = self._settings.offloads_optimizer or uses_fused_optimizer(self._on)
        optimization = replace(optimization, fused=fused)
        optimizer = optimization.optimizer(module)
        self._engine, *_ = _import_deepspeed(self._on).initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=optimization.scheduler(optimizer),
            config=self._config(),
            dist_init_required=False,
        )
        if self._adds_up_itself:
            for parameter in filter(lambda each: each.requires_grad, self.module.parameters()):
                parameter.grad_dtype = torch.float32
        if self.training.precision == "bf16" and self._settings.zero_stage == 0:
            _undo_first_step(self._engine.optimizer)
        write = self._engine.checkpoint_engine.save

        def write_plain(state_dict: Any, path: str) -> None:
            write(plain_values(state_dict), path)

        self._engine.checkpoint_engine.save = write_plain

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

    @property
    def _has_frozen(self) -> bool:
        return not all(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def _adds_up_itself(self) -> bool:
        """True if autograd adds gradients up in float32, since DeepSpeed has no such option at stage 0."""
        settings = self._settings
        return self.training.precision == "bf16" and settings.zero_stage == 0 and settings.accumulates_in_float32

    def _config(self) -> dict[str, Any]:
        training, settings = self.training, self._settings
        bf16 = training.precision == "bf16"
        zero: dict[str, Any] = {"stage": settings.zero_stage}
        if settings.zero_stage == 2 and self._on.type == "cuda" and self.world_size > 1:
            # Off by DeepSpeed's default; the gradients of every micro-batch are reduced, beside its backward pass with this.
            zero["overlap_comm"] = True
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            # The number of micro-batches of a step is determined by setting each boundary explicitly.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": training.gradient_clipping,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # DeepSpeed accepts no offloaded optimizer but its own otherwise.
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        }
        if bf16 and settings.zero_stage and settings.accumulates_in_float32:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            # Stage 1: frees a parameter's bfloat16 gradient as soon as it is added.
            config["bf16"]["immediate_grad_update"] = True
        elif self._adds_up_itself:
            # Its own norm would be of the gradients rounded to bfloat16; `step` clips.
            config["gradient_clipping"] = 0.0
        if bf16 and settings.zero_stage < 2 and settings.accumulates_in_float32:
            # One reduction an update, of the float32 sums; from stage 2 on there is one for each micro-batch.
            config["communication_data_type"] = "fp32"
        return _merge(config, settings.every_option)

    # ---------------------------------------------------------------------------------------------------- an update

    def forward_backward(self, loss: Callable[[Forward], torch.Tensor], last: bool) -> None:
        if last and self._adds_up_itself:
            # DeepSpeed would fill in gradients of the parameters' own dtype for those that have none.
            for parameter in self.module.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        self._has_gradient = True
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss(self._engine), scale_wrt_gas=False)

    def step(self) -> Update:
        engine = self._engine
        learning_rate = float(engine.get_lr()[0])
        norm = self._plain_grad_norm()
        if norm is not None and not math.isfinite(norm):
            return Update(norm, learning_rate, applied=False)
        if norm is not None and self._adds_up_itself:
            clipping = self.training.gradient_clipping
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), clipping, torch.tensor(norm, device=self.device))
        engine.step()
        self._has_gradient = False
        # Where DeepSpeed computes the norm, it also drops a gradient that is not finite.
        if not (applied := engine.was_step_applied()):
            self._drop_sums()
        return Update(float(engine.get_global_grad_norm()) if norm is None else norm, learning_rate, applied)

    def abandon(self) -> None:
        if not self._has_gradient:
            return
        engine = self._engine
        if self._settings.zero_stage == 0:
            engine.zero_grad()
            engine.optimizer.zero_grad()
        else:
            # A sharded gradient is in buffers of DeepSpeed's own, which it clears where it finds an overflow.
            with _overflow(engine.optimizer, self._settings.zero_stage):
                engine.step()
            self._drop_sums()
        self._has_gradient = False

    def _drop_sums(self) -> None:
        """Drop float32 sums of gradients: with an offloaded optimizer, DeepSpeed adds to those of an overflow."""
        if self._settings.offloads_optimizer and self._settings.zero_stage < 3:
            sums = self._engine.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))

    @property
    def updates(self) -> int:
        return int(self._engine.global_steps - self._engine.skipped_steps)

    def _plain_grad_norm(self) -> float | None:
        """Gradient norm before clipping, for the case that DeepSpeed has no optimizer of its own that reports it."""
        if self._settings.zero_stage or (self.training.precision != "fp32" and not self._adds_up_itself):
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
        return self._on_rank_0(parameters, lambda parameter: parameter.detach().to(device, copy=True).contiguous())

    def whole_into(self, parameters: Sequence[torch.nn.Parameter], buffers: CopyBuffers) -> list[torch.Tensor]:
        return self._on_rank_0(parameters, buffers.copy)

    def _on_rank_0(
        self, parameters: Sequence[torch.nn.Parameter], copy: Callable[[torch.nn.Parameter], torch.Tensor]
    ) -> list[torch.Tensor]:
        sharded = self._settings.zero_stage == 3
        with _import_deepspeed(self._on).zero.GatheredParameters(list(parameters)) if sharded else nullcontext():
            return [copy(parameter) for parameter in parameters] if self.rank == 0 else []

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        # Frozen weights are those that the phase was started with. DeepSpeed leaves out one name of each, and keeps the others.
        every = self.module.named_parameters(remove_duplicate=False)
        frozen = [name for name, parameter in every if not parameter.requires_grad]

        def leave_out(module: Any, tensors: dict[str, Any], prefix: str, metadata: Any) -> None:
            for name in frozen:
                tensors.pop(prefix + name, None)

        hook = self.module.register_state_dict_post_hook(leave_out)
        try:
            self._engine.save_checkpoint(str(folder), tag=_TAG, client_state=state, exclude_frozen_parameters=self._has_frozen)
        finally:
            hook.remove()

    @classmethod
    def trained_weights(cls, folder: Path) -> dict[str, torch.Tensor]:
        _import_deepspeed(torch.device("cpu"))
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        # Up to stage 2, every rank holds all weights, and rank 0 writes them for all.
        whole = folder / _TAG / "mp_rank_00_model_states.pt"
        with tensors_only(*_records()):
            if whole.is_file():
                return dict(TorchCheckpointEngine().load(str(whole), map_location="cpu")["module"])
            if not any((folder / _TAG).glob("zero_pp_rank_0_*_model_states.pt")):
                raise TrainingError(f"{folder}: no checkpoint that training.backend.type=deepspeed wrote")
            found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)
            return dict(found)

    def reads_every_rank(self, folder: Path) -> bool:
        stage = self._settings.zero_stage
        with tensors_only(*_records()):
            _, found = first_file(folder / _TAG, _mapped)
        return found != Layout(self.world_size if stage else 1, stage)

    def _load_divided_anew(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint that another number of ranks wrote, or another ZeRO stage."""
        engine, scheduler = self._engine, self._engine.lr_scheduler
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        groups = [{names[id(each)]: each for each in group["params"]} for group in parameter_groups(self.module)]
        with tensors_only(*_records()):
            shards = ZeroShards(folder / _TAG, _mapped, [list(group) for group in groups])
        restore(engine, self._settings.zero_stage, shards, groups)
        plain = shards.plain
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in plain["module"]:
                    buffer.copy_(plain["module"][name])
        starting = scheduler.base_lrs
        scheduler.load_state_dict(plain["lr_scheduler"])
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        keep_learning_rates(scheduler, starting)
        engine.global_steps, engine.skipped_steps = int(plain["global_steps"]), int(plain["skipped_steps"])
        engine.global_samples = int(plain["global_samples"])
        return plain

    def load(self, folder: Path) -> dict[str, Any]:
        if self.reads_every_rank(folder):
            return self._load_divided_anew(folder)
        scheduler, optimizer = self._engine.lr_scheduler, self._engine.optimizer
        starting, clipping = scheduler.base_lrs, getattr(optimizer, "clip_grad", None)
        loaded = state = None
        if (folder / _TAG).is_dir():
            with tensors_only(*_records()):
                loaded, state = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not self._has_frozen)
        if loaded is None or state is None:
            raise TrainingError(f"{folder}: DeepSpeed found no checkpoint for this number of ranks and ZeRO stage")
        keep_learning_rates(scheduler, starting)
        if clipping is not None:
            optimizer.clip_grad = clipping
        return state


def _mapped(path: Path) -> Any:
    """Content of one of DeepSpeed's files, mapped into memory: tensors are read where they are used."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from torch.utils.serialization import config

    # `patch` is added to the module while it is imported.
    with config.patch({"load.mmap": True}):  # type: ignore[attr-defined]
        return TorchCheckpointEngine().load(str(path), map_location="cpu")


def _records() -> tuple[type, ...]:
    """Classes of plain values that DeepSpeed's checkpoints hold."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return LossScaler, ZeroStageEnum, fragment_address


def _undo_first_step(optimizer: Any) -> None:
    """Undo the step with zero gradients by which DeepSpeed allocates the moments of bfloat16 weights at stage 0.

    It would count in AdamW's bias correction, and decay the weights once more.
    """
    optimizer.optimizer.state.clear()
    with torch.no_grad():
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                master.copy_(parameter)


@contextmanager
def _overflow(optimizer: Any, stage: int) -> Iterator[None]:
    """Context in which the sharded optimizer takes its gradient for an overflow."""

    def found(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    checks = {"check_grad_overflow": True, "check_overflow": found}
    replaced = checks if stage < 3 else {"_overflow_check_and_loss_scale_update": found}
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(_replaced(optimizer, name, value))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context in which an object has another attribute."""
    own = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not _ABSENT:
            setattr(owner, name, own)


def _import_deepspeed(device: torch.device) -> Any:
    # Its own choice is a visible GPU, which may be another process's.
    os.environ["DS_ACCELERATOR"] = device.type
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
