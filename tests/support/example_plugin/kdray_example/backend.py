"""A student backend: plain torch, with momentum in AdamW's place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch

from actors.student.backend import Optimization
from actors.student.backends.torch import TorchBackend
from kdray.config.backends import ParameterBytes, Precision, TorchSettings
from kdray.config.base import Fraction


class MomentumSettings(TorchSettings):
    """Stochastic gradient descent with momentum, in one process."""

    implementation = "kdray_example.backend:MomentumBackend"

    type: Literal["momentum"] = "momentum"
    momentum: Fraction = 0.9
    """Share of the last update that the next one keeps."""

    def parameter_bytes(self, precision: Precision, ranks: int) -> ParameterBytes:
        # One moment where AdamW has two.
        whole = super().parameter_bytes(precision, ranks)
        return whole._replace(optimizer=whole.optimizer - 4)


@dataclass(frozen=True)
class Momentum(Optimization):
    momentum: float = 0.9

    def optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=self.learning_rate, momentum=self.momentum)


class MomentumBackend(TorchBackend):
    def start(self, module: torch.nn.Module, optimization: Optimization) -> None:
        super().start(module, Momentum(**asdict(optimization), momentum=self.training.backend.momentum))
