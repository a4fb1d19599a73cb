"""A student backend that no part of kdray knows: the trained weights as one flat vector, with AdamW written out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file

from actors.student.backend import Forward, Optimization, StudentBackend, Update, keep_learning_rates
from kdray.config import TrainingSettings
from kdray.config.backends import StudentBackendSettings
from kdray.errors import TrainingError


class FlatSettings(StudentBackendSettings):
    """One vector in one process."""

    implementation: ClassVar[str] = "tests.support.flat_backend:FlatBackend"
    packages: ClassVar[tuple[str, ...]] = ("safetensors",)
    max_ranks: ClassVar[int | None] = 1
    placement: ClassVar[frozenset[str]] = frozenset({"pieces"})

    type: Literal["flat"] = "flat"
    pieces: int = 1
    """Pieces in which the vector is updated, one after the other; nothing depends on it."""


class FlatBackend(StudentBackend):
    def __init__(self, training: TrainingSettings) -> None:
        super().__init__(training)
        assert isinstance(training.backend, FlatSettings)
        self._pieces = training.backend.pieces
        self._module: Any = None

    def start(self, module: torch.nn.Module, optimization: Optimization) -> None:
        self._module = module
        # For its groups and for the schedule; it never steps.
        self._optimizer = optimization.optimizer(module)
        self._scheduler = optimization.scheduler(self._optimizer)
        self._parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
        weights = torch.cat([each.detach().reshape(-1).float() for each in self._parameters])
        self._vectors = {"weights": weights, "first": torch.zeros_like(weights), "second": torch.zeros_like(weights)}
        self._gradient: torch.Tensor | None = None
        self._steps = 0

    def close(self) -> None:
        self._module = None

    @property
    def module(self) -> torch.nn.Module:
        return self._module

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward_backward(self, loss: Callable[[Forward], torch.Tensor], last: bool) -> None:
        found = torch.autograd.grad(loss(self._module), self._parameters, allow_unused=True)
        given = [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, found, strict=True)]
        arrived = torch.cat([each.reshape(-1).float() for each in given])
        self._gradient = arrived if self._gradient is None else self._gradient + arrived

    def step(self) -> Update:
        gradient, self._gradient = self._gradient, None
        assert gradient is not None
        norm, learning_rate = float(gradient.norm()), float(self._scheduler.get_last_lr()[0])
        if not torch.isfinite(gradient.norm()):
            return Update(norm, learning_rate, applied=False)
        gradient = gradient * min(1.0, self.training.gradient_clipping / (norm + 1e-6))
        rates = torch.cat([torch.full((each.numel(),), g["lr"]) for g in self._optimizer.param_groups for each in g["params"]])
        decay, epsilon = self._optimizer.defaults["weight_decay"], self._optimizer.defaults["eps"]
        self._steps += 1
        betas = self._optimizer.defaults["betas"]
        bias = [1.0 - beta**self._steps for beta in betas]
        for piece in torch.arange(len(gradient)).chunk(self._pieces):
            w, m, v = (self._vectors[name][piece] for name in ("weights", "first", "second"))
            g, rate = gradient[piece], rates[piece]
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            w = w * (1 - rate * decay) - rate * (m / bias[0]) / ((v / bias[1]).sqrt() + epsilon)
            for name, values in (("weights", w), ("first", m), ("second", v)):
                self._vectors[name][piece] = values
        self._give_back()
        self._optimizer._step_count = 1  # type: ignore[attr-defined]  # else the schedule warns that it was never stepped
        self._scheduler.step()
        return Update(norm, learning_rate, applied=True)

    def abandon(self) -> None:
        self._gradient = None

    @property
    def updates(self) -> int:
        return self._steps

    def _give_back(self) -> None:
        with torch.no_grad():
            start = 0
            for parameter in self._parameters:
                parameter.copy_(self._vectors["weights"][start : start + parameter.numel()].reshape(parameter.shape))
                start += parameter.numel()

    def whole(self, parameters: Sequence[torch.nn.Parameter], device: torch.device | str) -> list[torch.Tensor]:
        return [parameter.detach().to(device, copy=True).contiguous() for parameter in parameters]

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        save_file(self._vectors, folder / "flat.safetensors")
        plain = {"state": state, "steps": self._steps, "scheduler": self._scheduler.state_dict()}
        (folder / "flat.json").write_text(json.dumps(plain))

    def load(self, folder: Path) -> dict[str, Any]:
        if not (folder / "flat.json").exists():
            raise TrainingError(f"{folder}: nothing flat is here")
        plain = json.loads((folder / "flat.json").read_text())
        self._vectors, self._steps = load_file(folder / "flat.safetensors"), plain["steps"]
        starting = self._scheduler.base_lrs
        self._scheduler.load_state_dict(plain["scheduler"])
        for group, rate in zip(self._optimizer.param_groups, self._scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        keep_learning_rates(self._scheduler, starting)
        self._give_back()
        return plain["state"]


def install(folder: Path) -> str:
    """Files of a distribution that registers the backend, as `pip install` writes them. Returns: what to add to the path."""
    info = folder / "flat_students-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flat-students\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[kdray.student_backends]\nflat = tests.support.flat_backend:FlatSettings\n")
    return str(folder)
