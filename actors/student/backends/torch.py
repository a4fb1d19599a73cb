"""Plain PyTorch in one process, without a process group: the whole student on one device, with torch's AdamW."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model

from actors.student.backend import (
    Forward,
    Optimization,
    StudentBackend,
    Update,
    keep_learning_rates,
    training_device,
    uses_fused_optimizer,
)
from actors.weights.copies import CopyBuffers
from kdray.config import TrainingSettings
from kdray.errors import TrainingError

_WEIGHTS = "weights.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_PLAIN = "state.json"
_MASTER = "master"


class TorchBackend(StudentBackend):
    """The whole student in this process, on its GPU if `training.gpus_per_rank` is above 0.

    With `training.precision=bf16` the optimizer updates float32 copies of the weights, into which gradients are accumulated in
    float32 as they arrive. An abandoned update leaves nothing behind: training may continue with another batch.
    """

    def __init__(self, training: TrainingSettings) -> None:
        super().__init__(training)
        self._device = training_device(training)
        self._module: torch.nn.Module | None = None
        self._optimizer: Any = None
        self._scheduler: Any = None
        self._masters: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        """Parameters of lower precision, and their float32 copies."""
        self._accumulating = False
        self._updates = 0

    # ----------------------------------------------------------------------------------------------------- a phase

    def start(self, module: torch.nn.Module, optimization: Optimization) -> None:
        self._module = module.to(self._device)
        optimization = replace(optimization, fused=uses_fused_optimizer(self._device))
        self._optimizer = optimization.optimizer(module)
        self._masters = []
        for group in self._optimizer.param_groups:
            group["params"] = [self._master(parameter) for parameter in group["params"]]
        # By the optimizer, not by the code that calls it: a call that is missing or repeated is then seen.
        self._updates = 0
        self._optimizer.register_step_post_hook(self._count)
        self._scheduler = optimization.scheduler(self._optimizer)
        self._accumulating = False

    def _count(self, *_: Any) -> None:
        self._updates += 1

    def _master(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """The tensor that the optimizer updates for a parameter: itself, or a float32 copy that accumulates its gradients."""
        if parameter.dtype == torch.float32:
            return parameter
        master = torch.nn.Parameter(parameter.detach().float())

        def take(given: torch.Tensor) -> None:
            assert given.grad is not None
            arrived = given.grad.float()
            master.grad = arrived if master.grad is None else master.grad.add_(arrived)
            given.grad = None

        parameter.register_post_accumulate_grad_hook(take)
        self._masters.append((parameter, master))
        return master

    def close(self) -> None:
        if self._module is not None:
            self._module = self._optimizer = self._scheduler = None
            self._masters = []
            gc.collect()

    @property
    def module(self) -> torch.nn.Module:
        assert self._module is not None
        return self._module

    @property
    def device(self) -> torch.device:
        return self._device

    # ---------------------------------------------------------------------------------------------------- an update

    def forward_backward(self, loss: Callable[[Forward], torch.Tensor], last: bool) -> None:
        if not self._accumulating:
            self._optimizer.zero_grad()
        # Gradients added by a pass that raises belong to no update.
        self._accumulating = False
        loss(self.module).backward()
        self._accumulating = not last

    def step(self) -> Update:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        learning_rate = float(self._scheduler.get_last_lr()[0])
        norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if not math.isfinite(norm):
            return Update(float(norm), learning_rate, applied=False)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.training.gradient_clipping, norm)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._give_back()
        return Update(float(norm), learning_rate, applied=True)

    def abandon(self) -> None:
        self._optimizer.zero_grad()
        self._accumulating = False

    @property
    def updates(self) -> int:
        return self._updates

    def _give_back(self) -> None:
        """Round the float32 copies into the parameters."""
        with torch.no_grad():
            for parameter, master in self._masters:
                parameter.copy_(master)

    # ------------------------------------------------------------------------------------------------------- weights

    def whole(self, parameters: Sequence[torch.nn.Parameter], device: torch.device | str) -> list[torch.Tensor]:
        return [parameter.detach().to(device, copy=True).contiguous() for parameter in parameters]

    def whole_into(self, parameters: Sequence[torch.nn.Parameter], buffers: CopyBuffers) -> list[torch.Tensor]:
        return [buffers.copy(parameter) for parameter in parameters]

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        optimizer = self._optimizer.state_dict()
        tensors = {f"{number}.{name}": value for number, values in optimizer["state"].items() for name, value in values.items()}
        tensors |= {f"{number}.{_MASTER}": master.detach() for number, (_, master) in enumerate(self._masters)}
        trained = self._trained_alone()
        if trained is None:
            save_model(self.module, str(folder / _WEIGHTS))
        else:
            save_file({name: parameter.detach() for name, parameter in trained.items()}, folder / _WEIGHTS)
        save_file(tensors, folder / _OPTIMIZER)
        plain = {"state": state, "groups": optimizer["param_groups"], "scheduler": self._scheduler.state_dict()}
        plain["updates"] = self._updates
        (folder / _PLAIN).write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def trained_weights(cls, folder: Path) -> dict[str, torch.Tensor]:
        try:
            return load_file(folder / _WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(f"{folder}: no checkpoint that training.backend.type=torch wrote: {error}") from error

    def _trained_alone(self) -> dict[str, torch.nn.Parameter] | None:
        """Parameters that are trained, if others are frozen: those are as the phase was started with; None if none is."""
        named = dict(self.module.named_parameters())
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        return None if len(trained) == len(named) else trained

    def load(self, folder: Path) -> dict[str, Any]:
        try:
            plain = json.loads((folder / _PLAIN).read_text(encoding="utf-8"))
            tensors = load_file(folder / _OPTIMIZER)
            masters = [tensors.pop(f"{number}.{_MASTER}") for number in range(len(self._masters))]
            trained = self._trained_alone()
            if trained is None:
                load_model(self.module, str(folder / _WEIGHTS), device=str(self._device))
            else:
                weights = load_file(folder / _WEIGHTS, device=str(self._device))
                with torch.no_grad():
                    for name, parameter in trained.items():
                        parameter.copy_(weights[name])
            saved, groups, scheduler = plain["state"], plain["groups"], plain["scheduler"]
            # Checkpoints of earlier versions have only the schedule's position, which moves with every update.
            updates = int(plain.get("updates", scheduler["last_epoch"]))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise TrainingError(f"{folder}: no checkpoint that training.backend.type=torch wrote: {error}") from error
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            moments.setdefault(int(number), {})[name] = tensor
        # The kernel is this machine's choice, whichever the checkpoint was written with.
        for group, own in zip(groups, self._optimizer.param_groups, strict=True):
            if "fused" in own:
                group["fused"] = own["fused"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        starting = self._scheduler.base_lrs
        self._scheduler.load_state_dict(scheduler)
        keep_learning_rates(self._scheduler, starting)
        self._updates = updates
        with torch.no_grad():
            for (_, master), tensor in zip(self._masters, masters, strict=True):
                master.copy_(tensor)
        return saved
